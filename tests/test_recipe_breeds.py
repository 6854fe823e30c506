"""Living-17 and Entity-30 on a miniature ImageNet: options and plans here; real processes in the slow tier."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for needed in ("timm", "datasets", "PIL", "rich", "matplotlib"):
    pytest.importorskip(needed)

import transformers  # noqa: E402
from miniatures import cache_changes_nothing, results_in  # noqa: E402
from peft import PeftModel  # noqa: E402
from scripts import script  # noqa: E402
from test_corruptions import write_model  # noqa: E402
from test_subpopulations import write_hierarchy, write_imagenet  # noqa: E402

from paper.breeds import BENCHMARKS  # noqa: E402
from paper.subpopulations import BREEDS_EACH, read_breeds  # noqa: E402
from peft_surgical.bases import load_base  # noqa: E402
from peft_surgical.data.labelled import collate, items  # noqa: E402
from peft_surgical.errors import DataError  # noqa: E402
from peft_surgical.evaluation import Report, accuracy, predict_logits  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_datasets_cache")

RECIPES = Path(__file__).parents[1] / "recipes"
SIZES = {"living17": (5, 34, 17), "entity30": (4, 60, 60)}
"""Training images of each class, and images to tune on and to validate."""


@pytest.fixture(scope="module", params=list(BENCHMARKS))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def recipe(name):
    return script("recipes", f"{name}.py")


@pytest.fixture(scope="module")
def place(name, tmp_path_factory):
    """``imagenet``, ``modified`` and ``model``, an ImageNet network of 10 classes."""
    root, design = tmp_path_factory.mktemp(name), BENCHMARKS[name]
    write_hierarchy(root / "modified", name)
    write_imagenet(root / "imagenet", design.superclasses * design.subclasses, SIZES[name][0], 1)
    write_model(root / "model", classes=10)
    return root


def words(name, place, output, *more):
    _, tuning, validation = SIZES[name]
    given = ["--data", place / "imagenet", "--hierarchy", place / "modified", "--model", place / "model"]
    given += ["--output", output, "--cpu", "--tuning-images", tuning, "--validation-images", validation, *more]
    return [str(word) for word in given]


def test_options_are_the_papers(name, recipe, capsys):
    with pytest.raises(SystemExit, match="0"):
        recipe.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--hierarchy DIR the hierarchy files: imagenet_class_hierarchy/modified of github.com/MadryLab" in said
    assert "default: 5 (paper, A.4: Adam, 3 epochs of the head, 2 of all; rate, batch and crops chosen here)" in said
    assert "NOT measured here" in said
    assert f"{BREEDS_EACH * BENCHMARKS[name].superclasses:,} images of" in said
    protocol = recipe.PROTOCOL
    assert protocol.source.fitting.epochs * protocol.source.options["share"] == 3
    assert (protocol.fitting.epochs, protocol.fitting.weight_decay, protocol.lrs) == (15, 0, (5e-4, 1e-4, 1e-5))
    assert set(protocol.published) == {"none", *protocol.rows} - {"auto"}
    for row in ("none", "full", "cross-val", "auto-rgn"):
        assert f"{protocol.published[row]} %" in said
    with pytest.raises(SystemExit, match="2"):
        recipe.main(["--data", "imagenet"])


def test_the_plan_trains_nothing_and_reads_no_weights(name, recipe, place, tmp_path, capsys):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text((place / "model" / "config.json").read_text())
    recipe.main(words(name, place, tmp_path / "out", "--dry-run", "--model", tmp_path / "config"))
    said = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    design = BENCHMARKS[name]
    source = design.superclasses * design.subclasses // 2 * SIZES[name][0]
    assert f"source: lp-ft, 5 epochs on {source} images" in said
    assert f"tuning: {SIZES[name][1]} images (drawn: seed 0, 2 of each superclass" in said
    assert "15 epochs" in said
    assert "auto-rgn: " in said
    assert f"{design.superclasses} classes" in said


def test_folders_are_looked_for_first(name, recipe, place, tmp_path):
    with pytest.raises(DataError, match=r"train is one part of ImageNet: pass the folder above it"):
        recipe.main(words(name, place, tmp_path, "--data", place / "imagenet" / "train"))
    with pytest.raises(DataError, match=r"dataset_class_info.json, class_hierarchy.txt, node_names.txt not in"):
        recipe.main(words(name, place, tmp_path, "--hierarchy", place))
    there = BENCHMARKS[name].subclasses // 2 * SIZES[name][0]
    with pytest.raises(DataError, match=f"train: class 'super 0' has {there} images to draw from, and 2. are needed"):
        recipe.main(words(name, place, tmp_path, "--tuning-images", 20 * BENCHMARKS[name].superclasses))
    assert not list(tmp_path.iterdir())


# Real processes


def launched(name, *given):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, str(RECIPES / f"{name}.py"), *given], capture_output=True, text=True, timeout=900, env=environment
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_launched_from_source_to_adapter(name, place, tmp_path):
    more = ("--source-epochs", "5", "--epochs", "3", "--target", "block1", "--lr", "1e-2", "--seeds", "0")
    asked = words(name, place, tmp_path, *more, "--batch-size", "16", "--forgetting")
    launched(name, *asked)
    source = Report.load(tmp_path / "source" / "source.json")
    assert (source.target, source.settings["options"], source.settings["epochs"]) == ("lp-ft", {"share": 0.6}, 5)
    network = load_base(tmp_path / "source")
    assert (network.classes, network.head_is_new) == (BENCHMARKS[name].superclasses, False)

    # The adapter, on the source network opened anew, gives what the ledger says.
    report = Report.load(tmp_path / "report.json")
    _, tuning, validation = SIZES[name]
    parts = {"train": place / "imagenet" / "train", "val": place / "imagenet" / "val"}
    data = read_breeds(name, hierarchy=place / "modified", **parts, tuning=tuning, validation=validation)
    base = load_base(report.model, **report.settings["open"])
    inputs = collate(list(items(data.test, base.transform_eval)))
    before = predict_logits(base.model, inputs["pixel_values"], 100)
    after = predict_logits(
        PeftModel.from_pretrained(base.model, tmp_path / "adapter").eval(), inputs["pixel_values"], 100
    )
    assert not torch.equal(before, after)
    runs = results_in(tmp_path / "ledger.jsonl")
    assert runs["none"]["test"] == accuracy(before, inputs["labels"])
    assert runs["block1"]["test"] == accuracy(after, inputs["labels"])
    assert report.find("accuracy", f"{report.settings['dataset']}, source").n == len(data.source_test)
    assert f"| {report.settings['published']['none']:g} |" in (tmp_path / "table.md").read_text()

    written = [
        tmp_path / "ledger.jsonl",
        tmp_path / "source" / "model.safetensors",
        tmp_path / "source" / "source.json",
    ]
    contents = [file.read_bytes() for file in written]
    launched(name, *asked)
    assert [file.read_bytes() for file in written] == contents
    assert Report.load(tmp_path / "report.json") == report


@pytest.mark.slow
def test_a_vit_and_a_source_checkpoint(name, recipe, place, tmp_path):
    """transformers' ViT goes through the source step alone; its checkpoint is then given by path."""
    network = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            num_labels=10,
        )
    )
    network.save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    vit = ("--model", str(tmp_path / "vit"), "--source-epochs", "1", "--epochs", "1", "--seeds", "0")
    recipe.main(words(name, place, tmp_path / "first", *vit, "--source-only"))
    assert not (tmp_path / "first" / "ledger.jsonl").exists()
    checkpoint = tmp_path / "first" / "source"
    asked = ("--source-checkpoint", str(checkpoint), "--target", "block2", "--lr", "1e-2")
    recipe.main(words(name, place, tmp_path / "second", *vit, *asked))
    report = Report.load(tmp_path / "second" / "report.json")
    assert report.model == str(checkpoint)
    assert report.settings["head"] == "kept"
    assert set(report.settings["moved"]) == {"embedding", "block1", "block2", "head"}
    assert [block for block, distance in report.settings["moved"].items() if distance] == ["block2"]
    assert not (tmp_path / "second" / "source").exists()


@pytest.mark.slow
def test_the_cached_prefix_changes_nothing(name, recipe, place, tmp_path):
    more = ("--source-epochs", "1", "--epochs", "2", "--seeds", "0", "1", "--lr", "1e-2", "--head-lr", "1e-1")
    asked = (*more, "--target", "head", "block4")
    assert len(cache_changes_nothing(recipe.main, lambda folder: words(name, place, folder, *asked), tmp_path)) == 1
