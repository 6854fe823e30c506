"""The comparison and the synthetic recipe: selection rules and costs on tiny data, short real runs in the slow tier."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from scripts import script

from paper import cifar, cifar_networks
from peft_surgical.training.ledger import Ledger

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("PEFT_SURGICAL_SHARED", ROOT.parent / "shared"))


def load(name):
    return script("recipes", f"{name}.py")


@pytest.fixture(scope="module")
def compare():
    return load("compare")


@pytest.fixture(scope="module")
def synthetic():
    return load("synthetic")


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Weights of an untrained network, and 50 random images in place of every file."""
    file = tmp_path / "models" / cifar_networks.NETWORKS["resnet26"].checkpoint / "model.safetensors"
    file.parent.mkdir(parents=True)
    save_file(cifar_networks.ResNet26().state_dict(), file)
    images = cifar.Images(torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8), torch.arange(50) % 10)
    return tmp_path, images


SETTINGS = {"network": "resnet26", "task": "frost", "tuning_images": 20, "validation_images": 10}


def fill(ledger, method, **by_lr_and_seed):
    """Runs of one method: name lr0_seed -> (validation, test)."""
    for name, (validation, test) in by_lr_and_seed.items():
        lr, seed = name.removeprefix("lr").split("_")
        key = {"recipe": "compare", **SETTINGS, "method": method, "epochs": 15, "batch_size": 64, "weight_decay": 1e-4}
        key |= {"lr": None if lr == "None" else float(lr.replace("m", "e-")), "seed": int(seed)}
        ledger.append(key, {"validation": validation, "test": test, "cost": 0.0 if method == "none" else 100.0})


def arguments(compare, tmp_path, *extra):
    out = ["--table", "--network", "resnet26", "--tasks", "frost", "--seeds", "0", "1", "--tuning-images", "20"]
    out += ["--validation-images", "10", "--output", str(tmp_path), "--markdown", str(tmp_path / "table.md"), *extra]
    return out


def test_cross_val_takes_each_targets_rate_from_seed_0_and_the_target_from_each_seed(compare, tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    fill(ledger, "none", lrNone_0=(0.2, 0.20), lrNone_1=(0.9, 0.21))  # on seed 1 nothing beats no tuning
    fill(ledger, "block1", lr1m3_0=(0.5, 0.50), lr1m4_0=(0.6, 0.60), lr1m4_1=(0.4, 0.61))
    for block in ("block2", "block3", "all"):
        fill(ledger, block, lr1m3_0=(0.3, 0.99), lr1m4_0=(0.1, 0.99), lr1m3_1=(0.3, 0.99))
    fill(ledger, "head", lr1m1_0=(0.3, 0.99), lr1m2_0=(0.1, 0.99), lr1m1_1=(0.3, 0.99))
    compare.main(arguments(compare, tmp_path, "--methods", "none", "block1", "cross-val"))
    text = (tmp_path / "table.md").read_text()
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}
    assert "| 60.5 ± 6.4 |" in rows["block1"]  # the rate that validates best on seed 0, although it tests no better
    assert "| 40.5 ±" in rows["cross-val"]  # block1 on seed 0 (60.0), none on seed 1 (21.0), never the 99
    assert rows["cross-val"].rstrip(" |").endswith("500")  # five trained targets of 100 each
    assert "no test image had a say" in text


