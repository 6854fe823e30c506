"""The metrics by name, and their intervals, against hand-worked values."""

import math

import pytest
import torch

from peft_surgical.errors import ConfigError, DataError
from peft_surgical.evaluation import wilson_interval
from peft_surgical.evaluation.judging import JUDGES, check_metrics, interval_of, judge, tolerant

LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
PREDICTED = torch.tensor([0, 0, 0, 1, 1, 1, 0, 0, 1, 1])  # right: 3 of 4, 2 of 4, 2 of 2


def test_by_hand():
    found = judge(list(JUDGES), PREDICTED, LABELS, GROUPS)
    assert found == {
        "accuracy": 0.7,
        "worst_group_accuracy": 0.5,
        "average_group_accuracy": pytest.approx((0.75 + 0.5 + 1) / 3),
    }


def test_groups_are_needed_where_they_are():
    assert judge(["accuracy"], PREDICTED, LABELS, None) == {"accuracy": 0.7}
    with pytest.raises(DataError, match="worst_group_accuracy needs the group of every image"):
        judge(["accuracy", "worst_group_accuracy"], PREDICTED, LABELS, None)


@pytest.mark.parametrize("names", [(), ("accuracy", "f1")])
def test_unknown_names(names):
    with pytest.raises(ConfigError, match=r"name one or more of accuracy, worst_group_accuracy"):
        check_metrics(names)


def test_intervals():
    assert interval_of("accuracy", PREDICTED, LABELS, GROUPS) == (wilson_interval(7, 10), 10)
    assert interval_of("worst_group_accuracy", PREDICTED, LABELS, GROUPS) == (wilson_interval(2, 4), 4)
    (value, low, high), n = interval_of("average_group_accuracy", PREDICTED, LABELS, GROUPS)
    one, two, three = wilson_interval(3, 4), wilson_interval(2, 4), wilson_interval(2, 2)
    assert n == 10
    assert value == pytest.approx(0.75)
    below = math.hypot(one.value - one.low, two.value - two.low, three.value - three.low) / 3
    above = math.hypot(one.high - one.value, two.high - two.value, three.high - three.value) / 3
    assert (low, high) == (pytest.approx(value - below), pytest.approx(value + above))


def test_the_interval_of_a_mean_of_groups_covers():
    """95% of the intervals should hold the truth; of 400 draws, 357 to 400 do unless the formula is wrong."""
    generator = torch.Generator().manual_seed(0)
    rates, groups = torch.tensor([0.9, 0.6, 0.75]), torch.arange(3).repeat_interleave(30)
    hits = 0
    for _ in range(400):
        right = torch.rand(90, generator=generator) < rates[groups]
        interval, _ = interval_of("average_group_accuracy", right.long(), torch.ones(90, dtype=torch.long), groups)
        hits += interval.low <= 0.75 <= interval.high
    assert 365 <= hits <= 396


def test_what_diverged_is_no_class():
    logits = torch.tensor([[1.0, 2.0], [float("nan"), 0.0], [3.0, 1.0]])
    assert tolerant(logits).tolist() == [1, -1, 0]
    with pytest.raises(DataError, match="the scores hold NaN"):
        judge(["accuracy"], logits, torch.tensor([1, 0, 0]), None)
