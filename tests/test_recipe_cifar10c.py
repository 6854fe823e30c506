"""The CIFAR-10-C recipe on tiny data in its exact layouts, its tables from rows alone, and (slow) a short real run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from scripts import script

from paper import cifar, cifar_networks
from paper.cifar_tables import settings_of
from paper.cifar_tasks import read_cifar, with_source
from peft_surgical.bases.libraries import save_checkpoint
from peft_surgical.errors import ConfigError, DataError
from peft_surgical.evaluation import Report, accuracy, predict_logits
from peft_surgical.training.ledger import Ledger

datasets = pytest.importorskip("datasets")
pillow = pytest.importorskip("PIL.Image")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
from miniatures import cache_changes_nothing, cifar10c_files  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import Trainer  # noqa: E402

RECIPE = Path(__file__).parents[1] / "recipes" / "cifar10c.py"
SHARED = Path(os.environ.get("PEFT_SURGICAL_SHARED", Path(__file__).parents[2] / "shared"))
SMALL = ["--tuning-images", "20", "--validation-images", "10", "--epochs", "1", "--batch-size", "10", "--cpu"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no accelerator is found.*"),
    pytest.mark.usefixtures("own_datasets_cache"),
]


@pytest.fixture(scope="module")
def recipe():
    return script("recipes", "cifar10c.py")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with an untrained network and 50 images, clean and in two corruptions."""
    return cifar10c_files(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny batches: threads that wait for each other would be most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arguments(world, output, *more):
    return ["--models", str(world), "--data", str(world / "data"), "--output", str(output), *SMALL, *more]


# --- runs ---


def test_studies_leave_rows_and_adapters_and_go_on(recipe, world, tmp_path):
    asked = arguments(world, tmp_path, "--target", "head", "--head-lr", "0.1", "0.01", "--seeds", "0", "1")
    recipe.main([*asked, "--forgetting", "--markdown", str(tmp_path / "table.md")])
    rows = Ledger(tmp_path / "rows.jsonl")
    # For each corruption: two seeds without tuning; two learning rates on seed 0 and the chosen one on seed 1.
    assert len(rows) == 2 * (2 + 3)
    for task in ("frost", "snow"):
        runs = rows.runs(task=task, method="head")
        best = max(runs[:2], key=lambda run: run.result["validation"]).key["lr"]
        chosen = [run for run in runs if "test" in run.result]
        assert [(run.key["lr"], run.key["seed"]) for run in chosen] == [(best, 0), (best, 1)]
        report = Report.load(tmp_path / "resnet26" / task / "20-frozen" / "report.json")
        assert report.find("accuracy of head").value == pytest.approx(sum(run.result["test"] for run in chosen) / 2)
        assert report.find("accuracy before").dataset == f"CIFAR-10-C {task}, source"

    # By hand: the first adapter on the pixels as they are on disk.
    (run,) = [run for run in rows.runs(task="frost", method="head", seed=0) if "test" in run.result]
    folder = tmp_path / "adapters" / run.result["adapter"]
    assert sum(delta.numel() for delta in load_file(folder / "adapter_model.safetensors").values()) == 650
    model = PeftModel.from_pretrained(cifar_networks.load_network("resnet26", world), folder).eval()
    for name, key in (("frost", "test"), ("clean", "clean")):
        images = cifar.read_images(world / "data", name)
        test = cifar.split(images.labels, 0, 20, 10).test
        logits = predict_logits(model, cifar_networks.normalise(images.pixels[test], "resnet26"))
        assert run.result[key] == accuracy(logits, images.labels[test])
    assert run.result["n"] == 20
    assert run.key["data"] == cifar.digest_of(cifar.read_images(world / "data", "frost"))

    table = (tmp_path / "table.md").read_text()
    first, _, *lines = table.splitlines()[:4]
    assert first == "| target | frost | snow | mean | clean, mean |"
    assert [line.split(" | ")[0] for line in lines] == ["| none", "| head"]
    assert all("-" not in line for line in lines)
    assert "n = 20 test images per seed" in table
    before = rows.file.read_bytes()
    with mock.patch.object(Trainer, "train", side_effect=AssertionError("something was trained")):
        recipe.main([*asked, "--forgetting", "--markdown", str(tmp_path / "again.md")])
    assert rows.file.read_bytes() == before
    assert (tmp_path / "again.md").read_text() == table
    # The table from the rows alone: no data, tasks as found there.
    without_data = [argument for argument in asked if argument not in {"--data", str(world / "data")}]
    recipe.main([*without_data, "--table", "--forgetting", "--markdown", str(tmp_path / "alone.md")])
    assert (tmp_path / "alone.md").read_text() == table


def test_a_third_network_is_trained_on_photographs_that_no_corrupted_file_shows(recipe, world, tmp_path):
    clean = world / "data" / "clean.parquet"
    shown = datasets.Dataset.from_parquet(str(clean))
    generator = np.random.default_rng(9)
    others = [pillow.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(100)]
    rows = {"img": [*others, *shown["img"]], "label": [*(i % 10 for i in range(100)), *shown["label"]]}
    file = tmp_path / "photographs.parquet"
    datasets.Dataset.from_dict(rows, features=shown.features).to_parquet(file)

    data = with_source(read_cifar("clean", clean, tuning=20, validation=10), file, clean)
    assert data.source["file"] == [f"row {i}" for i in range(100)]
    with pytest.raises(DataError, match=r"shows nothing that .*clean\.parquet does not show"):
        with_source(data, clean, clean)

    overlay = {"input_size": (3, 32, 32)}
    network = timm.create_model("test_resnet", num_classes=4, pretrained_cfg_overlay=overlay)
    save_checkpoint("timm", network, tmp_path / "base", label_names=None)
    third, model = tmp_path / "third", ["--model", str(tmp_path / "base")]
    recipe.main([*model, "--train-source", str(file), "--data", str(world / "data"), "--output", str(third), *SMALL])
    assert Report.load(third / "source.json").settings["images"] == {"source": 100, "held_out": 0}
    asked = arguments(world, tmp_path / "out", "--model", str(third), "--tasks", "frost", "--target", "block1")
    recipe.main([*asked, "--lr", "1e-3", "--test-images", "10", "--seeds", "0"])
    (run,) = Ledger(tmp_path / "out" / "rows.jsonl").runs(method="block1")
    assert (run.key["network"], run.result["adapter"].split("-frost-")[0]) == ("third", "third")
    with pytest.raises(ConfigError, match="--train-source: --data, and --clean"):
        recipe.main([*model, "--train-source", str(file), "--data", str(tmp_path), "--output", str(third)])


def test_searches_and_scheduled_methods_have_rows(recipe, world, tmp_path):
    asked = arguments(world, tmp_path, "--tasks", "flip", "--target", "auto", "auto-rgn", "--seeds", "0")
    recipe.main([*asked, "--epochs", "3", "--lr", "1e-3", "--head-lr", "1e-1"])
    rows = {run.key["method"]: run for run in Ledger(tmp_path / "rows.jsonl")}
    assert set(rows) == {"none", "auto", "auto-rgn"}
    assert (rows["auto"].key["lr"], rows["auto"].key["grid"]) == (None, [[1e-3], [1e-1]])
    chosen = rows["auto"].result["chosen"].split(",")[0].split(" at ")[0]
    assert chosen in {"none", "all", "logistic-head", "block1", "block2", "block3"}
    rgn = rows["auto-rgn"].result
    assert [list(factors) for factors in rgn["factors"]] == [["block1", "block2", "block3", "head"]] * 3
    steps, scored, looks = 3 * 2, 3 * 2, 3 * 10 / 10 / 3
    assert rgn["cost"] == pytest.approx(steps + scored + looks)


def test_numbers_of_images_and_norm_policies_are_studies_of_their_own(recipe, world, tmp_path):
    asked = arguments(world, tmp_path, "--tasks", "frost", "--target", "head", "--seeds", "0", "--head-lr", "0.1")
    recipe.main([*asked, "--tuning-images", "10", "20", "--norm-stats", "frozen", "all"])
    found = [
        (run.key["method"], run.key["tuning_images"], run.key["norm_stats"]) for run in Ledger(tmp_path / "rows.jsonl")
    ]
    trained = [("head", images, policy) for images in (10, 20) for policy in ("frozen", "all")]
    assert sorted(found) == sorted([*trained, ("none", 10, "frozen"), ("none", 20, "frozen")])
    assert {path.name for path in (tmp_path / "resnet26" / "frost").iterdir()} == {
        *("10-frozen", "10-all", "20-frozen", "20-all")
    }


def test_dry_run_trains_nothing(recipe, world, tmp_path, capsys):
    recipe.main(arguments(world, tmp_path / "out", "--target", "block1", "--dry-run"))
    said = capsys.readouterr().out
    assert "19,120 parameters (5.2%); rates 0.001, 0.0001, 1e-05" in said
    assert "and so for each of 2 tasks, numbers of images and norm policies" in said
    assert not (tmp_path / "out").exists()


def test_what_is_refused(recipe, world, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        recipe.main([])
    assert "--data is needed to train" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        recipe.main(arguments(world, tmp_path, "--push-to-hub", "me/x"))
    assert "cannot be opened by its name" in capsys.readouterr().err
    with pytest.raises(DataError, match="holds frost only: pass the folder to have snow"):
        recipe.main(["--data", str(world / "data" / "frost.parquet"), "--tasks", "snow"])
    with pytest.raises(ConfigError, match="there are no clean images for flip here; give --clean, or leave it out"):
        recipe.main(arguments(world, tmp_path, "--tasks", "flip", "--forgetting"))


def test_tasks_are_cut_alike_and_told_apart(world):
    sizes = {"seed": 3, "tuning": 20, "validation": 10}
    frost, snow = (read_cifar(task, world / "data", **sizes) for task in ("frost", "snow"))
    assert frost.fingerprint != snow.fingerprint
    both = read_cifar("frost", world / "data", clean=world / "data", **sizes)
    assert both.source_test["label"] == both.test["label"] == frost.test["label"]
    clean = cifar.read_images(world / "data", "clean")
    row = int(frost.test[0]["file"].split()[1])
    assert both.source_test[0]["file"] == f"clean row {row}"
    assert np.array_equal(np.array(both.source_test[0]["image"]).transpose(2, 0, 1), clean.pixels[row].numpy())


# --- tables from rows ---


def drawn(recipe, folder, *methods):
    """The lines of the comparison's table."""
    asked = ["--table", "--tasks", "frost", "--seeds", "0", "1", "--output", str(folder), "--target", *methods]
    recipe.main([*asked, "--lr", "1e-3", "1e-4", "--head-lr", "1e-1", "1e-2", "--markdown", str(folder / "table.md")])
    text = (folder / "table.md").read_text()
    return text, {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}


def fill(recipe, folder, method, **by_lr_and_seed):
    """Rows of one method: name lr_seed -> (validation, test)."""
    args = recipe.parse_arguments(["--table", "--output", str(folder), "--tasks", "frost"])
    for name, (validation, test) in by_lr_and_seed.items():
        lr, seed = name.removeprefix("lr").split("_")
        key = settings_of(args, "frost", method, 1000, "frozen")
        key |= {"lr": None if lr == "None" else float(lr.replace("m", "e-")), "seed": int(seed)}
        result = {"validation": validation, "test": test, "cost": 0.0 if method == "none" else 100.0}
        Ledger(folder / "rows.jsonl").append(key, result)


def test_cross_val_takes_each_targets_rate_from_seed_0_and_the_target_from_each_seed(recipe, tmp_path):
    fill(recipe, tmp_path, "none", lrNone_0=(0.2, 0.20), lrNone_1=(0.9, 0.21))  # on seed 1 nothing beats no tuning
    fill(recipe, tmp_path, "block1", lr1m3_0=(0.5, 0.50), lr1m4_0=(0.6, 0.60), lr1m4_1=(0.4, 0.61))
    for block in ("block2", "block3", "all"):
        fill(recipe, tmp_path, block, lr1m3_0=(0.3, 0.99), lr1m4_0=(0.1, 0.99), lr1m3_1=(0.3, 0.99))
    fill(recipe, tmp_path, "head", lr1m1_0=(0.3, 0.99), lr1m2_0=(0.1, 0.99), lr1m1_1=(0.3, 0.99))
    text, rows = drawn(recipe, tmp_path, "block1", "cross-val", "cross-val-wide")
    assert "| 60.5 ± 10.2 |" in rows["block1"]  # the rate that validates best on seed 0, although it tests no better
    assert "| 60.5 ±" in rows["cross-val"]  # the paper's: the best of the blocks, on seed 1 block1 again
    assert rows["cross-val"].rstrip(" |").endswith("400")  # four trained targets of 100 each
    assert "| 40.5 ±" in rows["cross-val-wide"]  # block1 on seed 0 (60.0), none on seed 1 (21.0), never the 99
    assert rows["cross-val-wide"].rstrip(" |").endswith("500")
    assert "one run of `all` costs 256" in text


def test_auto_snr_takes_the_threshold_that_validates_best_on_seed_0(recipe, tmp_path):
    runs = {0.1: (0.5, 0.4), 0.3: (0.7, 0.3), 0.5: (0.6, 0.9), 0.7: (0.5, 0.9), 0.9: (0.5, 0.9)}
    for threshold, (validation, test) in runs.items():
        one = {"lr1m3_0": (validation, test), "lr1m4_0": (0.1, 0.1), "lr1m3_1": (1 - validation, test)}
        fill(recipe, tmp_path, f"auto-snr@{threshold:g}", **one)
    _, rows = drawn(recipe, tmp_path, "auto-snr")
    assert "| 30.0 ±" in rows["auto-snr"]  # 0.3, although 0.1 validates best on seed 1
    assert rows["auto-snr"].rstrip(" |").endswith("500")
    fill(recipe, tmp_path, "auto-snr", lr1m3_0=(0.2, 0.2), lr1m4_0=(0.1, 0.1), lr1m3_1=(0.2, 0.2))
    _, rows = drawn(recipe, tmp_path, "auto-snr", "--thresholds")
    assert "| 20.0 ±" in rows["auto-snr"]  # the package's own


def test_a_missing_run_leaves_its_cell_and_the_mean_empty(recipe, tmp_path):
    fill(recipe, tmp_path, "block1", lr1m3_0=(0.5, 0.5), lr1m4_0=(0.6, 0.6))  # seed 1 is missing
    _, rows = drawn(recipe, tmp_path, "block1")
    assert rows["block1"] == "| block1 | - | - | - | - |"


def test_a_method_without_a_finished_cell_leaves_the_others_their_means(recipe, tmp_path):
    for block, better in (("none", 0.0), ("block2", 0.1)):
        name = "lrNone" if block == "none" else "lr1m3"
        runs = {f"{name}_{seed}": (0.5, 0.5 + better) for seed in (0, 1)}
        fill(recipe, tmp_path, block, **runs, **({} if block == "none" else {"lr1m4_0": (0.1, 0.1)}))
    fill(recipe, tmp_path, "l2-sp", lr1m3_0=(0.9, 0.9))
    _, rows = drawn(recipe, tmp_path, "l2-sp", "block2")
    assert rows["none"] == "| none | 50.0 ± 0.0 | 50.0 ± 0.0 | 2.0 | 0 |"
    assert rows["l2-sp"] == "| l2-sp | - | - | - | - |"
    assert rows["block2"] == "| block2 | 60.0 ± 0.0 | 60.0 ± 0.0 | 1.0 | 100 |"


# --- real data ---


@pytest.mark.slow
def test_a_short_run_on_real_data(tmp_path):
    if not (SHARED / "data" / "cifar10c").is_dir():
        pytest.skip("no CIFAR-10-C data: set PEFT_SURGICAL_SHARED to the folder that holds data/ and models/")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", str(RECIPE)]
    command += ["--data", str(SHARED / "data" / "cifar10c"), "--models", str(SHARED), "--tasks", "gaussian_noise"]
    command += [
        "--target",
        "block1",
        "--lr",
        "1e-3",
        "--epochs",
        "2",
        "--seeds",
        "0",
        "--output",
        str(tmp_path),
        "--cpu",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    none, block1 = [json.loads(line)["result"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert none["n"] == 800
    # 53 % without adaptation; two epochs of block 1 give about 74 %.
    assert abs(none["test"] - 0.531) < 0.03
    assert block1["test"] > 0.68


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="real images and weights: set PEFT_SURGICAL_SHARED")
def test_a_short_real_race_finds_a_better_network(recipe, tmp_path):
    asked = ["--tasks", "frost", "--seeds", "0", "--target", "auto", "--data", str(SHARED / "data/cifar10c"), "--cpu"]
    asked += ["--models", str(SHARED), "--tuning-images", "100", "--epochs", "5", "--output", str(tmp_path)]
    recipe.main([*asked, "--lr", "1e-3", "1e-4", "--head-lr", "1e-1", "1e-2"])
    results = {run.key["method"]: run.result for run in Ledger(tmp_path / "rows.jsonl")}
    assert results["none"]["test"] == pytest.approx(0.68, abs=0.02)
    assert results["auto"]["test"] > results["none"]["test"] + 0.03


@pytest.mark.slow
def test_the_cached_prefix_changes_nothing(recipe, world, tmp_path):
    more = ("--target", "head", "block3", "--lr", "1e-3", "--head-lr", "0.1", "--seeds", "0", "1")
    assert cache_changes_nothing(recipe.main, lambda folder: arguments(world, folder, *more), tmp_path)
