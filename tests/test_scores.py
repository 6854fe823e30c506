"""Block scores: what is chosen from them, how they are shown and stored."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from peft_surgical import BlockScores
from peft_surgical.errors import DataError


def scores(**blocks):
    sizes = dict(zip(blocks, (10, 60, 20, 10), strict=False))
    return BlockScores("rgn", blocks, {f"{name}.weight": s for name, s in blocks.items()}, sizes, 320, 5)


ONE = scores(block1=3.0, block2=1.0, block3=2.5, head=2.5)


def test_top_is_best_first_and_of_equals_the_one_nearer_to_the_input():
    assert ONE.top(1) == ("block1",)
    assert ONE.top(3) == ("block1", "block3", "head")


def test_contiguous_is_the_best_run_in_the_order_of_the_data():
    assert ONE.contiguous(1) == ("block1",)
    assert ONE.contiguous(2) == ("block3", "head")  # 5.0, where the two best blocks are no neighbours
    assert ONE.contiguous(4) == ("block1", "block2", "block3", "head")


def test_of_equal_runs_the_one_nearer_to_the_input_is_chosen():
    equal = scores(block1=1.0, block2=2.0, block3=1.0, head=2.0)
    assert equal.contiguous(1) == ("block2",)
    assert equal.contiguous(2) == ("block1", "block2")


def test_a_budget_bounds_the_share_of_parameters():
    assert ONE.shares == {"block1": 0.1, "block2": 0.6, "block3": 0.2, "head": 0.1}
    assert ONE.contiguous(budget=0.1) == ("block1",)
    assert ONE.contiguous(budget=0.3) == ("block3", "head")
    assert ONE.contiguous(budget=1.0) == ("block1", "block2", "block3", "head")
    with pytest.raises(DataError, match="smallest, block1, holds 10"):
        ONE.contiguous(budget=0.05)


@pytest.mark.parametrize("k", [0, 5])
def test_a_number_of_blocks_that_there_is_not(k):
    with pytest.raises(DataError, match="choose 1 to 4"):
        ONE.top(k)
    with pytest.raises(DataError, match="choose 1 to 4"):
        ONE.contiguous(k)


def test_contiguous_needs_exactly_one_of_its_arguments():
    with pytest.raises(DataError, match="give one"):
        ONE.contiguous()
    with pytest.raises(DataError, match="give one"):
        ONE.contiguous(1, 0.5)


def test_scores_that_are_not_finite_are_no_scores():
    with pytest.raises(DataError, match=r"block2\.weight is not finite"):
        scores(block1=1.0, block2=float("nan"))
    with pytest.raises(DataError, match="score of block1 is not finite"):
        replace(ONE, block_scores={"block1": float("inf")})
    with pytest.raises(DataError, match="no block"):
        scores()


def test_json_round_trips():
    assert BlockScores.from_json(ONE.to_json()) == ONE
    assert json.loads(ONE.to_json())["num_samples"] == 320
    with pytest.raises(DataError, match="not the JSON of block scores"):
        BlockScores.from_json("{}")


def test_text_table_and_plot():
    assert "block1           3  100.0%" in str(ONE)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(ONE)
    assert "labels used" in console.export_text()
    axes = ONE.plot()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["block1", "block2", "block3", "head"]
    assert [bar.get_height() for bar in axes.patches] == [3.0, 1.0, 2.5, 2.5]
