"""Grids of runs: the command line that they share, what their cells train, choose and report, and how they are kept."""

import pytest
import torch

from paper.grids import Cell, export, grid_parser, parse_grid, shard
from peft_surgical.errors import DataError
from peft_surgical.training.ledger import Ledger


@pytest.fixture
def parse():
    threads = torch.get_num_threads()

    def parsed(*argv):
        return parse_grid(grid_parser("What it does.", output="outputs/x", data="a file", seeds=(0, 1)), argv)

    yield parsed
    torch.set_num_threads(threads)


def test_defaults_and_what_becomes_of_them(parse, tmp_path):
    args = parse("--data", "there")
    assert (args.network, args.seeds, args.shard, args.table) == ("resnet26", [0, 1], (1, 1), False)
    assert args.ledger.as_posix() == "outputs/x/ledger.jsonl"
    args = parse("--table", "--output", str(tmp_path), "--shard", "2/3", "--threads", "2")
    assert args.ledger == tmp_path / "ledger.jsonl"
    assert args.shard == (2, 3)
    assert torch.get_num_threads() == 2
    assert parse("--table", "--ledger", "runs.jsonl").ledger.as_posix() == "runs.jsonl"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--data is needed to train; without it --table draws what the ledger holds"),
        (["--table", "--shard", "3/2"], "--shard 3/2: write i/n with i from 1 to n, such as 1/2 and 2/2"),
        (["--table", "--shard", "0/2"], "--shard 0/2: write i/n"),
        (["--table", "--shard", "half"], "--shard half: write i/n"),
        (["--table", "--network", "vgg"], "invalid choice: 'vgg'"),
    ],
)
def test_what_is_refused(parse, argv, message, capsys):
    with pytest.raises(SystemExit):
        parse(*argv)
    assert message in capsys.readouterr().err


# --- cells ---


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
    # The best test result (lr 0.1) decides nothing; of equals the first wins.
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


def test_what_a_choice_reads_are_the_candidates_of_seed_0_and_what_is_reported(tmp_path):
    ledger, cell = Ledger(tmp_path / "runs.jsonl"), Cell({"target": "head"}, (0.1, 0.01), (0, 1))
    assert cell.read_by(ledger) == []
    cell.fill(ledger, lambda key: {"validation": key["lr"] + key["seed"]})
    ledger.append({"target": "head", "lr": 0.01, "seed": 1}, {"validation": 1.0})  # of a rate that was not chosen
    assert [(run.key["lr"], run.key["seed"]) for run in cell.read_by(ledger)] == [(0.1, 0), (0.01, 0), (0.1, 1)]
    later = Cell(cell.settings, cell.candidates, (1,))  # seed 0 chooses, and is not reported
    assert [(run.key["lr"], run.key["seed"]) for run in later.read_by(ledger)] == [(0.1, 0), (0.01, 0), (0.1, 1)]


def test_exported_are_the_runs_that_are_read_each_once_and_what_lacks_is_named(tmp_path):
    ledger, target = Ledger(tmp_path / "all.jsonl"), Ledger(tmp_path / "kept.jsonl")
    cells = [Cell({"target": name}, (0.1, 0.01), (0,)) for name in ("head", "block1", "all")]
    for cell in cells[:2]:
        cell.fill(ledger, lambda key: {"validation": key["lr"]})
    ledger.append({"target": "all", "lr": 0.1, "seed": 0}, {"validation": 0.5})  # one of two candidates
    for _ in range(2):
        assert export([*cells, cells[0]], ledger, target) == [cells[2]]
        assert [(run.key["target"], run.key["lr"]) for run in target] == [
            *(("head", 0.1), ("head", 0.01), ("block1", 0.1), ("block1", 0.01))
        ]
        assert target.file.read_bytes().count(b"\n") == 4
    assert [cell.reported(target) for cell in cells] == [cell.reported(ledger) for cell in cells]
