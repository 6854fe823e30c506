"""The CIFAR-10-C recipe on tiny data in its exact layouts, and (slow) one short run of the real thing."""

import functools
import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scripts import script

from paper import cifar, cifar_networks
from peft_surgical.errors import DataError
from peft_surgical.evaluation import Report, accuracy, predict_logits
from peft_surgical.training.ledger import Ledger

datasets = pytest.importorskip("datasets")
pillow = pytest.importorskip("PIL.Image")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

RECIPE = Path(__file__).parents[1] / "recipes" / "cifar10c.py"
SHARED = Path(os.environ.get("PEFT_SURGICAL_SHARED", Path(__file__).parents[2] / "shared"))
SMALL = ["--tuning-images", "20", "--validation-images", "10", "--epochs", "1", "--batch-size", "10", "--cpu"]


@pytest.fixture(scope="module")
def recipe():
    return script("recipes", "cifar10c.py")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with an untrained network and 50 images, clean and in two corruptions."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    file = root / "models" / cifar_networks.NETWORKS["resnet26"].checkpoint / "model.safetensors"
    file.parent.mkdir(parents=True)
    save_file(cifar_networks.ResNet26().state_dict(), file)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    for seed, name in enumerate(("clean", "frost", "snow")):
        cells = []
        for array in np.random.default_rng(seed).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8):
            buffer = io.BytesIO()
            pillow.fromarray(array).save(buffer, format="PNG")
            cells.append({"bytes": buffer.getvalue(), "path": None})
        rows = {"img": cells, "label": [i % 10 for i in range(50)]}
        (root / "data").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(root / "data" / f"{name}.parquet")
    return root


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny batches: threads that wait for each other would be most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def here(recipe, monkeypatch):
    """Reload in this process: a fresh interpreter per test is for the slow tier."""
    monkeypatch.setattr(recipe, "RELOADER", functools.cache(lambda: ThreadPoolExecutor(1)))


def arguments(world, output, *more):
    return ["--models", str(world), "--data", str(world / "data"), "--output", str(output), *SMALL, *more]


def test_grid_resumes_and_draws(recipe, here, world, tmp_path, capsys, monkeypatch):
    grid = arguments(world, tmp_path, "--target", "none", "head", "--head-lr", "0.1", "0.01", "--seeds", "0", "1")
    recipe.main([*grid, "--shard", "1/2"])
    assert "-> " in capsys.readouterr().out
    recipe.main([*grid, "--shard", "2/2", "--markdown", str(tmp_path / "table.md")])
    ledger = Ledger(tmp_path / "ledger.jsonl")
    # Per corruption: two seeds without tuning; two learning rates on seed 0 and the chosen one on seed 1.
    assert len(ledger) == 2 * (2 + 3)

    for corruption in ("frost", "snow"):
        runs = ledger.runs(corruption=corruption, target="head")
        assert {run.result["reload"] for run in runs} == {"bit-equal in a new process"}
        assert {run.result["trainable"] for run in runs} == {650}
        best = max(runs[:2], key=lambda run: run.result["validation"]).key["lr"]
        chosen = [run for run in runs if run.key["lr"] == best]
        report = Report.load(tmp_path / "reports" / f"resnet26-{corruption}-head.json")
        measured = report.find("accuracy", f"CIFAR-10-C {corruption}, severity 5")
        assert measured.value == pytest.approx(sum(run.result["test"] for run in chosen) / 2)
        assert (measured.n, measured.seeds, measured.selection) == (20, (0, 1), recipe.SELECTION)
        assert report.find("accuracy", "clean, before tuning").selection == "none"
        assert report.settings["adapters"] == [run.result["adapter"] for run in chosen]
        file = tmp_path / "adapters" / chosen[0].result["adapter"] / "adapter_model.safetensors"
        assert sum(t.numel() for t in load_file(file).values()) == 650
    table = (tmp_path / "table.md").read_text()
    first, _, *rows = table.splitlines()[:4]
    assert first == "| target | frost | snow | mean | clean, mean |"
    assert [row.split(" | ")[0] for row in rows] == ["| none", "| head"]
    assert all(row.count("±") + row.count(".") >= 4 for row in rows)
    assert "n = 20 test images per seed" in table
    assert recipe.SELECTION in table
    assert (tmp_path / "resnet26.png").stat().st_size > 1000

    def train(*_):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(recipe, "run", train)
    recipe.main([*grid, "--markdown", str(tmp_path / "again.md")])
    assert (tmp_path / "again.md").read_text() == table
    # The table from the ledger alone: no data, corruptions as found there.
    without_data = [argument for argument in grid if argument not in {"--data", str(world / "data")}]
    recipe.main([*without_data, "--table", "--markdown", str(tmp_path / "alone.md")])
    assert (tmp_path / "alone.md").read_text() == table


