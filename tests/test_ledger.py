"""The ledger: lookup, resuming after a kill, several processes."""

import math
import subprocess
import sys
import textwrap

import pytest

from peft_surgical.errors import DataError
from peft_surgical.evaluation.ledger import Cell, Ledger, shard


def test_append_and_find(tmp_path):
    ledger = Ledger(tmp_path / "deep" / "runs.jsonl")
    key = {"target": "block1", "lr": 1e-3, "seed": 0, "delta_dtype": None}
    assert ledger.find(key) is None
    assert len(ledger) == 0
    ledger.append(key, {"validation": 0.5})
    assert ledger.find(dict(reversed(key.items()))) == {"validation": 0.5}
    assert ledger.find({**key, "seed": 1}) is None
    assert ledger.find({k: v for k, v in key.items() if k != "delta_dtype"}) is None
    ledger.append({**key, "seed": 1}, {"validation": 0.75})
    assert [run.result["validation"] for run in ledger.runs(target="block1")] == [0.5, 0.75]
    assert [run.key["seed"] for run in ledger.runs(seed=1, lr=1e-3)] == [1]
    assert ledger.runs(unknown=None) == []
    assert [run.key for run in Ledger(ledger.file)] == [run.key for run in ledger]


def test_another_writer_is_seen_and_the_last_result_counts(tmp_path):
    first, second = Ledger(tmp_path / "runs.jsonl"), Ledger(tmp_path / "runs.jsonl")
    first.append({"seed": 0}, {"value": 1})
    assert second.find({"seed": 0}) == {"value": 1}
    second.append({"seed": 0}, {"value": 2})
    assert first.find({"seed": 0}) == {"value": 2}
    assert len(first) == 1


@pytest.mark.parametrize("length", [1, 20, 5000])
def test_a_torn_last_line_is_passed_over_and_cut_off(tmp_path, length):
    ledger = Ledger(tmp_path / "runs.jsonl")
    ledger.append({"seed": 0}, {"value": 0})
    whole = ledger.file.read_bytes()
    torn = b'{"key": {"seed": 1}, "result": {"text": "' + b"x" * 6000
    ledger.file.write_bytes(whole + torn[:length])
    for reader in (ledger, Ledger(ledger.file)):
        assert reader.find({"seed": 0}) == {"value": 0}
        assert reader.find({"seed": 1}) is None
    ledger.append({"seed": 1}, {"value": 1})
    assert [run.result["value"] for run in ledger] == [0, 1]
    assert ledger.file.read_bytes() == whole + b'{"key": {"seed": 1}, "result": {"value": 1}}\n'
    ledger.file.write_bytes(torn[:length])
    assert len(ledger) == 0
    ledger.append({"seed": 2}, {"value": 2})
    assert [run.key for run in ledger] == [{"seed": 2}]


def test_what_is_no_run_is_refused(tmp_path):
    ledger = Ledger(tmp_path / "runs.jsonl")
    for bad in ({"value": math.nan}, {"value": object()}):
        with pytest.raises(DataError, match="cannot be written to a ledger"):
            ledger.append({"seed": 0}, bad)
        with pytest.raises(DataError, match="cannot be written to a ledger"):
            ledger.find(bad)
    assert not ledger.file.exists()
    ledger.file.write_text('{"seed": 0}\n')
    with pytest.raises(DataError, match=r"runs\.jsonl holds a line that is no run: .*delete that line"):
        ledger.runs()


