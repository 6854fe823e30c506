"""The benchmarks: their statistics by hand, their checks, and (slow) one tiny run of each."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scripts import script
from torch import nn

from paper import cifar_networks
from peft_surgical.training.ledger import Ledger, Run

pytest.importorskip("timm")
pytest.importorskip("rich")

ROOT = Path(__file__).parents[1]


def load(name):
    return script("benchmarks", f"{name}.py")


@pytest.fixture(scope="module")
def step():
    return load("step")


@pytest.fixture(scope="module")
def delta_dtype():
    return load("delta_dtype")


def run_script(name, *arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1200, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- statistics ---


def test_interval_of_the_median_by_hand(step):
    # n = 10: P(Binomial(10, 1/2) <= 1) = 11/1024, twice that is 2.1%; with <= 2 it is 2 * 56/1024 = 10.9%. So one value
    # is cut off at each end, and the interval runs from the 2nd to the 9th.
    values = [1.07, 1.01, 1.10, 1.02, 1.04, 1.03, 1.06, 1.05, 0.99, 1.08]
    found = step.median_interval(values)
    assert found.value == pytest.approx((1.04 + 1.05) / 2)
    assert (found.low, found.high) == (1.01, 1.08)
    # n = 6: 2/64 = 3.1% for the extremes; n = 5: 2/32 = 6.2%, more than 5% already.
    assert step.median_interval([3, 1, 2, 6, 5, 4])[1:] == (1, 6)
    assert step.median_interval([3, 1, 2, 5, 4]) == (3, 0.0, math.inf)
    # n = 20: the textbook's 6th and 15th (coverage 95.9%).
    assert step.median_interval(range(1, 21))[1:] == (6, 15)


def test_interval_covers_as_often_as_it_says(step):
    draws = np.random.default_rng(0).exponential(size=(2000, 12))
    found = [step.median_interval(list(row)) for row in draws]
    covered = sum(low <= math.log(2) <= high for _, low, high in found) / len(found)
    assert 0.95 <= covered <= 0.98  # exactly 96.1% for n = 12


def test_ratios_are_paired(step):
    # The machine is ten times slower in the second round; a ratio of medians would see 1.1 * 5.5, not 1.1.
    seconds = {"ours": [1.1, 11.0, 1.1], "hand": [1.0, 10.0, 1.0]}
    assert step.ratio(seconds, "ours", "hand").value == pytest.approx(1.1)
    assert step.ratio(seconds, "ours", "peft") is None
    assert step.shown(step.ratio(seconds, "ours", "hand")) == "1.100 (too few rounds)"
    assert step.shown(step.median_interval([1.0, 1.1, 1.2, 1.3, 1.4, 1.5])) == "1.250 (1.000 to 1.500)"


def test_every_method_once_per_round_in_changing_order(step):
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    taken = step.interleave(calls, 0, 6, lambda: None)
    assert {name: len(times) for name, times in taken.items()} == {"a": 6, "b": 6, "c": 6}
    rounds = ["".join(order[i : i + 3]) for i in range(0, 18, 3)]
    assert rounds == ["abc", "bca", "cab", "cba", "acb", "bac"]


def test_difference_by_seed_by_hand(delta_dtype):
    def pair(seed, before, after):
        return Run({"seed": seed}, {}), {"accuracy": before, "bfloat16": {"accuracy": after}}

    pairs = [pair(0, 0.80, 0.79), pair(0, 0.70, 0.70), pair(1, 0.80, 0.81), pair(1, 0.70, 0.71)]
    assert delta_dtype.points_by_seed(pairs, "bfloat16") == pytest.approx([-0.5, 1.0])


# --- what is compared ---


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.layer2 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.fc = nn.Linear(4, 10)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(self.conv1(x))).mean((2, 3)))


@pytest.mark.parametrize(("target", "count"), [("block1", 6), ("all", 12)])
def test_methods_train_the_same_tensors(step, target, count):
    made, same = step.builders(Tiny(), target)
    assert same == {"ours", "hand", "peft"} | ({"full"} if target == "all" else set())
    for name in same:
        assert sum(p.requires_grad for p in made[name]().parameters()) == count
    assert sum(p.requires_grad for p in made["full"]().parameters()) == 12


def test_raw_parameters_are_out_of_the_nearest_methods_reach(step):
    network = Tiny()
    network.scale = nn.Parameter(torch.ones(1))
    assert list(step.modules_within(network, {"scale", "fc.weight", "fc.bias"})) == ["fc"]
    assert list(step.modules_within(network, {"fc.weight"})) == []


def test_unequal_work_is_refused(step):
    step.check_losses({"hand": [2.0, 1.9], "ours": [2.0, 1.9000001]}, 1e-3)
    with pytest.raises(RuntimeError, match="ours and hand do not do the same work"):
        step.check_losses({"hand": [2.0, 1.9], "ours": [2.0, 1.8]}, 1e-3)
    with pytest.raises(RuntimeError, match="nothing was trained"):
        step.check_losses({"hand": [2.0, 2.0], "ours": [2.0, 2.0]}, 1e-3)


def test_merging_is_checked(step):
    base, x = Tiny(), torch.randn(2, 3, 12, 12)
    made, _ = step.builders(base, "block1")
    with pytest.raises(RuntimeError, match="the comparison would be empty"):
        step.check_merged(made["ours"]().merge_and_unload(), made["ours"](), base, x)
    with pytest.raises(RuntimeError, match="modules that the base does not have"):
        step.check_merged(made["ours"](), made["ours"](), base, x)


def test_a_goal_is_about_its_own_cells(step):
    def cell(target, batch_size, share):
        key = {"network": "resnet50", "side": 224, "batch_size": batch_size, "target": target}
        seconds = {"ours": [share] * 6, "hand": [1.0] * 6, "full": [1.0] * 6}
        return Run(key, {"training": seconds, "inference": seconds})

    lines = step.verdicts([cell("block1", 16, 1.02), cell("head", 16, 1.01), cell("block1", 4, 1.5)])
    assert lines[0].endswith("at most 1.03; met: 1.020 (1.020 to 1.020) on resnet50 block1, the largest of 2.")
    assert lines[1].endswith("at most 1.05; no cell here is about it.")
    lines = step.verdicts([cell("all", 16, 1.06)])
    assert lines[1].endswith("missed: 1.060 (1.060 to 1.060) on resnet50 all.")
    assert lines[3] == "Noise: full / hand on resnet50 all, the same network twice: 1.000 (1.000 to 1.000)."


# --- on a GPU ---


def test_what_fails_on_a_gpu_is_written_down_and_the_rest_goes_on(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    gpu = load("gpu")

    def broken(args):
        raise RuntimeError("out of memory")

    def works(args):
        return {"seconds": 1.5}

    monkeypatch.setattr(gpu, "sections", lambda args: [
        gpu.Section("snr", 0, broken), gpu.Section("launch", 5, works), gpu.Section("compile", 61, works),
    ])  # fmt: skip
    file, table = tmp_path / "gpu.json", tmp_path / "gpu.md"
    file.write_text(json.dumps({"sections": {"earlier": {"skipped": "by hand", "took": 0}}}))
    gpu.main(["--tiny", "--device", "cpu", "--minutes", "1", "--json", str(file), "--markdown", str(table)])
    found = json.loads(file.read_text())
    assert list(found["sections"]) == ["earlier", "snr", "launch", "compile"]
    assert found["sections"]["snr"]["error"].endswith("RuntimeError: out of memory")
    assert found["sections"]["launch"]["seconds"] == 1.5
    assert found["sections"]["compile"]["skipped"].endswith("of 60 s were used")
    assert found["machine"]["gpu"] is None
    said = table.read_text()
    assert "- snr: failed, RuntimeError: out of memory" in said
    assert "| accelerate launch of a recipe on a miniature | 1.5 s |" in said
    assert "snr: RuntimeError: out of memory" in capsys.readouterr().out


# --- all of the CPU's ---


def test_the_cpus_jobs_resume_and_their_table_has_goals(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    bench, done = load("bench"), []

    def works(args):
        done.append("works")
        return [
            bench.row("resnet26 head: cached / uncached", (0.1, 0.09, 0.13), 6, 0.12, short=True, limit=0.08),
            bench.row("set_adapter among 1,000 (resnet18 block1)", (1.5, 0.0, math.inf), 2, 1.0, unit="ms"),
        ]

    def broken(args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(bench, "jobs", lambda args: {"prefix one": works, "scores": broken})
    file, table, figure = tmp_path / "b.json", tmp_path / "b.md", tmp_path / "b.png"
    words = ["--json", str(file), "--markdown", str(table)]
    bench.main([*words, "--figure", str(figure)])
    bench.main(words)
    assert done == ["works"]  # what is there is not repeated
    bench.main([*words, "--again", "--only", "prefix"])
    assert done == ["works"] * 2
    text = table.read_text()
    met = "| resnet26 head: cached / uncached | 0.1 | 0.09 to 0.13 | 6 | 0.08 | 0.12: met |"
    assert text.count(met) == 2  # in the short table and in that of its job
    assert "| set_adapter among 1,000 (resnet18 block1) | 1.5 ms | - | 2 | - | 1 ms: missed |" in text
    assert "- scores: failed, RuntimeError: out of memory" in text
    assert "scores: RuntimeError: out of memory" in capsys.readouterr().out
    assert figure.read_bytes().startswith(b"\x89PNG")
    again = tmp_path / "again.md"
    bench.main(["--from-json", str(file), "--markdown", str(again)])
    assert again.read_text() == text


def test_the_cpus_table_is_drawn_from_the_committed_rows(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    bench, results = load("bench"), ROOT / "docs" / "results"
    report = json.loads((results / "bench.json").read_text(encoding="utf-8"))
    assert not report["tiny"]
    assert bench.tables(report) == (results / "bench.md").read_text(encoding="utf-8")


def test_what_a_cache_can_save_by_hand(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    prefix = load("prefix")
    # All of the network is in front: one pass of 12 images instead of two epochs' (10 + 2) each.
    assert prefix.limit_of(1.0, 10, 2, 2) == pytest.approx(1 / 2)
    assert prefix.limit_of(0.0, 10, 2, 2) == 1
    # Half: 6 + 32 of 12 + 32 passes.
    assert prefix.limit_of(0.5, 10, 2, 2) == pytest.approx((6 + 32) / (12 + 32))
    assert prefix.share_in("prefix cached: 68% of a forward pass, all before layer3, is computed once") == 0.68
    assert prefix.share_in("prefix not cached: it is switched off") == 0


@pytest.mark.slow
def test_every_job_of_the_cpu_runs_tiny(tmp_path):
    file = tmp_path / "bench.json"
    run_script("bench", "--tiny", "--threads", 1, "--json", file, "--markdown", tmp_path / "bench.md")
    found = json.loads(file.read_text())["jobs"]
    assert {name: job["error"] for name, job in found.items() if "error" in job} == {}
    rows = [row for job in found.values() for row in job["rows"]]
    assert all(row["value"][0] > 0 for row in rows)


@pytest.mark.slow
def test_every_section_for_a_gpu_runs_tiny_on_the_cpu(tmp_path):
    file, table = tmp_path / "gpu.json", tmp_path / "gpu.md"
    words = ["--tiny", "--device", "cpu", "--minutes", "60", "--skip", "compile", "--json", file, "--markdown", table]
    run_script("gpu", *words)
    found = json.loads(file.read_text())["sections"]
    assert {name: row["error"] for name, row in found.items() if "error" in row} == {}
    assert found["launch"]["adapter"]
    assert found["adapters"]["equal"] == 3
    assert found["autocast tiny_vit last1"]["training"]["cache"]["n"] == 2
    assert "| autocast tiny_resnet all |" in table.read_text()


# --- the whole ---


@pytest.mark.slow
def test_step_measures_resumes_and_redraws(tmp_path):
    file, table = tmp_path / "step.jsonl", tmp_path / "table.md"
    tiny = ["--networks", "resnet26", "--targets", "block1", "all", "--batch-size", 2, "--seconds", 0, "--rounds", 6]
    tiny += ["--threads", 1, "--json", file]
    assert "resnet26 block1: training, ours / hand" in run_script("step", *tiny, "--markdown", table)
    written = file.read_text()
    for line in written.splitlines():
        result = json.loads(line)["result"]
        assert {name: len(times) for name, times in result["training"].items()} == dict.fromkeys(
            ("ours", "hand", "peft", "lora", "full"), 6
        )
        assert set(result["inference"]) == {"ours", "hand", "peft", "merged"}
        # The deltas come on top of the base, and nothing else does.
        assert 0 <= result["memory"]["ours"] - result["memory"]["hand"] <= 3 * 4 * result["trained"]
        assert 4 * result["trained"] <= result["bytes"]["ours"] <= 4 * result["trained"] + 16384
    run_script("step", *tiny)
    assert file.read_text() == written
    again = tmp_path / "again.md"
    run_script("step", "--from-json", file, "--markdown", again)
    assert again.read_text() == table.read_text()
    first, _, *rows = table.read_text().splitlines()
    assert first.startswith("| network | target | training: ours / hand |")
    assert [row.split(" | ")[1] for row in rows[:2]] == ["block1", "all"]
    assert "Noise: full / hand on resnet26 all" in table.read_text()


@pytest.mark.slow
def test_delta_dtype_reads_what_the_recipe_leaves(tmp_path):
    datasets = pytest.importorskip("datasets")
    pillow = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    weights = tmp_path / "models" / cifar_networks.NETWORKS["resnet26"].checkpoint / "model.safetensors"
    weights.parent.mkdir(parents=True)
    save_file(cifar_networks.ResNet26().state_dict(), weights)
    cells = []
    for array in np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8):
        buffer = io.BytesIO()
        pillow.fromarray(array).save(buffer, format="PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    rows = {"img": cells, "label": [i % 10 for i in range(50)]}
    data = tmp_path / "data" / "frost.parquet"
    data.parent.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(data)

    folder, there = tmp_path / "run", ["--data", data.parent, "--models", tmp_path]
    recipe = [sys.executable, ROOT / "recipes" / "cifar10c.py", *there, "--output", folder, "--cpu", "--epochs", "1"]
    recipe += ["--tuning-images", "20", "--validation-images", "10", "--batch-size", "10", "--seeds", "0", "1"]
    recipe += ["--target", "block1", "--lr", "1e-2", "1e-3"]
    done = subprocess.run(list(map(str, recipe)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr

    file, table = tmp_path / "dtype.jsonl", tmp_path / "table.md"
    arguments = ["--run", folder, *there, "--json", file, "--markdown", table]
    run_script("delta_dtype", *arguments)
    runs = Ledger(file).runs()
    assert len(runs) == 2  # the chosen learning rate of each seed
    for run in runs:
        assert run.result["n"] == 20
        for dtype in ("bfloat16", "float16"):
            # 76,480 bytes of fp32 deltas become 38,240; the header stays.
            assert run.result["bytes"] - run.result[dtype]["bytes"] == pytest.approx(38240, abs=1024)
            assert 0 < run.result[dtype]["logits"] < 0.1
    lines = table.read_text().splitlines()
    assert [line.split(" | ")[1:3] for line in lines[2:4]] == [["block1", "bfloat16"], ["block1", "float16"]]
    written = file.read_text()
    run_script("delta_dtype", *arguments)
    assert file.read_text() == written
