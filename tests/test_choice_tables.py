"""Tables of a comparison with `auto`, from rows whose numbers are known."""

import pytest

from paper import choice_tables
from paper.choice_tables import PHOTOGRAPHS, cifar, overall, table
from peft_surgical.training.ledger import Run

TASKS = (("resnet26", "frost"), ("resnet26", "flip"), ("base", "frost"))


def row(network, task, method, test, validation=0.5, lr=1e-3, cost=100.0, clean=0.9, **more):
    key = {"recipe": "cifar10c", "network": network, "task": task, "method": method, "tuning_images": 200}
    key |= {"lr": None if method in ("none", "auto") else lr, "seed": 0, **more}
    result = {"validation": validation, "test": test, "cost": cost, "n": 800, "chosen": "block1 at 0.001, all labels"}
    return Run(key, result | ({} if task == "flip" else {"clean": clean}), {"seconds": cost / 10})


def rows_of(network, task, auto, block="block2"):
    """All ways; of the blocks block1 tests best, and the given one validates best."""
    names = choice_tables.CIFAR_BLOCKS if network == "resnet26" else choice_tables.LITE0
    tested = {"none": 0.2, "all": 0.6, "head": 0.4, **dict.fromkeys(names, 0.5), "block1": 0.7}
    found = [row(network, task, name, test, 0.9 if name == block else 0.5) for name, test in tested.items()]
    return [*found, row(network, task, "auto", auto, cost=250.0)]


@pytest.fixture
def rows():
    found = rows_of("resnet26", "frost", 0.68) + rows_of("resnet26", "flip", 0.9) + rows_of("base", "frost", 0.5)
    effort = {"cost": 400.0, "effort": 2}
    return [*found, row("resnet26", "frost", "auto", 0.72, **effort), row("base", "frost", "auto", 0.5, **effort)]


def cells(found):
    return {line[0]: dict(zip(found.header[1:], line[1:], strict=True)) for line in found.rows}


def test_cross_val_takes_the_block_that_validates_best_and_the_oracle_the_one_that_tests_best(rows):
    kind, tasks = cifar(TASKS)
    tested, kept, differences, costs, chosen, blocks, efforts = table(rows, tasks, [20], [0], kind)
    found = cells(tested)["resnet26 frost"]
    assert found["none"] == "20.0"
    assert found["Cross-Val"] == "50.0"
    assert found["oracle"] == "70.0"
    assert found["auto"] == "68.0"
    assert "lp-ft" not in tested.header  # no row is of it
    assert cells(tested)["mean"]["auto"] == "69.3"
    assert cells(kept)["resnet26 frost"]["all"] == "90.0"
    assert cells(kept)["resnet26 flip"]["all"] == "-"
    assert "± 3.5 points" in tested.caption
    found = cells(differences)
    assert found["Cross-Val"] == {
        "resnet26": "29.0 ± 139.8",
        "base": "0.0",
        "CIFAR-10-C": "9.0 ± 114.4",
        "CIFAR-Flip": "40.0",
        "all": "19.3 ± 49.8",
        "worst cell": "0.0",
    }
    assert cells(costs)["20 per class, steps"] == {"Cross-Val": "4.3", "head": "1", "auto": "2.5"}
    assert cells(costs)["20 per class, seconds"]["auto"] == "2.5"
    assert cells(chosen)["base frost"]["seed 0"] == "block1 at 0.001"
    assert blocks.header[2:] == [*choice_tables.LITE0, "head", "all"]
    assert cells(blocks)["resnet26 frost"]["block1"] == "70.0"
    assert cells(blocks)["resnet26 frost"]["block7"] == "-"
    assert efforts.rows == [
        ["1", "20", "resnet26 frost, base frost", "59.0", "-", "2.5"],
        ["2", "20", "resnet26 frost, base frost", "61.0", "+2.0 ± 25.4", "4"],
    ]


def test_a_task_counts_once_it_has_auto_and_all(rows):
    kind, tasks = cifar(TASKS)
    lacking = [run for run in rows if run.key["method"] != "all" or run.key["task"] != "flip"]
    assert [line[0] for line in table(lacking, tasks, [20], [0], kind)[0].rows] == [
        "resnet26 frost",
        "base frost",
        "mean",
    ]
    assert table([run for run in rows if run.key["method"] != "auto"], tasks, [20], [0], kind) == []


def test_kinds_of_tasks_are_compared_together(rows):
    kind, tasks = cifar(TASKS)
    parts = {"corrupted": (rows, [tasks[0], tasks[2]], [20], [0], kind), "flip": (rows, [tasks[1]], [20], [0], kind)}
    found = cells(overall(parts))
    assert found["all"] == {
        "corrupted": "-1.0 ± 114.4",
        "flip": "+30.0",
        "all tasks": "+9.3 ± 49.8",
        "worst cell": "-10.0",
        "more than 1 below": "1 of 3",
    }
    assert "Tasks: corrupted: 2, flip: 1." in overall(parts).caption


def test_photographs_are_grouped_by_what_the_rules_were_fixed_on():
    assert PHOTOGRAPHS.groups["first three tasks"] == ("sketch", "webcam", "cellavision")
    assert PHOTOGRAPHS.blocks("sketch") == tuple(f"block{i}" for i in range(1, 8))