def test_dry_run_trains_nothing(recipe, world, tmp_path, capsys):
    recipe.main(arguments(world, tmp_path, "--target", "none", "block1", "--seeds", "0", "1", "2", "--dry-run"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["frost none: 0 runs finished, 3 in all", "frost block1: 0 runs finished, 5 in all"]
    assert len(lines) == 4
    assert not list(tmp_path.iterdir())


def test_a_reload_that_differs_stops_the_run(recipe, here, world, tmp_path, monkeypatch):
    real = recipe.reload_logits
    monkeypatch.setattr(recipe, "reload_logits", lambda *a: [x + 1e-6 for x in real(*a)])
    with pytest.raises(RuntimeError, match=r"does not reload to what was evaluated: on test, logits differ by up to"):
        recipe.main(arguments(world, tmp_path, "--target", "head", "--head-lr", "0.1", "--corruption", "frost"))
    assert not (tmp_path / "ledger.jsonl").exists()


def test_weight_decay_pulls_the_delta_and_the_best_epoch_is_kept(recipe, world, tmp_path):
    """With a decay that dwarfs the gradient, Adam moves the delta back to zero: L2-SP, not the paper's form."""
    images, _ = recipe.read_once(str(world / "data"), "frost", 5)
    parts = [cifar.Images(images.pixels[rows], images.labels[rows]) for rows in cifar.split(images.labels, 0, 20, 10)]
    norms = []
    for decay in ("0", "1e6"):
        args = recipe.parse_arguments(arguments(world, tmp_path, "--weight-decay", decay, "--epochs", "3"))
        model, epoch, curve = recipe.tune(args, {"target": "head", "lr": 1e-2, "seed": 0}, *parts[:2])
        assert 1 <= epoch <= 3
        logits = predict_logits(model, cifar_networks.normalise(parts[1].pixels, "resnet26"))
        assert accuracy(logits, parts[1].labels) == max(curve) == curve[epoch - 1]
        norms.append(sum(p.detach().norm() for p in model.parameters() if p.requires_grad))
    assert 0 < norms[1] < norms[0]


def test_a_table_of_nothing_says_so(recipe, world, tmp_path, capsys):
    recipe.main(arguments(world, tmp_path, "--target", "none", "head", "--table"))
    assert f"no cell is complete in {tmp_path / 'ledger.jsonl'}" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--shard", "3/2"], "--shard 3/2: write i/n with i from 1 to n"),
        (["--shard", "half"], "--shard half: write i/n"),
        (["--network", "vgg"], "invalid choice: 'vgg'"),
    ],
)
def test_bad_arguments(recipe, world, tmp_path, capsys, more, match):
    with pytest.raises(SystemExit):
        recipe.main(arguments(world, tmp_path, *more))
    assert match in capsys.readouterr().err


def test_processes_and_missing_data_are_refused(recipe, world, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        recipe.main([])
    assert "--data is needed to train" in capsys.readouterr().err
    with pytest.raises(DataError, match="holds frost only: pass the folder to have snow"):
        recipe.main(["--data", str(world / "data" / "frost.parquet"), "--corruption", "snow"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        recipe.main(arguments(world, tmp_path))
    assert "start a process for each --shard i/n instead" in capsys.readouterr().err


@pytest.mark.slow
def test_one_short_run_on_real_data(tmp_path):
    if not (SHARED / "data" / "cifar10c").is_dir():
        pytest.skip("no CIFAR-10-C data: set PEFT_SURGICAL_SHARED to the folder that holds data/ and models/")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", str(RECIPE)]
    command += ["--data", str(SHARED / "data" / "cifar10c"), "--models", str(SHARED), "--corruption", "gaussian_noise"]
    command += ["--target", "none", "block1", "--lr", "1e-3", "--epochs", "2", "--output", str(tmp_path), "--cpu"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    none, block1 = [json.loads(line)["result"] for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert none["test"] == none["test_before"] == block1["test_before"]
    assert none["n"] == 800
    # 53 % without adaptation; two epochs of block 1 give about 74 %.
    assert abs(none["test"] - 0.531) < 0.03
    assert block1["test"] > 0.68
    assert block1["reload"] == "bit-equal in a new process"
    assert block1["bytes"] < 19120 * 4 + 16384
