"""The recipe by the names of transformers' example script: what it leaves behind, and what loads that."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import hub  # noqa: F401 (a fixture)
from scripts import script
from tiny import native_adapters

pytest.importorskip("datasets")
PIL = pytest.importorskip("PIL.Image")
pytest.importorskip("timm")  # which test_pages needs
yaml = pytest.importorskip("yaml")

from test_pages import SKILL, run_page, shown_commands  # noqa: E402
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, pipeline  # noqa: E402

import peft_surgical.errors  # noqa: E402
from peft_surgical.adapters.adapter import read_config  # noqa: E402
from peft_surgical.errors import ConfigError  # noqa: E402
from peft_surgical.evaluation import Report  # noqa: E402
from peft_surgical.hub import open_adapted  # noqa: E402
from peft_surgical_cli import app as cli  # noqa: E402

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "run_image_classification.py"
NAMES = ("daisy", "rose", "tulip")


def write_photos(folder, names=NAMES, count=6):
    generator = torch.Generator().manual_seed(count)
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = torch.randint(0, 80, (20, 20, 3), generator=generator, dtype=torch.uint8)
            pixels[..., number % 3] += 150
            PIL.fromarray(pixels.numpy()).save(folder / name / f"{i}.png")


def write_base(folder, names=NAMES):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    ViTForImageClassification(ViTConfig(**size, image_size=16, patch_size=8, **labels)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classification")
    write_photos(folder / "flowers")
    write_base(folder / "base")
    write_base(folder / "others", ("cat", "dog"))
    return folder


@pytest.fixture(scope="module")
def recipe():
    return script("recipes", "run_image_classification.py")


def line(place, output, *more, base="base"):
    words = ["--model_name_or_path", place / base, "--train_dir", place / "flowers", "--output_dir", output]
    words += ["--num_train_epochs", 2, "--per_device_train_batch_size", 4, "--learning_rate", 0.05, "--seed", 1]
    return [str(word) for word in (*words, "--do_train", "--do_eval", "--use_cpu", "--disable_tqdm", True, *more)]


@pytest.fixture(scope="module")
def tuned(place, recipe):
    recipe.main(line(place, place / "tuned", "--target", "block2 + head"))
    return place / "tuned"


def test_the_folder_holds_the_adapter_the_processor_and_the_numbers(tuned):
    files = {path.name for path in tuned.iterdir() if path.is_file()}
    assert {"adapter_model.safetensors", "adapter_config.json", "preprocessor_config.json", "report.json"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]  # Trainer's are in its checkpoints
    report = Report.load(tuned / "report.json")
    found = json.loads((tuned / "eval_results.json").read_text())
    assert report.find("accuracy", "validation").value == pytest.approx(found["eval_accuracy"])
    assert report.find("accuracy").n == 3  # a fifth of six for each of three classes
    assert read_config(tuned).target == "block2 + head"


@native_adapters
def test_transformers_pipeline_takes_the_folder_and_gives_what_was_tuned(tuned, place):
    image = PIL.open(place / "flowers" / "rose" / "0.png")
    adapted = open_adapted(tuned)
    expected = adapted.logits(image).softmax(-1)
    with torch.no_grad(), adapted.model.disable_adapter():
        before = adapted.logits(image).softmax(-1)
    assert not torch.allclose(before, expected, atol=1e-3)
    found = {one["label"]: one["score"] for one in pipeline("image-classification", model=str(tuned))(image)}
    assert set(found) == set(NAMES)
    assert [found[name] for name in NAMES] == pytest.approx(expected.tolist(), abs=1e-6)


def test_a_new_head_is_asked_for_and_its_names_travel_with_the_adapter(recipe, place):
    with pytest.raises(ConfigError, match='head="keep"'):
        recipe.main(line(place, place / "refused", "--target", "block1", base="others"))
    folder = place / "new"
    recipe.main(line(place, folder, "--target", "block1", "--ignore_mismatched_sizes", base="others"))
    adapted = open_adapted(folder)
    assert adapted.label_names == NAMES
    image = PIL.open(place / "flowers" / "daisy" / "0.png")
    ask = pipeline("image-classification", model=adapted.model.get_base_model(), image_processor=str(folder))
    found = {one["label"]: one["score"] for one in ask(image)}
    assert [found[name] for name in NAMES] == pytest.approx(adapted.logits(image).softmax(-1).tolist(), abs=1e-6)


def test_scores_choose_the_block_and_a_folder_of_its_own_validates(recipe, place, capsys):
    write_photos(place / "valid", count=2)
    more = ("--validation_dir", place / "valid", "--max_train_samples", 12, "--eval_strategy", "epoch")
    best = ("--save_strategy", "epoch", "--load_best_model_at_end", "--metric_for_best_model", "accuracy")
    recipe.main(line(place, place / "scored", *more, *best))
    out = capsys.readouterr().out
    assert "tuning: 12 images" in out
    assert "validation: 6 images (given" in out
    selection = read_config(place / "scored").selection
    assert (selection["asked"], selection["criterion"]) == ("auto-rgn", "rgn")
    chosen = max(selection["block_scores"], key=selection["block_scores"].get)
    assert read_config(place / "scored").target == chosen
    assert "epoch by validation" in Report.load(place / "scored" / "report.json").find("accuracy").selection


@pytest.mark.slow
def test_the_prefix_changes_no_number(recipe, place):
    for cache in ("True", "False"):
        recipe.main(line(place, place / f"cache{cache}", "--target", "block3", "--cache_prefix", cache))
    one, other = (place / f"cache{cache}" / "adapter_model.safetensors" for cache in ("True", "False"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--push_to_hub",), "--push_to_hub: say where with --hub_model_id"),
        (("--dataset_name", "me/flowers"), "--dataset_name or --train_dir, one of them"),
        (("--target", "block9"), "block9"),
    ],
)
def test_what_cannot_be_is_refused_in_words(recipe, place, more, message):
    with pytest.raises((ConfigError, KeyError), match=re.escape(message)):
        recipe.main(line(place, place / "never", *more))


@pytest.mark.slow
def test_it_is_pushed_once_at_the_end(recipe, place, hub):  # noqa: F811
    hub.add("me/base", {file.name: file.read_bytes() for file in (place / "base").iterdir()})
    words = line(place, place / "pushed", "--target", "block1", "--push_to_hub", "--hub_model_id", "me/site")
    words[words.index(str(place / "base"))] = "me/base"
    with pytest.warns(UserWarning, match="says nothing of license"):
        recipe.main(words)
    files = hub.repos["me/site"].files()
    assert {"adapter_model.safetensors", "base.json", "preprocessor_config.json", "report.json"} <= set(files)
    assert open_adapted("me/site").label_names == NAMES


@native_adapters
def test_the_command_tune_takes_the_same_words(place, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    words = line(place, place / "command", "--target", "block2", "--report_to", "tensorboard")
    words = words[: words.index("--disable_tqdm")] + words[words.index("--disable_tqdm") + 2 :]
    assert cli.run(["tune", *words]) == 0, capsys.readouterr().err
    report = Report.load(place / "command" / "report.json")
    assert report.settings["seed"] == 1
    assert report.settings["lr"] == 0.05
    assert (report.settings["epochs"], report.settings["batch_size"]) == (2, 4)
    assert list((place / "command" / "logs" / "block2-lr0.05-seed1").glob("events.out.tfevents.*"))
    image = PIL.open(place / "flowers" / "tulip" / "0.png")
    adapted = open_adapted(place / "command")
    ask = pipeline("image-classification", model=str(place / "command"), image_processor=str(place / "command"))
    found = {one["label"]: one["score"] for one in ask(image)}
    assert [found[name] for name in NAMES] == pytest.approx(adapted.logits(image).softmax(-1).tolist(), abs=1e-6)


@native_adapters
def test_the_page_on_serving_runs(place, tuned, monkeypatch, capsys):
    (place / "flowers" / "daisy" / "0.png").rename(place / "flowers" / "daisy" / "0001.jpg")  # Pillow reads what it is
    try:
        scope = run_page("docs/serving.md", place, monkeypatch)
    finally:
        (place / "flowers" / "daisy" / "0001.jpg").rename(place / "flowers" / "daisy" / "0.png")
    first, second = capsys.readouterr().out.splitlines()
    assert first == second  # by the pipeline alone, and through this package
    assert {one["label"] for one in scope["ask"](scope["image"])} == set(NAMES)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")
def test_the_example_for_peft_trains_saves_and_loads(place, tmp_path, monkeypatch, capsys):
    example = script("recipes", "surgical_finetuning", "surgical_finetuning.py")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = ["--base_model", place / "others", "--data", place / "flowers", "--target", "block2", "--epochs", 1]
    example.main([str(word) for word in (*words, "--output_dir", tmp_path / "adapter", "--batch_size", 8)])
    assert "same logits, bit for bit" in capsys.readouterr().out
    assert read_config(tmp_path / "adapter").target == "block2"
    assert (tmp_path / "adapter" / "preprocessor_config.json").is_file()


def test_the_examples_page_runs(tmp_path, monkeypatch):
    scope = run_page("recipes/surgical_finetuning/README.md", tmp_path, monkeypatch)
    assert scope["model"].active_peft_config.target == "block1"


@pytest.mark.slow
def test_what_the_skill_says_runs(place, tmp_path, monkeypatch, capsys):
    """Its commands from top to bottom, literally, in a folder that holds BASE and PHOTOS; then its Python."""
    shutil.copytree(place / "base", tmp_path / "BASE")
    write_photos(tmp_path / "PHOTOS", count=12)
    monkeypatch.chdir(tmp_path)
    commands = list(shown_commands(ROOT / SKILL))
    assert [words[0] for words in commands] == ["blocks", "score", "tune", "show", "merge"]
    for words in commands:
        if words[0] == "tune":
            words = [*words, "--epochs", "2", "--cpu", "--target", "block1", "--lr", "1e-3"]
        assert cli.run(words) == 0, capsys.readouterr().err
    scope = run_page(SKILL, tmp_path, monkeypatch)
    assert scope["model"].active_peft_config.target == "block1"
    assert scope["report"].find("accuracy", "test").n == 6


def test_the_skill_has_a_name_and_says_when_to_use_it():
    head = yaml.safe_load((ROOT / SKILL).read_text(encoding="utf-8").split("---")[1])
    assert head["name"] == (ROOT / SKILL).parent.name
    assert 100 < len(head["description"]) <= 1024
    errors = re.findall(r"`(\w+Error)`", (ROOT / SKILL).read_text(encoding="utf-8"))
    assert {"BaseMismatchError", "UnknownTargetError"} <= set(errors)
    assert all(hasattr(peft_surgical.errors, name) for name in errors)


def test_its_header_brings_this_clone_and_the_documented_options_exist():
    text = RECIPE.read_text(encoding="utf-8")
    tomllib = pytest.importorskip("tomllib")
    (block,) = re.findall(r"^# /// script\n((?:#.*\n)+?)# ///$", text, re.MULTILINE)
    header = tomllib.loads("\n".join(one[2:] for one in block.splitlines()))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert header["requires-python"] == project["requires-python"]
    (name, extra) = re.fullmatch(r"(.+)\[(\w+)\]", *header["dependencies"]).groups()
    assert name == project["name"]
    assert extra in project["optional-dependencies"]
    assert (RECIPE.parent / header["tool"]["uv"]["sources"][name]["path"]).resolve() == ROOT


@pytest.mark.slow
def test_its_help_shows_the_names_of_transformers_script():
    done = subprocess.run([sys.executable, str(RECIPE), "--help"], capture_output=True, text=True, check=True)
    for name in ("model_name_or_path", "dataset_name", "train_val_split", "per_device_train_batch_size", "target"):
        assert f"--{name}" in done.stdout
