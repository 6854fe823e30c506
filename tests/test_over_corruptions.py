"""ImageNet-C's summary: means, mCE and intervals by hand, and from cells that do not go together."""

from statistics import fmean

import numpy as np
import pytest

from paper.corruptions import ALEXNET_ERRORS, CORRUPTIONS
from paper.over_corruptions import MOST, corruption_table, mean_corruption_error, summary_of, why_no_mce
from peft_surgical.errors import DataError
from peft_surgical.evaluation import Report, measure, wilson_interval

N = 200


def cell(rows, n=N, model="resnet50", seeds=None):
    """A cell's report: row -> accuracy of each seed."""
    seeds = seeds or list(range(len(next(iter(rows.values())))))
    measured = [
        measure(f"accuracy of {row}", values, dataset="a cell", n=n, seeds=seeds, selection=f"rule of {row}")
        for row, values in rows.items()
    ]
    settings = {"by_seed": rows, "seeds": seeds, "parts": {"test": n}, "chosen": {row: ["-"] for row in rows}}
    return Report(model, "x", tuple(measured), settings)


TWO = {
    ("fog", 5): cell({"none": [0.2, 0.3], "block1": [0.5, 0.6]}),
    ("frost", 5): cell({"none": [0.1, 0.2], "block1": [0.7, 0.8]}, n=100),
}


def test_the_mean_over_corruptions_seed_by_seed():
    summary = summary_of(TWO)
    none, block1 = summary
    assert (none.name, block1.name) == ("accuracy of none", "accuracy of block1")
    assert none.dataset == "ImageNet-C, severity 5, mean over 2 corruptions"
    assert none.value == pytest.approx(0.2)  # of 0.15 and 0.25
    assert block1.value == pytest.approx(0.65)
    # Student's t with one degree of freedom: 12.7062 standard errors of 0.05.
    assert none.high - none.value == pytest.approx(12.7062 * 0.05, rel=1e-4)
    assert none.low == 0.0
    assert (none.n, none.seeds, none.interval, none.selection) == (100, (0, 1), "t", "rule of none")
    assert summary.settings["mce"].startswith("not all severities: 73 of 75 cells are missing, first gaussian_noise 1")
    assert Report.from_json(summary.to_json()) == summary


def test_one_seed_has_the_interval_of_its_photographs():
    found = summary_of({("fog", 5): cell({"none": [0.2]}), ("frost", 5): cell({"none": [0.105]})})
    (none,) = found
    assert none.value == pytest.approx(0.1525)  # exact, though no number of 200 photographs
    _, low, high = wilson_interval(30, N)
    assert (none.low, none.high) == (low, high)
    assert none.interval == "wilson"


def full(rows_of, severities=(1, 2, 3, 4, 5)):
    return {(c, s): cell(rows_of(c, s)) for c in CORRUPTIONS for s in severities}


def test_mean_corruption_error_by_hand():
    assert len(ALEXNET_ERRORS) == 15
    assert mean_corruption_error(ALEXNET_ERRORS) == pytest.approx(1)
    assert mean_corruption_error({"frost": 0.826572 / 2, "fog": 0.819324}) == pytest.approx(0.75)
    with pytest.raises(DataError, match="no error of AlexNet for saturate: there are brightness"):
        mean_corruption_error({"saturate": 0.1})
    with pytest.raises(DataError, match="no corruption given"):
        mean_corruption_error({})


def test_mce_by_hand():
    # AlexNet's own errors give 1; half of them, at every severity, a half.
    def rows(corruption, severity):
        step = 0.01 * (severity - 3)  # cancels in the mean over severities
        error = ALEXNET_ERRORS[corruption]
        return {"none": [1 - error - step, 1 - error + step], "block1": [1 - error / 2, 1 - 0.49 * error]}

    cells = full(rows)
    assert why_no_mce(cells) is None
    summary = summary_of(cells)
    none, block1 = summary.find("mCE of none"), summary.find("mCE of block1")
    assert none.value == pytest.approx(1)
    assert (none.low, none.high) == pytest.approx((1, 1))
    assert block1.value == pytest.approx(0.495)
    assert block1.selection == "rule of block1"
    assert block1.high - block1.value == pytest.approx(12.7062 * 0.005, rel=1e-4)
    five = summary.find("accuracy of none", "ImageNet-C, severity 5, mean over 15 corruptions")
    mean = 1 - fmean(ALEXNET_ERRORS.values())
    assert five.value == pytest.approx(mean)
    assert five.high - mean == pytest.approx(12.7062 * 0.02, rel=1e-3)
    assert sum(one.name == "accuracy of none" for one in summary) == 5