def test_processes_appending_at_once_lose_nothing(tmp_path):
    code = textwrap.dedent(
        """
        import importlib.util, sys, types
        # Without the package's __init__ and its errors, which import torch and peft: three at once take a minute where
        # the machine is busy.
        package = types.ModuleType("peft_surgical"); package.__path__ = [sys.argv[1]]
        errors = types.ModuleType("peft_surgical.errors"); errors.DataError = ValueError
        sys.modules |= {"peft_surgical": package, "peft_surgical.errors": errors}
        from peft_surgical.evaluation.ledger import Ledger
        ledger = Ledger(sys.argv[2])
        for i in range(60):
            ledger.append({"writer": int(sys.argv[3]), "i": i}, {"text": "x" * (i * 37)})
        """
    )
    import peft_surgical

    file = tmp_path / "runs.jsonl"
    arguments = [sys.executable, "-c", code, peft_surgical.__path__[0], str(file)]
    writers = [subprocess.Popen([*arguments, str(writer)]) for writer in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    runs = Ledger(file).runs()
    assert len(runs) == 180
    assert all(len(run.result["text"]) == run.key["i"] * 37 for run in runs)
    assert file.read_bytes().count(b"\n") == 180


def run_grid(cell, ledger, validation):
    trained = []

    def train(key):
        trained.append((key["lr"], key["seed"]))
        return {"validation": validation[key["lr"]], "test": key["lr"] + key["seed"]}

    return cell.fill(ledger, train), trained


def test_a_cell_chooses_on_seed_0_by_validation_and_resumes(tmp_path):
    ledger = Ledger(tmp_path / "runs.jsonl")
    cell = Cell({"target": "block1", "data": "abc"}, (0.1, 0.01, 0.001), (0, 1, 2))
    assert cell.reported(ledger) == []
    # The best test result (lr 0.1) has no say; of equals the first wins.
    runs, trained = run_grid(cell, ledger, {0.1: 0.5, 0.01: 0.75, 0.001: 0.75})
    assert trained == [(0.1, 0), (0.01, 0), (0.001, 0), (0.01, 1), (0.01, 2)]
    assert [run.result["test"] for run in runs] == [0.01, 1.01, 2.01]
    assert cell.reported(ledger) == runs
    again, trained = run_grid(cell, ledger, {})
    assert (again, trained) == (runs, [])
    assert Cell({"target": "block1"}, cell.candidates, (2, 1)).reported(ledger) == [runs[2], runs[1]]
    assert Cell(cell.settings, cell.candidates, (0, 3)).reported(ledger) == []
    assert Cell(cell.settings, (*cell.candidates, 1.0), (0,)).reported(ledger) == []
    ledger.append({"target": "block1", "data": "other", "lr": 0.01, "seed": 5}, {"validation": 1})
    assert cell.reported(ledger) == runs
    with pytest.raises(DataError, match=r"runs for \{'target': 'block1'\} that differ in more than lr and seed"):
        Cell({"target": "block1"}, cell.candidates, (0,)).reported(ledger)


def test_a_cell_without_candidates_trains_nothing_to_choose(tmp_path):
    ledger = Ledger(tmp_path / "runs.jsonl")
    cell = Cell({"target": "none"}, (None,), (1,))
    runs = cell.fill(ledger, lambda key: {"test": 0.5})
    assert [run.key["seed"] for run in ledger] == [1]
    assert cell.reported(ledger) == runs == ledger.runs()


def test_a_killed_grid_loses_only_the_run_under_way(tmp_path):
    ledger, cell = Ledger(tmp_path / "runs.jsonl"), Cell({"target": "head"}, (0.1, 0.01), (0, 1))
    trained = []

    def train(key):
        trained.append((key["lr"], key["seed"]))
        if len(trained) == 2:
            raise KeyboardInterrupt
        return {"validation": 0.5}

    with pytest.raises(KeyboardInterrupt):
        cell.fill(ledger, train)
    cell.fill(ledger, train)
    assert trained == [(0.1, 0), (0.01, 0), (0.01, 0), (0.1, 1)]


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_shards_are_disjoint_total_and_mixed(parts):
    cells = [Cell({"corruption": c, "target": t}, (None,), (0,)) for c in range(4) for t in "abcdef"]
    dealt = [shard(cells, part, parts) for part in range(1, parts + 1)]
    assert sorted(cells.index(cell) for part in dealt for cell in part) == list(range(24))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    assert dealt == [shard(list(cells), part, parts) for part in range(1, parts + 1)]
    if parts == 2:
        assert all(len({cell.settings["target"] for cell in part}) >= 5 for part in dealt)
    with pytest.raises(DataError, match=f"part 0 of {parts} does not exist"):
        shard(cells, 0, parts)
