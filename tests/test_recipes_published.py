"""Waterbirds, CelebA, Camelyon17 and FMoW from end to end on miniature copies; real processes in the slow tier."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch

for needed in ("timm", "datasets", "PIL.Image", "sklearn", "rich", "matplotlib"):
    pytest.importorskip(needed)

import datasets  # noqa: E402
import PIL.Image  # noqa: E402
from huggingface_hub import constants  # noqa: E402
from miniatures import (  # noqa: E402
    cache_changes_nothing,
    camelyon_folder,
    camelyon_rows,
    celeba_folder,
    fmow_folder,
    fmow_rows,
    grouped_rows,
    results_in,
    tiny_clip,
    tiny_resnet,
    waterbirds_folder,
)
from peft import PeftModel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from scripts import script  # noqa: E402
from sklearn.metrics import accuracy_score, recall_score  # noqa: E402
from transformers import CLIPForImageClassification, CLIPModel, Trainer  # noqa: E402

from paper.published import read_published  # noqa: E402
from paper.wilds_folders import FMOW_CATEGORIES, REGIONS  # noqa: E402
from peft_surgical import anatomy_of  # noqa: E402
from peft_surgical.bases import load_base  # noqa: E402
from peft_surgical.blocks import parse, resolve  # noqa: E402
from peft_surgical.choosing.models import logits_of  # noqa: E402
from peft_surgical.errors import ConfigError, DataError, UnknownTargetError  # noqa: E402
from peft_surgical.evaluation import Report  # noqa: E402
from peft_surgical.keys import PRIVATE  # noqa: E402
from peft_surgical.training.ledger import Ledger  # noqa: E402

RECIPES = Path(__file__).parents[1] / "recipes"
ADAPTER = "adapter/adapter_model.safetensors"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no accelerator is found.*"),
    pytest.mark.usefixtures("own_datasets_cache"),
]

GROUPED = grouped_rows({"train": (40, 4, 4, 16), "validation": (14, 14, 10, 10), "test": (12, 12, 8, 8)})
# (hospital, split number) -> images of each class
CENTERS = {(0, 0): 24, (0, 1): 6, (3, 0): 23, (3, 1): 5, (4, 0): 25, (4, 1): 6, (1, 0): 3, (1, 1): 2, (2, 0): 29}
CAMELYON = camelyon_rows({**CENTERS, (2, 1): 16})
FMOW = fmow_rows(missing=("zoo",), countries=("NAM", "JPN"))


@dataclass(frozen=True)
class Case:
    """A recipe on its miniature copy.

    Attributes:
        model: Which network.
        words: What is asked for.
        row: A row that is asked for, in a target's words.
        parts: Images of each part.
        metrics: In their order.
    """

    model: str
    words: tuple[str, ...]
    row: str
    parts: dict[str, int]
    metrics: tuple[str, ...] = ("accuracy",)


GROUP_METRICS = ("worst_group_accuracy", "average_group_accuracy", "accuracy")
GROUP_PARTS = {"source": 64, "tuning": 16, "validation": 32, "test": 40}
CASES = {
    "waterbirds": Case("resnet", ("--tuning-images", "16"), "block1", GROUP_PARTS, GROUP_METRICS),
    "celeba": Case("resnet", ("--tuning-images", "16"), "block1", GROUP_PARTS, GROUP_METRICS),
    "camelyon17": Case(
        "clip",
        ("--tuning-images", "24", "--validation-images", "24"),
        "embedding",
        {"source": 144, "source_validation": 34, "tuning": 24, "validation": 24, "test": 42},
    ),
    "fmow": Case(
        "clip",
        (),
        "last3",
        {"source": 123, "source_validation": 123, "source_test": 123, "tuning": 61, "validation": 122, "test": 61},
    ),
}


def truth(name, file):
    """Label and group of an image, by its file."""
    if name == "camelyon17":
        places = re.search(r"patient_(\d+)_node_(\d+)_x_(\d+)_y_(\d+)\.png", file).groups()
        (row,) = [row for row in CAMELYON if row[:4] == tuple(map(int, places))]
        return row[4], row[6]
    if name == "fmow":
        _, category, _, country = FMOW[int(re.search(r"rgb_img_(\d+)", file)[1])]
        return FMOW_CATEGORIES.index(category), REGIONS.index({"NAM": "Africa", "JPN": "Asia"}[country])
    number = int(re.search(r"(\d+)\.jpg", file)[1]) - (name == "celeba")
    _, label, attribute = GROUPED[number]
    return label, 2 * label + attribute


def expected(name, seen, labels, groups):
    """The metrics, by scikit-learn."""
    found = {"accuracy": accuracy_score(labels, seen)}
    if name in ("waterbirds", "celeba"):
        right = [seen[i] == labels[i] for i in range(len(labels))]
        each = [recall_score([1] * n, [r for r, g in zip(right, groups, strict=True) if g == group])
                for group, n in Counter(groups).items()]  # fmt: skip
        found |= {"worst_group_accuracy": min(each), "average_group_accuracy": sum(each) / 4}
    return found


def files_of(place, name):
    """Part -> its files, as the recipe should have read them."""
    sizes = {
        words[2:].split("-")[0]: int(n)
        for words, n in zip(CASES[name].words[::2], CASES[name].words[1::2], strict=True)
    }
    folder = place / {"celeba": "celebA_v1.0", "fmow": "fmow_v1.1"}.get(name, f"{name}_v1.0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = read_published(name, place, seed=0, **sizes)
    return {part: [f"{folder}/{file}" for file in rows["file"]] for part, rows in data.parts.items()}


def load(name):
    return script("recipes", f"{name}.py")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """All four data sets, as the WILDS package unpacks them, and the networks ``clip`` and ``resnet``."""
    root = tmp_path_factory.mktemp("published")
    waterbirds_folder(root, GROUPED, shade=60)
    celeba_folder(root, GROUPED, shade=60)
    camelyon_folder(root, rows=CAMELYON, shade=60)
    fmow_folder(root, FMOW, write_images=True)
    tiny_clip(root / "clip")
    tiny_resnet(root / "resnet")
    return root


def words(place, name, output, *more):
    case = CASES[name]
    given = ["--data", place, "--model", place / case.model, "--output", output, "--cpu", "--seeds", "0", *case.words]
    given += ["--epochs", "2", "--source-epochs", "1", "--lr", "1e-2", "--head-lr", "1e-1", "--batch-size", "16"]
    return [str(word) for word in [*given, "--target", case.row, *more]]


@contextlib.contextmanager
def openings():
    """Counts how often each file of an image is read."""
    counted, real = Counter(), Path.read_bytes

    def read(path):
        if path.suffix in (".png", ".jpg"):
            counted[path.as_posix()] += 1
        return real(path)

    untold = AssertionError("an image was opened on another way")
    with mock.patch.object(Path, "read_bytes", read), mock.patch("datasets.Image.decode_example", side_effect=untold):
        yield counted


@contextlib.contextmanager
def blindfold():
    with openings() as counted:
        yield
    assert not counted


@contextlib.contextmanager
def no_training():
    with mock.patch.object(Trainer, "train", side_effect=AssertionError("something was trained")):
        yield


def reopened(folder):
    """The network before and after tuning, as the report says how to open it, and the transform."""
    report = Report.load(folder / "report.json")
    before, after = (load_base(report.model, **report.settings["open"]) for _ in range(2))
    model = PeftModel.from_pretrained(after.model, folder / "adapter").eval()
    return report, before.model, model, after.transform_eval


def predicted(model, transform, files):
    images = torch.stack([transform(PIL.Image.open(file).convert("RGB")) for file in files])
    with torch.no_grad():
        return logits_of(model(images)).argmax(1).tolist()


# --- one run of each ---


@pytest.mark.parametrize("name", CASES)
def test_from_end_to_end(name, place, tmp_path, monkeypatch):
    monkeypatch.setattr("peft_surgical.experiment.subject._KEPT_BYTES", 0)  # as if there were more images than memory
    recipe, case = load(name), CASES[name]
    without = pytest.warns(UserWarning, match=r"no image of 1 of the 62 classes \(zoo\)")
    with without if name == "fmow" else contextlib.nullcontext(), openings() as counted:
        recipe.main(words(place, name, tmp_path))
    assert {"adapter", "figure.png", "ledger.jsonl", "report.json", "source", "table.md"} == {
        entry.name for entry in tmp_path.iterdir() if not entry.name.startswith(".")
    }
    report, before, after, transform = reopened(tmp_path)
    assert report == Report.load(tmp_path / "adapter" / "report.json")
    assert report.settings["parts"] == case.parts
    assert report.settings["head"] == "kept"
    assert report.settings["published"] == dict(recipe.PROTOCOL.published)

    # Every image of a part was read when it was needed, and no other one at all.
    files = files_of(place, name)
    assert set(counted) == {file for part in files.values() for file in part}
    assert {counted[file] for file in files["test"]} == {2}  # for each row that is reported
    if "source_validation" in files:
        # One epoch, and twice a few to see whether a part of the network can be computed once.
        assert {counted[file] for file in files["source"]} <= {1, 3}
    if name == "camelyon17":
        assert Counter(truth(name, file)[1] for file in counted) == {0: 60, 3: 56, 4: 62, 2: 90}  # none of hospital 1

    # What is reported is what the adapter gives on the test images, by scikit-learn.
    labels, groups = map(list, zip(*(truth(name, file) for file in files["test"]), strict=True))
    runs = results_in(tmp_path / "ledger.jsonl")
    for row, model in {"none": before, case.row: after}.items():
        found = expected(name, predicted(model, transform, files["test"]), labels, groups)
        for metric in case.metrics:
            assert report.find(f"{metric} of {row}").value == pytest.approx(found[metric])
        assert runs[row]["test"] == pytest.approx(found[case.metrics[0]])
    deltas = load_file(tmp_path / ADAPTER)
    assert any(delta.any() for delta in deltas.values())
    parameters = dict(before.named_parameters())
    assert len(deltas) == len([one for one in resolve(parse(case.row), anatomy_of(before)) if one in parameters])
    assert f"| {recipe.PROTOCOL.published['none']:g} |" in (tmp_path / "table.md").read_text()


# --- what is said before anything is trained ---


@pytest.mark.parametrize("name", CASES)
def test_help_says_where_every_default_is_from(name, capsys):
    recipe = load(name)
    with pytest.raises(SystemExit, match="0"):
        recipe.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"accelerate launch recipes/{name}.py" in said
    assert "NOT measured here" in said
    assert "Chosen here" in said
    for number in recipe.PROTOCOL.published.values():
        assert f" {number} " in said
    assert f"default: {recipe.PROTOCOL.fitting.epochs} (paper, A.4)" in said
    assert "(chosen here)" in said
    assert set(recipe.PROTOCOL.published) <= {"none", *recipe.PROTOCOL.rows}
    assert {"camelyon17": "--center", "fmow": "--years FIRST LAST"}.get(name, "--lr") in said


@pytest.mark.parametrize("name", CASES)
def test_the_plan_reads_no_weights_and_opens_no_image(name, place, tmp_path, capsys, recwarn):
    case = CASES[name]
    model = tmp_path / "config"
    model.mkdir()
    for file in ("config.json", "preprocessor_config.json"):
        if (place / case.model / file).is_file():
            shutil.copy(place / case.model / file, model)
    recipe = load(name)
    asked = ["--data", place, "--model", model, "--output", tmp_path / "out", "--cpu", "--dry-run", *case.words]
    with blindfold(), no_training():
        recipe.main([str(word) for word in asked])
    said = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    for part, n in case.parts.items():
        assert f"\n{part}: {n} images (" in said
    for row in ("none", *recipe.PROTOCOL.rows):
        (line,) = re.findall(rf"^{row}: (.*)$", said, re.MULTILINE)
        paper = recipe.PROTOCOL.published.get(row)
        assert line.endswith(f"; the paper: {paper:g} %") if paper is not None else "paper" not in line
    epochs, size = recipe.PROTOCOL.fitting.epochs, recipe.PROTOCOL.fitting.batch_size
    steps = epochs * -(-case.parts["tuning"] // size)
    assert f"one run: {steps} steps" in said
    assert f"full, {recipe.PROTOCOL.source.fitting.epochs} epochs on {case.parts['source']} images" in said
    if case.model == "clip":
        # By hand: 32 + 3 * 64 * 32 + 5 * 32 + 2 * 32 of 12,832 each in four blocks; a norm more in the last.
        assert "embedding: 5 tensors, 6,400 parameters" in said
        assert "cosine rate, batch 32, 10 epochs" in said
        assert "rates 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001, 3e-05, 1e-05; the paper" in said


def test_other_targets_of_the_same_data(place, tmp_path, capsys):
    asked = [
        "--data",
        str(place),
        "--model",
        str(place / "clip"),
        "--output",
        str(tmp_path / "out"),
        "--cpu",
        "--dry-run",
    ]
    load("camelyon17").main([*asked, "--center", "3", "--tuning-images", "10", "--validation-images", "10"])
    said = capsys.readouterr().out
    assert "source: 98 images (given: the training images of hospitals 0, 4)" in said
    assert "test: 36 images (the rest of hospital 3)" in said
    load("fmow").main([*asked, "--region", "Asia", "--years", "2013", "2016", "--tune-on", "validation"])
    said = capsys.readouterr().out
    assert "drawn: seed 0, 1 of each class of the validation split in Asia, 2013 to 2016" in said
    assert "test: 62 images (given: the test split in Asia, 2013 to 2016)" in said
    for wrong in (["--center", "5"], ["--center", "2", "--region", "Asia"]):
        with pytest.raises(SystemExit, match="2"):
            load("camelyon17").main([*asked, *wrong])


SGD = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
ADAM = (1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6, 3e-7)


@pytest.mark.parametrize(
    ("given", "lrs", "head_lrs"),
    [
        ((), SGD, SGD),
        (("--optimizer", "adamw"), ADAM, ADAM),
        (("--optimizer", "adamw", "--lr", "5"), [5.0], ADAM),
        (("--head-lr", "5", "--optimizer", "adamw"), ADAM, [5.0]),
        (("--optimizer", "adamw", "--optimizer", "sgd"), SGD, SGD),
    ],
)
@pytest.mark.parametrize("name", ["camelyon17", "fmow"])
def test_an_optimizer_brings_its_rates(name, given, lrs, head_lrs):
    recipe, found = load(name), []
    with mock.patch.object(recipe, "run_study", lambda protocol, args, read: found.append(args)):
        recipe.main(["--data", "x", *given])
    assert (found[0].lr, found[0].head_lr) == (lrs, head_lrs)


def test_a_wrong_target_is_refused_before_the_source_is_trained(place, tmp_path):
    with no_training(), pytest.raises(UnknownTargetError, match="block9"):
        load("camelyon17").main(words(place, "camelyon17", tmp_path, "--target", "block9"))
    assert not list(tmp_path.iterdir())


def test_runs_are_not_spread_before_the_source_is_there(place, tmp_path, monkeypatch):
    two = contextlib.nullcontext(mock.Mock(world=2, rank=0))
    monkeypatch.setattr("paper.study.separated", lambda: two)
    with no_training(), pytest.raises(ConfigError, match=r"every process would train the source .* --source-only"):
        load("camelyon17").main(words(place, "camelyon17", tmp_path, "--spread", "runs"))


def test_the_index_has_the_numbers_of_the_protocols_and_of_the_results():
    lines = (RECIPES / "README.md").read_text(encoding="utf-8").splitlines()
    table4, table1 = ("none", "full", "cross-val", "auto-rgn"), ("none", "all", "embedding", "last3")
    for name in ("imagenet_c", "living17", "entity30", "cifar_flip", *CASES):
        published = load(name).PROTOCOL.published
        paper = " / ".join(f"{published[row]:g}" for row in (table4 if "full" in published else table1))
        (line,) = [line for line in lines if line.startswith(f"| [`{name}.py`]({name}.py) |")]
        assert re.sub(r"(\d)\.0\b", r"\1", line.split(" | ")[5]).startswith(paper)
    measured = [line.rpartition("([table](")[0::2] for line in lines if "([table](" in line]
    assert len(measured) == 2
    for said, file in measured:
        table = (RECIPES / file.partition(")")[0]).read_text(encoding="utf-8")
        for number in re.findall(r"\d+\.\d", said.rpartition(":")[2]):
            assert f"| {number} ±" in table


# --- without a network ---


@pytest.fixture
def nothing_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def test_data_that_is_not_here(nothing_cached, tmp_path):
    with pytest.raises(
        DataError,
        match=r"(?s)'wltjr1007/Camelyon17-WILDS' is no file or folder here.*HF_HUB_OFFLINE is set, so nothing is "
        r"downloaded\. Where there is a network, `hf download wltjr1007/Camelyon17-WILDS --repo-type dataset "
        r"--local-dir DIR` fetches it for --data DIR\. --data takes a Hub id, parquet files, or the folder of camelyon",
    ):
        load("camelyon17").main(["--cpu"])
    with pytest.raises(
        DataError, match=r"(?s)my/fmow' is no file or folder.*--data takes the folder of fmow_v1\.1"
    ) as fmow:
        load("fmow").main(["--cpu", "--data", "my/fmow"])
    assert "hf download" not in str(fmow.value)  # the Hub has none
    with pytest.raises(DataError, match=r"does not exist: pass a folder that holds waterbirds_v1\.0") as path:
        load("waterbirds").main(["--cpu", "--data", str(tmp_path / "birds")])
    assert "hf download" not in str(path.value)


@pytest.mark.parametrize(
    ("name", "option", "given", "fetched"),
    [
        ("camelyon17", "--model", None, "openai/clip-vit-base-patch16"),
        ("camelyon17", "--source-checkpoint", "me/clip-camelyon17", "me/clip-camelyon17"),
        ("waterbirds", "--model", None, "timm/resnet50.tv_in1k"),
    ],
)
def test_a_network_that_is_not_here(nothing_cached, place, tmp_path, name, option, given, fetched):
    asked = ["--data", str(place), "--output", str(tmp_path / "out"), "--cpu", *CASES[name].words, "--target", "head"]
    said = rf"HF_HUB_OFFLINE is set.*`hf download {re.escape(fetched)} --local-dir DIR` fetches it for {option} DIR"
    with no_training(), blindfold(), pytest.raises(DataError, match=f"(?s){said}"):
        load(name).main([*asked, *([option, given] if given else [])])


# --- CLIP as OpenAI publishes it ---


def test_clip_is_its_vision_tower_and_a_new_head(place):
    base = load_base(place / "clip", label_names=("normal", "tumor"), head="new")
    assert type(base.model) is CLIPForImageClassification
    whole = CLIPModel.from_pretrained(place / "clip").state_dict()
    own = base.model.state_dict()
    assert {name for name in own if name not in whole} == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(value, whole[name]) for name, value in own.items() if name in whole)
    anatomy = anatomy_of(base.model)
    tower = "vision_model."
    assert set(resolve(parse("embedding"), anatomy)) == {
        *(f"{tower}embeddings.{n}" for n in ("class_embedding", "patch_embedding.weight", "position_embedding.weight")),
        *(f"{tower}pre_layrnorm.{n}" for n in ("weight", "bias")),
    }
    assert set(resolve(parse("head"), anatomy)) == {"classifier.weight", "classifier.bias"}
    first, last = (set(resolve(parse(target), anatomy)) for target in ("first3", "last3"))
    layers = {f"{tower}encoder.layers.{i}" for i in range(4)}
    assert {".".join(name.split(".")[:4]) for name in first} == layers - {f"{tower}encoder.layers.3"}
    unused = {f"{tower}post_layernorm.{n}" for n in ("weight", "bias")}  # of which the classifier sees nothing
    assert unused < last
    assert {".".join(name.split(".")[:4]) for name in last - unused} == layers - {f"{tower}encoder.layers.0"}


# --- real processes ---


ALONE = ("--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")


def launched(name, given, options=ALONE, **environment):
    """What `accelerate launch` starts."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *options, str(RECIPES / f"{name}.py"), *given],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(process):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def in_the_middle(name, folder):
    """Whether a run is going on: that of the source, or one of several."""
    place = folder / ("source" if name in ("waterbirds", "camelyon17") else PRIVATE)
    return any(place.rglob("complete.json"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:the test split in Africa")
def test_killed_and_launched_again(name, place, tmp_path):
    longer = ("--epochs", "10", "--source-epochs", "8", "--lr", "1e-2", "1e-3")
    more = (*longer, "--target", CASES[name].row, "head", "all")
    asked = words(place, name, tmp_path / "killed", *more)
    process, end = launched(name, asked), time.monotonic() + 300
    while process.poll() is None and time.monotonic() < end and not in_the_middle(name, tmp_path / "killed"):
        time.sleep(0.01)
    assert process.poll() is None, "it was done before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert in_the_middle(name, tmp_path / "killed")
    assert not (tmp_path / "killed" / "report.json").exists()

    finished(launched(name, asked))
    recipe = load(name)
    recipe.main(words(place, name, tmp_path / "whole", *more))
    killed, whole = (tmp_path / folder for folder in ("killed", "whole"))
    for file in (ADAPTER, "source/model.safetensors"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes()
    results = [[run.result for run in Ledger(folder / "ledger.jsonl")] for folder in (killed, whole)]
    assert results[0] == results[1]

    # The adapter reloads, bit for bit, onto the base that the report describes.
    report, _, after, transform = reopened(killed)
    files = files_of(place, name)["test"]
    labels, groups = map(list, zip(*(truth(name, file) for file in files), strict=True))
    found = expected(name, predicted(after, transform, files), labels, groups)
    for metric in CASES[name].metrics:
        assert report.find(f"{metric} of {report.settings['adapter']['row']}").value == pytest.approx(found[metric])

    kept = {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}
    with no_training():
        recipe.main(asked)
    assert kept == {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:the test split in Africa")
def test_the_cached_prefix_changes_nothing(name, place, tmp_path):
    rows = ("--target", CASES[name].row, "head", "--seeds", "0", "1")
    adapters = cache_changes_nothing(load(name).main, lambda folder: words(place, name, folder, *rows), tmp_path)
    assert len(adapters) == 1


@pytest.mark.slow
def test_two_processes_tune_clip_as_one_does(place, tmp_path):
    """Also where a tensor of the target gets no gradient, as ``post_layernorm`` does."""
    rows = ("embedding", "first3", "last3", "head", "all")
    more = ("--batch-size", "8", "--target", *rows)
    load("camelyon17").main(words(place, "camelyon17", tmp_path / "one", *more))
    more = (*more, "--source-checkpoint", tmp_path / "one" / "source")
    pair = ("--config_file", str(RECIPES / "accelerate" / "cpu.yaml"))
    finished(launched("camelyon17", words(place, "camelyon17", tmp_path / "two", *more), pair))
    reports = [Report.load(tmp_path / folder / "report.json") for folder in ("one", "two")]
    assert [report.settings["batch_size"] for report in reports] == [8, 4]  # of each process
    assert not (tmp_path / "two" / "source").exists()
    one, two = (results_in(tmp_path / folder / "ledger.jsonl") for folder in ("one", "two"))
    assert set(one) == set(two) == {"none", *rows}
    for row in rows:
        assert two[row]["losses"] == pytest.approx(one[row]["losses"], abs=1e-4)
    assert len({tuple(one[row]["losses"]) for row in rows}) == len(rows)


@pytest.mark.slow
def test_help_and_errors_of_a_process_without_a_cache(tmp_path):
    process = launched("camelyon17", ["--help"])
    assert "--center {0,1,2,3,4}" in finished(process)
    process = launched("camelyon17", [], HF_HOME=str(tmp_path))
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "`hf download wltjr1007/Camelyon17-WILDS --repo-type dataset --local-dir DIR`" in output
