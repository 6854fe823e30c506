"""Rows: which of them a cell of a table reports, by which rule; what a study writes is tested with the recipes."""

import pytest

from paper.rows import reported
from peft_surgical.errors import DataError
from peft_surgical.training.ledger import Run


def rows_of(validation, seeds=(0, 1, 2), **settings):
    """Runs of every rate on every seed, whose test results are the larger the worse they validate."""
    return [
        Run(
            {"method": "block1", "data": "abc", **settings, "lr": lr, "seed": seed},
            {"validation": value, "test": -value},
        )
        for lr, value in validation.items()
        for seed in seeds
    ]


def test_the_rate_is_the_one_that_validates_best_on_seed_0_of_equals_the_first():
    rows = rows_of({0.1: 0.5, 0.01: 0.75, 0.001: 0.75})
    found = reported(rows, {"method": "block1"}, (0.1, 0.01, 0.001), (2, 1))
    assert [(run.key["lr"], run.key["seed"]) for run in found] == [(0.01, 2), (0.01, 1)]
    on_others = [run for run in rows if run.key["seed"] != 0]
    assert reported(on_others, {"method": "block1"}, (0.1, 0.01), (1, 2)) == []
    assert [run.key["lr"] for run in reported(on_others, {"method": "block1"}, (0.1,), (1, 2))] == [0.1, 0.1]


def test_what_is_missing_leaves_the_cell_empty():
    rows = rows_of({0.1: 0.5, 0.01: 0.75})
    settings = {"method": "block1"}
    assert reported(rows, settings, (0.1, 0.01, 0.001), (0,)) == []  # a rate that was not tried
    assert reported(rows, settings, (0.1, 0.01), (0, 3)) == []  # a seed
    assert reported(rows, {"method": "block2"}, (0.1, 0.01), (0,)) == []
    untested = [Run(run.key, {"validation": run.result["validation"]}) for run in rows]
    assert reported(untested, settings, (0.1, 0.01), (0,)) == []


def test_rows_of_other_data_are_not_mixed():
    rows = rows_of({0.1: 0.5}) + rows_of({0.1: 0.9}, data="other")
    assert len(reported(rows, {"method": "block1", "data": "abc"}, (0.1,), (0, 1))) == 2
    with pytest.raises(DataError, match=r"rows for \{'method': 'block1'\} that differ in more than lr and seed"):
        reported(rows, {"method": "block1"}, (0.1,), (0, 1))