def test_a_missing_run_leaves_its_cell_and_the_mean_empty(compare, tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    fill(ledger, "block1", lr1m3_0=(0.5, 0.5), lr1m4_0=(0.6, 0.6))  # seed 1 is missing
    compare.main(arguments(compare, tmp_path, "--methods", "block1"))
    assert "| block1 | - | - | - | - |" in (tmp_path / "table.md").read_text()


def test_a_method_without_a_finished_cell_leaves_the_others_their_means(compare, tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for block, better in (("block1", 0.0), ("block2", 0.1)):
        runs = {"lr1m3_0": (0.5, 0.5 + better), "lr1m3_1": (0.5, 0.5 + better), "lr1m4_0": (0.1, 0.1)}
        fill(ledger, block, **runs)
    fill(ledger, "l2-sp", lr1m3_0=(0.9, 0.9))
    compare.main(arguments(compare, tmp_path, "--methods", "block1", "l2-sp", "block2"))
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[2:5] == [
        "| block1 | 50.0 ± 0.0 | 50.0 ± 0.0 | 2.0 | 100 |",
        "| l2-sp | - | - | - | - |",
        "| block2 | 60.0 ± 0.0 | 60.0 ± 0.0 | 1.0 | 100 |",
    ]


def test_export_copies_the_runs_behind_the_table_and_no_others(compare, tmp_path, capsys):
    ledger, exported = Ledger(tmp_path / "ledger.jsonl"), Ledger(tmp_path / "exported" / "runs.jsonl")
    fill(ledger, "none", lrNone_0=(0.2, 0.20), lrNone_1=(0.9, 0.21), lrNone_2=(0.2, 0.2))  # seed 2 is not asked for
    fill(ledger, "block1", lr1m3_0=(0.5, 0.50), lr1m4_0=(0.6, 0.60), lr1m4_1=(0.4, 0.61), lr1m3_1=(0.9, 0.9))
    for block in ("block2", "block3", "all"):
        fill(ledger, block, lr1m3_0=(0.3, 0.4), lr1m4_0=(0.1, 0.1), lr1m3_1=(0.3, 0.4), lr1m5_0=(0.9, 0.9))
    fill(ledger, "head", lr1m1_0=(0.3, 0.4), lr1m2_0=(0.1, 0.1), lr1m1_1=(0.3, 0.4))
    fill(ledger, "l2-sp", lr1m3_0=(0.3, 0.4))  # not finished
    auto = {"recipe": "compare", **SETTINGS, "method": "auto", "lr": None, "epochs": 15, "batch_size": 64}
    auto |= {"weight_decay": 1e-4, "grid": [[1e-3, 1e-4], [1e-1, 1e-2]]}
    rungs = [*compare.AUTO_RUNGS, compare.AUTO_KEEP]
    for seed in (0, 1):
        result = {"validation": 0.5, "test": 0.5, "cost": 200.0, "chosen": "all at 0.001", "trials": {"none": 0.2}}
        ledger.append({**auto, "seed": seed, "rungs": rungs}, result)
        ledger.append(
            {**auto, "seed": seed}, {**result, "test": 0.9}
        )  # raced on other rungs, before they were a setting
        stopped = {**SETTINGS, "recipe": "compare race", "method": "all", "lr": 1e-3, "seed": seed, "stop": rungs[0]}
        ledger.append(stopped, {"validation": 0.3, "cost": 40.0})
    methods = ["--methods", "none", "cross-val", "auto", "l2-sp"]
    compare.main(arguments(compare, tmp_path, *methods, "--export", str(exported.file)))
    assert "runs.jsonl; not finished: l2-sp on frost" in " ".join(capsys.readouterr().out.split())
    kept = [(run.key["method"], run.key["lr"], run.key["seed"]) for run in exported]
    blocks = [(block, lr, seed) for block in ("block2", "block3") for lr, seed in ((1e-3, 0), (1e-4, 0), (1e-3, 1))]
    assert sorted(kept, key=str) == sorted(
        [
            *[("none", None, 0), ("none", None, 1), ("auto", None, 0), ("auto", None, 1)],
            *[("block1", 1e-3, 0), ("block1", 1e-4, 0), ("block1", 1e-4, 1), *blocks],
            *[("head", 1e-1, 0), ("head", 1e-2, 0), ("head", 1e-1, 1)],
            *[("all", 1e-3, 0), ("all", 1e-4, 0), ("all", 1e-3, 1)],
        ],
        key=str,
    )
    assert {run.key["recipe"] for run in exported} == {"compare"}
    assert all(run.key["rungs"] == rungs for run in exported.runs(method="auto"))

    table = (tmp_path / "table.md").read_text()
    again = [*arguments(compare, tmp_path, *methods), "--ledger", str(exported.file)]
    compare.main(again)
    assert (tmp_path / "table.md").read_text() == table
    before = exported.file.read_bytes()
    compare.main(arguments(compare, tmp_path, *methods, "--export", str(exported.file)))
    assert exported.file.read_bytes() == before  # added once
    fill(ledger, "l2-sp", lr1m4_0=(0.3, 0.4), lr1m3_1=(0.3, 0.4))
    compare.main(arguments(compare, tmp_path, "--methods", "l2-sp", "--export", str(exported.file)))
    assert exported.file.read_bytes().startswith(before)
    assert len(exported) == len(kept) + 3


def test_export_onto_the_ledger_itself_is_refused(compare, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        compare.main(arguments(compare, tmp_path, "--export", str(tmp_path / "." / "ledger.jsonl")))
    assert "is the ledger that is read: name another file" in capsys.readouterr().err


def test_cifar_flip_is_the_clean_images_with_other_labels(compare, world, monkeypatch):
    _, images = world
    seen = []
    monkeypatch.setattr(compare, "read_images", lambda place, name: seen.append(name) or images)
    compare.read.cache_clear()
    flipped, digest = compare.read("here", "flip")
    assert seen == ["clean"]
    assert torch.equal(flipped.labels, 9 - images.labels)
    assert torch.equal(flipped.pixels, images.pixels)
    assert compare.read("here", "frost")[1] != digest


def test_searches_and_methods_run_and_continue(compare, world, monkeypatch):
    folder, images = world
    monkeypatch.setattr(compare, "read_images", lambda place, name: images)
    compare.read.cache_clear()
    command = ["--tasks", "frost", "--seeds", "0", "--methods", "none", "race", "auto", "auto-rgn", "--data", "here"]
    command += ["--models", str(folder), "--tuning-images", "20", "--validation-images", "10", "--epochs", "3"]
    command += ["--batch-size", "10", "--lr", "1e-3", "--head-lr", "1e-1", "--output", str(folder / "out")]
    compare.main(command)
    runs = Ledger(folder / "out" / "ledger.jsonl").runs()
    race = next(run for run in runs if run.key["method"] == "race")
    stopped = [run for run in runs if "stop" in run.key]
    assert {run.key["method"] for run in stopped} == {"block1", "block2", "block3", "head", "all"}
    assert not any("test" in run.result for run in stopped)  # what is stopped is never tested
    assert race.result["test"] >= 0
    assert race.result["chosen"].split(" at ")[0] in {"none", *(run.key["method"] for run in stopped)}
    auto = next(run for run in runs if run.key["method"] == "auto")
    assert list(auto.result["scores"]) == ["block1", "block2", "block3", "head"]
    rgn = next(run for run in runs if run.key["method"] == "auto-rgn")
    assert len(rgn.result["factors"]) == 3
    steps, scored, looks = 3 * 2, 3 * 2, 3 * 10 / 10 / 3
    assert rgn.result["cost"] == pytest.approx(steps + scored + looks)
    assert not any((folder / "out" / "checkpoints").iterdir())
    before = (folder / "out" / "ledger.jsonl").read_bytes()
    monkeypatch.setattr(compare, "fit", None)  # everything is there
    compare.main(command)
    assert (folder / "out" / "ledger.jsonl").read_bytes() == before


def test_noise_is_drawn_for_one_block_with_a_seed(synthetic, world):
    folder, _ = world
    args = synthetic.argparse.Namespace(network="resnet26", models=str(folder), noise=0.5)
    clean = cifar_networks.load_network("resnet26", folder).state_dict()
    noisy, again, other = (synthetic.damaged(args, "block2", seed).state_dict() for seed in (0, 0, 1))
    changed = {name for name in clean if not torch.equal(clean[name], noisy[name])}
    assert {name.split(".")[0] for name in changed} == {"layer2"}
    assert all(torch.equal(noisy[name], again[name]) for name in clean)
    assert not torch.equal(noisy["layer2.1.conv1.weight"], other["layer2.1.conv1.weight"])
    added = noisy["layer2.1.conv1.weight"] - clean["layer2.1.conv1.weight"]
    size = clean["layer2.1.conv1.weight"].square().mean().sqrt()
    assert added.std().item() == pytest.approx(0.5 * size.item(), rel=0.05)


def test_synthetic_writes_its_table_and_figure(synthetic, world, monkeypatch):
    folder, images = world
    monkeypatch.setattr(synthetic, "read_images", lambda place: images)
    monkeypatch.setattr(synthetic, "split", lambda labels, seed: cifar.split(labels, seed, 20, 10))
    command = [
        "--data",
        "here",
        "--models",
        str(folder),
        "--blocks",
        "block1",
        "--methods",
        "none",
        "block1",
        "auto-rgn",
    ]
    command += ["--epochs", "1", "--lr", "1e-3", "--seeds", "0", "1", "--output", str(folder / "out")]
    synthetic.main(command)
    text = (folder / "out" / "synthetic-resnet26.md").read_text()
    assert text.startswith("| noise on | none | block1 | auto-rgn |")
    assert "| block1 | " in text
    assert (folder / "out" / "synthetic-resnet26.png").stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="real images and weights: set PEFT_SURGICAL_SHARED")
def test_a_short_real_race_finds_a_better_network(compare, tmp_path):
    command = ["--tasks", "frost", "--seeds", "0", "--methods", "none", "auto", "--data", str(SHARED / "data/cifar10c")]
    command += ["--models", str(SHARED), "--tuning-images", "100", "--epochs", "5", "--output", str(tmp_path)]
    compare.main(command)
    results = {run.key["method"]: run.result for run in Ledger(tmp_path / "ledger.jsonl").runs(recipe="compare")}
    assert results["none"]["test"] == pytest.approx(0.68, abs=0.02)
    assert results["auto"]["test"] > results["none"]["test"] + 0.03
    assert json.dumps(results["auto"]["trials"])
