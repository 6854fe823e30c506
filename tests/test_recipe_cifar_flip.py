"""CIFAR-Flip: the images in every layout, the split of the other CIFAR recipes, and the recipe on tiny data."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

for needed in ("datasets", "PIL.Image", "rich", "matplotlib"):
    pytest.importorskip(needed)

import datasets  # noqa: E402
import PIL.Image  # noqa: E402
from miniatures import cache_changes_nothing, results_in  # noqa: E402
from peft import PeftModel  # noqa: E402
from scripts import script  # noqa: E402
from transformers import Trainer  # noqa: E402

from paper import cifar, cifar_networks  # noqa: E402
from paper.cifar_tasks import read_cifar  # noqa: E402
from peft_surgical.data.labelled import items  # noqa: E402
from peft_surgical.errors import ConfigError, DataError  # noqa: E402
from peft_surgical.evaluation import Report, accuracy  # noqa: E402
from peft_surgical.training.ledger import Ledger  # noqa: E402

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "cifar_flip.py"
SHARED = Path(os.environ.get("PEFT_SURGICAL_SHARED", ROOT.parent / "shared"))
PIXELS = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
LABELS = np.random.default_rng(1).permutation(np.arange(60) % 10)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no accelerator is found.*"),
    pytest.mark.usefixtures("own_datasets_cache"),
]


@pytest.fixture(scope="module")
def recipe():
    return script("recipes", "cifar_flip.py")


def table(rows=60):
    """As uoft-cs/cifar10."""
    cells = []
    for pixels in PIXELS[:rows]:
        buffer = io.BytesIO()
        PIL.Image.fromarray(pixels).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(cifar.CLASSES))})
    return datasets.Dataset.from_dict({"img": cells, "label": LABELS[:rows].tolist()}, features=features)


def binary(file, labels=LABELS):
    """As cifar-10-batches-bin: the label, then red, green and blue."""
    file.parent.mkdir(parents=True)
    records = [
        bytes([label]) + pixels.transpose(2, 0, 1).tobytes() for label, pixels in zip(labels, PIXELS, strict=True)
    ]
    file.write_bytes(b"".join(records))
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """60 images in every layout, and the weights of an untrained ResNet-26."""
    root = tmp_path_factory.mktemp("flip")
    (root / "shared").mkdir()
    table().to_parquet(root / "shared" / "clean.parquet")
    (root / "hub" / "plain_text").mkdir(parents=True)
    table().to_parquet(root / "hub" / "plain_text" / "test-00000-of-00001.parquet")
    table(20).to_parquet(root / "hub" / "plain_text" / "train-00000-of-00001.parquet")
    binary(root / "published" / "cifar-10-batches-bin" / "test_batch.bin")
    weights = root / "models" / cifar_networks.NETWORKS["resnet26"].checkpoint / "model.safetensors"
    weights.parent.mkdir(parents=True)
    torch.manual_seed(0)
    save_file(cifar_networks.ResNet26().state_dict(), weights)
    return root


def column(part, name):
    return part.select_columns([name])[name][:]


# --- data ---


def test_every_layout_is_the_same_data(place, monkeypatch):
    sizes = {"tuning": 20, "validation": 10}
    published = place / "published"
    places = ["shared", "shared/clean.parquet", "hub", "published", "published/cifar-10-batches-bin"]
    places.append("published/cifar-10-batches-bin/test_batch.bin")
    found = [read_cifar("flip", place / name, seed=3, **sizes) for name in places]
    monkeypatch.setattr(datasets, "load_dataset", lambda repo, split: {"test": table()}[split])
    found.append(read_cifar("flip", "uoft-cs/cifar10", seed=3, **sizes))
    assert published.is_dir()
    for data in found:
        assert data.fingerprint == found[0].fingerprint
        assert {name: len(part) for name, part in data.parts.items()} == {"tuning": 20, "validation": 10, "test": 30}
        assert data.label_names == data.group_names == cifar.CLASSES
        assert data.source is None
    assert found[0].origin["tuning"] == "drawn: seed 3, 2 of each class"


def test_labels_are_flipped_and_images_are_not(place):
    data = read_cifar("flip", place / "shared", seed=5, tuning=20, validation=10)
    rows = {row for part in data.parts.values() for row in column(part, "file")}
    assert rows == {f"row {i}" for i in range(60)}
    for part in data.parts.values():
        dataset = items(part, lambda image: torch.from_numpy(np.array(image)))
        for i, (file, group) in enumerate(zip(column(part, "file"), column(part, "group"), strict=True)):
            row = int(file.split()[1])
            assert np.array_equal(dataset[i]["pixel_values"].numpy(), PIXELS[row])
            assert dataset[i]["labels"] == 9 - LABELS[row] == 9 - group


def test_the_split_is_that_of_the_comparison(place):
    data = read_cifar("flip", place / "shared", seed=2, tuning=20, validation=10)
    drawn = cifar.split(torch.from_numpy(9 - LABELS), 2, 20, 10)
    for part, rows in zip(("tuning", "validation", "test"), drawn, strict=True):
        assert column(data.parts[part], "file") == [f"row {row}" for row in rows.tolist()]
    assert np.bincount(column(data.tuning, "label")).tolist() == [2] * 10


def test_fingerprints_tell_images_and_draws_apart(place, tmp_path):
    sizes = {"tuning": 20, "validation": 10}
    one, other = (read_cifar("flip", place / "shared", seed=seed, **sizes).fingerprint for seed in (0, 1))
    assert one != other
    changed = PIXELS.copy()
    changed[0, 0, 0, 0] ^= 1
    with mock.patch(f"{__name__}.PIXELS", changed):
        table().to_parquet(tmp_path / "clean.parquet")
    assert read_cifar("flip", tmp_path, seed=0, **sizes).fingerprint != one


def test_what_is_no_cifar10(place, tmp_path):
    with pytest.raises(
        DataError, match=r"holds neither test_batch.bin nor clean.parquet nor one parquet file of a test"
    ):
        read_cifar("flip", tmp_path)
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"\x80\x03")
    with pytest.raises(
        DataError, match=r"the Python version of CIFAR-10, which are pickles, and none are opened: bring"
    ):
        read_cifar("flip", tmp_path)
    whole = binary(tmp_path / "cut" / "test_batch.bin")
    whole.write_bytes(whole.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"has 184379 bytes, no multiple of 3,073: it is not whole"):
        read_cifar("flip", whole)
    part = binary(tmp_path / "part" / "test_batch.bin", labels=LABELS % 4)
    with pytest.raises(DataError, match=r"has the labels 0, 1, 2, 3: CIFAR-10's are 0 to 9"):
        read_cifar("flip", part)
    with pytest.raises(DataError, match=r"25 tuning and 200 validation images do not divide evenly over 10 classes"):
        read_cifar("flip", place / "shared", tuning=25)
    with pytest.raises(DataError, match=r"nothing here does not exist: pass a parquet file"):
        read_cifar("flip", "nothing here")


# --- the recipe ---


def words(place, output, *more):
    given = ["--data", place / "shared", "--models", place / "models", "--output", output, "--cpu", "--seeds", "0"]
    given += ["--tuning-images", "20", "--validation-images", "10", "--batch-size", "10", *more]
    return [str(word) for word in given]


def test_from_end_to_end(recipe, place, tmp_path):
    recipe.main(words(place, tmp_path, "--target", "head", "--epochs", "2", "--head-lr", "0.1", "0.01"))
    report = Report.load(tmp_path / "report.json")
    assert report == Report.load(tmp_path / "adapter" / "report.json")
    base = cifar_networks.open_network(str(place / "models"), report.model, **report.settings["open"])
    model = PeftModel.from_pretrained(base.model, tmp_path / "adapter").eval()
    # By hand: the pixels as they are published, and 9 - y.
    rows = cifar.split(torch.from_numpy(9 - LABELS), 0, 20, 10).test
    inputs = cifar_networks.normalise(torch.from_numpy(PIXELS).permute(0, 3, 1, 2)[rows], "resnet26")
    with torch.no_grad(), model.disable_adapter():
        before = model(inputs)
    with torch.no_grad():
        after = model(inputs)
    labels = torch.from_numpy(9 - LABELS)[rows]
    assert report.find("accuracy of none").value == accuracy(before, labels)
    assert report.find("accuracy of head").value == accuracy(after, labels)
    assert not torch.equal(before, after)
    assert sum(delta.numel() for delta in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()) == 650
    rates = {run.key["lr"] for run in Ledger(tmp_path / "ledger.jsonl").runs(method="head")}
    assert rates == {0.1, 0.01}
    assert "| none |" in (tmp_path / "table.md").read_text()


def test_help_and_plan(recipe, place, tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        recipe.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "accelerate launch recipes/cifar_flip.py" in said
    assert "default: 15 (paper, A.4)" in said
    (tmp_path / "models").mkdir()  # the plan needs no weights
    with mock.patch.object(Trainer, "train", side_effect=AssertionError):
        recipe.main(words(place, tmp_path / "out", "--dry-run", "--models", tmp_path / "models"))
    said = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert "one run: 30 steps (adam, constant rate, batch 10, 15 epochs)" in said
    assert "full: 77 tensors, 366,938 parameters (100.0%); rates 0.001, 0.0001, 1e-05; the paper: 85.9 %" in said
    assert "cross-val: the one of block1, block2, block3, head that validates best; the paper: 93.8 %" in said


def test_the_measured_numbers_are_those_of_the_results():
    """The docstring's, against the tables that it names."""
    said = RECIPE.read_text()
    for network, name in (("resnet26", "ResNet-26"), ("resnet32", "ResNet-32")):
        table = (ROOT / "docs" / "results" / f"compare-flip-{network}.md").read_text().splitlines()
        cells = [line.strip("| ").split(" | ") for line in table if line.startswith("| ")][2:]
        found = {row: mean.split(" ")[0] for row, mean, *_ in cells}
        shown = ("none", "all", "gradual-first-last", "gradual-last-first", "l1-sp", "auto-snr", "auto-rgn")
        (line,) = [line for line in said.splitlines() if line.strip().startswith(f"{name} ")]
        assert line.split()[1:] == [found[row] for row in (*shown, "cross-val")]
        assert found["block1"] in said
        assert found["head"] in said