def test_mce_of_one_seed_may_exceed_1_and_has_an_interval():
    summary = summary_of(full(lambda c, s: {"none": [0.0], "block1": [0.5]}))
    worst, half = summary.find("mCE of none"), summary.find("mCE of block1")
    assert worst.value == worst.high == pytest.approx(fmean(1 / error for error in ALEXNET_ERRORS.values()))
    assert worst.value == MOST
    assert MOST > 1
    share = wilson_interval(N // 2, N)
    assert (half.value, half.low, half.high) == pytest.approx(tuple(MOST * end for end in share))
    assert worst.interval == half.interval == "wilson"


def test_the_interval_of_one_seed_covers_what_photographs_do():
    """Means over corruptions of the same photographs, drawn again: Wilson's limits hold at least as often as said."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        ease = rng.random((N, 1))  # some photographs are easy under every corruption
        value = float((rng.random((N, 15)) < ease).mean())
        summary = summary_of({("fog", 5): cell({"none": [value]})})
        hits += next(iter(summary)).low <= 0.5 <= next(iter(summary)).high
    assert hits >= 0.95 * 300


def test_why_there_is_no_mce():
    some = full(lambda c, s: {"none": [0.5]})
    assert why_no_mce({key: report for key, report in some.items() if key[0] != "snow"}) == (
        "not all corruptions: 5 of 75 cells are missing, first snow 1"
    )
    five = {key: report for key, report in some.items() if key[1] == 5}
    assert why_no_mce(five) == "not all severities: 60 of 75 cells are missing, first gaussian_noise 1"
    assert not any(one.name.startswith("mCE") for one in summary_of(five))


def test_the_table():
    published, mce = {"none": 18.2, "block1": 50.0}, {"none": 76.7}
    whole = corruption_table(
        summary_of(full(lambda c, s: {"none": [0.2], "block1": [0.5]})), published, mce
    ).splitlines()
    assert whole[0] == (
        "| row | severity 1 (%) | severity 2 (%) | severity 3 (%) | severity 4 (%) | severity 5 (%) | "
        "paper, severity 5 (%) | mCE (%) | paper, mCE (%) |"
    )
    assert whole[2].startswith("| none | 20.0 (15.0 to 26.1) |")
    assert "| 18.2 | 103.5 (" in whole[2]
    assert whole[2].endswith("| 76.7 |")
    assert "| 50 | 64.7 (" in whole[3]
    assert whole[3].endswith("| - |")
    assert "mCE: of 15 corruptions at 5 severities" in whole[-1]

    five = corruption_table(
        summary_of(full(lambda c, s: {"none": [0.2], "block1": [0.5]}, (5,))), published, mce
    ).splitlines()
    assert five[2] == "| none | 20.0 (15.0 to 26.1) | 18.2 |"
    assert "mCE: not all severities" in five[-1]
    # The paper's number is of all corruptions.
    two = corruption_table(summary_of(TWO), published, mce).splitlines()
    assert two[2].endswith("| - |")
    assert "mean over 2 corruption(s), n = 100 photographs, seeds 0, 1" in two[-1]


def test_cells_that_do_not_go_together():
    with pytest.raises(DataError, match="there is no cell to summarise"):
        summary_of({})
    for other in (
        cell({"none": [0.2, 0.3]}),
        cell({"none": [0.2, 0.3], "block1": [0.5, 0.6]}, model="vit"),
        cell({"none": [0.2, 0.3], "block1": [0.5, 0.6]}, seeds=[0, 2]),
    ):
        with pytest.raises(DataError, match="snow 5 was run with another model, other rows or seeds"):
            summary_of({**TWO, ("snow", 5): other})
    with pytest.raises(DataError, match="the cells lack frost 4: a mean over some corruptions would not compare"):
        summary_of({**TWO, ("fog", 4): TWO["fog", 5]})
