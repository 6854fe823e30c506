"""Schedules as pure functions of progress, with hand-worked values."""

import pytest
from tiny import ConvNet
from torch import nn

from peft_surgical import BlockScores, anatomy_of
from peft_surgical.choosing.methods import AutoRGN, AutoSNR, Progress, gradual_unfreezing, lp_ft, normalised
from peft_surgical.choosing.pace import block_means
from peft_surgical.errors import ConfigError

ANATOMY = anatomy_of(ConvNet(nn.BatchNorm2d))  # block1, block2, head


def trained(schedule, step, total=9):
    factors = schedule.factors(Progress(step, total), None)
    return {ANATOMY.block_of(name).name for name, factor in factors.items() if factor == 1.0}


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("first-to-last", [{"block1"}, {"block1", "block2"}, {"block1", "block2", "head"}]),
        ("last-to-first", [{"head"}, {"block2", "head"}, {"block1", "block2", "head"}]),
    ],
)
def test_gradual_unfreezing_adds_a_block_after_each_third_of_the_run(order, expected):
    schedule = gradual_unfreezing(ANATOMY, order)
    assert [trained(schedule, step) for step in range(9)] == [expected[step // 3] for step in range(9)]
    assert set(schedule.factors(Progress(0, 9))) == set(ANATOMY.tensors)


def test_a_run_that_is_shorter_than_the_blocks_are_many_ends_with_fewer():
    schedule = gradual_unfreezing(ANATOMY, "last-to-first")
    assert [trained(schedule, step, total=2) for step in range(2)] == [{"head"}, {"block2", "head"}]


def test_an_unknown_order_is_refused():
    with pytest.raises(ConfigError, match="first-to-last"):
        gradual_unfreezing(ANATOMY, "upwards")


def test_lp_ft_frees_all_but_the_head_after_its_share():
    schedule = lp_ft(ANATOMY, 1 / 3)
    assert not any(name.startswith("fc.") for name in schedule.others)
    values = [set(schedule.factors(Progress(step, 9)).values()) for step in range(9)]
    assert values == [{0.0}] * 3 + [{1.0}] * 6
    with pytest.raises(ConfigError, match="share=1"):
        lp_ft(ANATOMY, 1)


def test_progress_stays_within_the_run():
    assert Progress(0, 10).share == 0.0
    assert Progress(5, 10).share == 0.5
    assert Progress(12, 10).share == 1.0
    assert trained(gradual_unfreezing(ANATOMY), 12) == {"block1", "block2", "head"}


SCORES = BlockScores(
    "rgn", {"block1": 1.0}, {"conv1.weight": 0.5, "bn1.weight": 2.0, "fc.weight": 0.0}, {"block1": 3}, 10, 2
)


def test_auto_rgn_scales_by_the_largest():
    factors = AutoRGN().factors(Progress(0, 1), SCORES)
    assert factors == {"conv1.weight": 0.25, "bn1.weight": 1.0, "fc.weight": 0.0}
    left_out = AutoRGN(left_out=frozenset({"bn1.weight"})).factors(Progress(0, 1), SCORES)
    assert left_out == {"conv1.weight": 1.0, "bn1.weight": 0.0, "fc.weight": 0.0}


def test_auto_snr_freezes_below_the_threshold():
    assert AutoSNR(0.25).factors(Progress(0, 1), SCORES) == {"conv1.weight": 1.0, "bn1.weight": 1.0, "fc.weight": 0.0}
    assert AutoSNR(0.26).factors(Progress(0, 1), SCORES)["conv1.weight"] == 0.0
    assert set(AutoSNR(0.0).factors(Progress(0, 1), SCORES).values()) == {1.0}
    with pytest.raises(ConfigError, match="threshold=2"):
        AutoSNR(2)


def test_normalised_and_block_means():
    assert normalised({"a": 0.0, "b": 0.0}) == {"a": 1.0, "b": 1.0}
    assert normalised({}) == {}
    means = block_means({"conv1.weight": 0.5, "bn1.weight": 1.0, "fc.weight": 0.0}, ANATOMY)
    assert means == {"block1": 0.75, "head": 0.0}