def test_other_networks_and_what_is_refused(recipe, place, tmp_path, monkeypatch):
    with pytest.raises(
        ConfigError, match=r"--augment crop: resnet26 takes its 32 x 32 images as they are, choose none"
    ):
        recipe.main(words(place, tmp_path, "--augment", "crop", "--target", "head"))
    with pytest.raises(DataError, match=r"no weights for 'resnet26': put them at") as error:
        recipe.main(words(place, tmp_path, "--models", tmp_path, "--target", "head"))
    assert "hf download" not in str(error.value)
    asked = []
    monkeypatch.setattr(cifar_networks, "load_base", lambda name, **how: asked.append((name, how)))
    cifar_networks.open_network(None, "me/vit-cifar10", weights="random", head="new")
    assert asked == [("me/vit-cifar10", {"weights": "random", "head": "new"})]


# --- real processes and real data ---


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_killed_and_launched_again(recipe, place, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", str(RECIPE)]
    more = ("--target", "head", "block1", "--epochs", "8", "--lr", "1e-2", "--head-lr", "0.1", "0.01")
    asked = words(place, tmp_path / "killed", *more)
    process = subprocess.Popen([*command, *asked], env=environment(), start_new_session=True)
    end = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < end and not any((tmp_path / "killed").rglob("complete.json")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
    assert not (tmp_path / "killed" / "report.json").exists()
    done = subprocess.run([*command, *asked], env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    recipe.main(words(place, tmp_path / "whole", *more))
    for file in ("adapter/adapter_model.safetensors", "report.json"):
        one, other = ((tmp_path / name / file).read_bytes() for name in ("killed", "whole"))
        assert hashlib.sha256(one).digest() == hashlib.sha256(other).digest()
    kept = {path: path.read_bytes() for path in (tmp_path / "killed").rglob("*") if path.is_file()}
    with mock.patch.object(Trainer, "train", side_effect=AssertionError("something was trained")):
        recipe.main(asked)
    assert kept == {path: path.read_bytes() for path in (tmp_path / "killed").rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="real images and weights: set PEFT_SURGICAL_SHARED")
def test_the_recipe_gives_the_numbers_of_the_comparison(recipe, tmp_path):
    """One run on the real images and network, against the ledger behind docs/results."""
    data = ["--data", str(SHARED / "data" / "cifar10c" / "clean.parquet"), "--models", str(SHARED)]
    asked = ["--target", "head", "--head-lr", "0.1", "--model", "resnet32", "--seeds", "0", "--cpu"]
    recipe.main([*data, *asked, "--output", str(tmp_path)])
    ours = results_in(tmp_path / "ledger.jsonl")
    wanted = {"task": "flip", "network": "resnet32", "seed": 0, "tuning_images": 1000}
    with (ROOT / "docs" / "results" / "cifar10c.jsonl").open() as ledger:
        known = [one for one in map(json.loads, ledger) if wanted.items() <= one["key"].items()]
    for method, rate in (("none", None), ("head", 0.1)):
        (run,) = [one["result"] for one in known if (one["key"]["method"], one["key"]["lr"]) == (method, rate)]
        assert ours[method]["test"] == pytest.approx(run["test"], abs=0.005)
        assert ours[method]["validation"] == pytest.approx(run["validation"], abs=0.005)
        assert ours[method]["cost"] == run["cost"]


@pytest.mark.slow
def test_the_cached_prefix_changes_nothing(recipe, place, tmp_path):
    more = ("--target", "head", "block3", "--epochs", "2", "--lr", "1e-3", "--head-lr", "0.1")
    assert len(cache_changes_nothing(recipe.main, lambda folder: words(place, folder, *more), tmp_path)) == 1
