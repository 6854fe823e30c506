"""Metrics against scikit-learn, scipy and hand-worked values; the report's round trip and what it refuses."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from peft_surgical.errors import ConfigError, DataError
from peft_surgical.evaluation import (
    ORACLE,
    Measurement,
    Report,
    TextTable,
    accuracy,
    interval_of_runs,
    mean_interval,
    measure,
    plus_minus,
    predict_logits,
    wilson_interval,
    worst_group_accuracy,
)
from peft_surgical.evaluation.intervals import interval_of
from peft_surgical.evaluation.metrics import JUDGES, check_metrics, group_accuracies, judge, tolerant


@pytest.fixture
def scored():
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(97, 4, generator=generator),
        torch.randint(4, (97,), generator=generator),
        torch.randint(3, (97,), generator=generator),
    )


def test_accuracy_by_hand_and_against_sklearn(scored):
    metrics = pytest.importorskip("sklearn.metrics")
    assert accuracy(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2])) == 0.75
    assert accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1])) == 0.5
    logits, labels, _ = scored
    expected = metrics.accuracy_score(labels.numpy(), logits.argmax(1).numpy())
    assert accuracy(logits, labels) == accuracy(logits.argmax(1), labels) == pytest.approx(expected, abs=1e-15)


def test_group_accuracies_by_hand_and_against_sklearn(scored):
    metrics = pytest.importorskip("sklearn.metrics")
    predictions, labels = torch.tensor([1, 1, 0, 0, 1]), torch.tensor([1, 0, 0, 1, 1])
    groups = torch.tensor([0, 0, 5, 5, 5])
    assert group_accuracies(predictions, labels, groups) == {0: 0.5, 5: 2 / 3}
    assert worst_group_accuracy(predictions, labels, groups) == 0.5
    logits, labels, groups = scored
    found = group_accuracies(logits, labels, groups)
    for group in range(3):
        rows = groups == group
        expected = metrics.accuracy_score(labels[rows].numpy(), logits[rows].argmax(1).numpy())
        assert found[group] == pytest.approx(expected, abs=1e-15)
    assert worst_group_accuracy(logits, labels, groups) == min(found.values())


def test_metrics_refuse_what_does_not_fit(scored):
    logits, labels, groups = scored
    with pytest.raises(DataError, match=r"scores of shape \(96, 4\) do not fit labels of shape \(97,\)"):
        accuracy(logits[1:], labels)
    with pytest.raises(DataError, match="no examples to evaluate on"):
        accuracy(logits[:0], labels[:0])
    with pytest.raises(DataError, match="hold NaN: the model diverged"):
        accuracy(torch.full((2, 2), math.nan), torch.tensor([0, 0]))
    with pytest.raises(DataError, match=r"groups of shape \(96,\) do not fit"):
        worst_group_accuracy(logits, labels, groups[1:])


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (10, 10), (1, 3), (425, 800), (799, 800)])
def test_wilson_interval_against_scipy(correct, n):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(correct, n).proportion_ci(0.95, method="wilson")
    value, low, high = wilson_interval(correct, n)
    assert value == correct / n
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low <= value <= high <= 1


def test_wilson_interval_by_hand():
    # 81 of 263 and z = 1.96: (0.2553, 0.3662), Newcombe 1998, table I.
    assert wilson_interval(81, 263)[1:] == pytest.approx((0.2553, 0.3662), abs=5e-5)
    for correct, n in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(DataError, match=rf"{correct} of {n} correct is not a proportion"):
            wilson_interval(correct, n)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 31])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_mean_interval_against_scipy(count, confidence):
    stats = pytest.importorskip("scipy.stats")
    values = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(count)).tolist()
    mean = sum(values) / count
    low, high = stats.t.interval(confidence, count - 1, loc=mean, scale=stats.sem(values))
    assert mean_interval(values, confidence) == pytest.approx((mean, low, high), rel=1e-9)


def test_runs_that_share_images_have_a_longer_interval():
    values = [0.79, 0.80, 0.83]
    mean, variance = 0.80667, 0.00043333
    # Nadeau & Bengio 2003 by hand: 800 images test and 1,000 tune; t of 2 degrees of freedom.
    half = 4.302653 * ((1 / 3 + 800 / 1000) * variance) ** 0.5
    assert mean_interval(values, ratio=0.8) == pytest.approx((mean, mean - half, mean + half), abs=1e-5)
    assert mean_interval(values, ratio=0.0) == mean_interval(values)
    assert interval_of_runs(values, 800, 0.8) == mean_interval(values, ratio=0.8)
    assert plus_minus(values, ratio=0.8) == f"80.7 ± {100 * half:.1f}"
    with pytest.raises(DataError, match=r"ratio=-1: give a number of at least 0"):
        mean_interval(values, ratio=-1)


def test_mean_interval_by_hand():
    # t(0.975, 2) = 4.3027; values 1, 2, 3: mean 2, standard error 1 / sqrt(3).
    assert mean_interval([1, 2, 3]) == pytest.approx((2, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)
    with pytest.raises(DataError, match=r"1 value\(s\) have no spread.*wilson_interval"):
        mean_interval([0.5])


LABELS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
PREDICTED = torch.tensor([0, 0, 0, 1, 1, 1, 0, 0, 1, 1])  # right: 3 of 4, 2 of 4, 2 of 2


def test_metrics_by_name_by_hand():
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
def test_unknown_names_of_metrics(names):
    with pytest.raises(ConfigError, match=r"name one or more of accuracy, worst_group_accuracy"):
        check_metrics(names)


def test_the_intervals_of_metrics():
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


def test_predict_logits_is_eval_and_restores_every_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model.train()
    model[1].eval()
    inputs = torch.randn(7, 3)
    before = model[1].running_mean.clone()
    logits = predict_logits(model, inputs, batch_size=3)
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert not logits.requires_grad
    assert torch.equal(model[1].running_mean, before)
    with torch.no_grad():
        assert torch.equal(logits, torch.cat([model.eval()(batch) for batch in inputs.split(3)]))


def make(**changes):
    parts = {
        "name": "accuracy",
        "dataset": "frost",
        "value": 0.75,
        "low": 0.7,
        "high": 0.8,
        "interval": "t",
        "n": 800,
        "seeds": (0, 1),
        "selection": "validation",
    }
    return Measurement(**{**parts, **changes})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"selection": ""}, "needs its selection"),
        ({"seeds": ()}, "needs its seeds"),
        ({"dataset": ""}, "needs its dataset"),
        ({"n": 0}, "measured on 0 examples"),
        ({"value": math.nan}, "only finite numbers"),
        ({"value": 75.0, "low": 70.0, "high": 80.0}, "fractions in .0, 1.; divide percent by 100"),
        ({"value": 0.9}, "lies outside its interval"),
    ],
)
def test_a_measurement_without_its_provenance_is_refused(changes, match):
    with pytest.raises(DataError, match=match):
        make(**changes)


def test_measure_chooses_the_interval():
    one = measure("accuracy", [0.75], dataset="frost", n=800, seeds=[3], selection=ORACLE)
    assert (one.value, one.low, one.high) == wilson_interval(600, 800)
    assert (one.interval, one.seeds, one.selection) == ("wilson", (3,), "oracle")
    two = measure("accuracy", [0.70, 0.71], dataset="frost", n=800, seeds=[0, 1], selection="validation")
    assert (two.value, two.low, two.high) == mean_interval([0.70, 0.71])
    assert two.interval == "t"
    wide = measure("accuracy", [0.2, 0.9], dataset="frost", n=800, seeds=[0, 1], selection="validation")
    assert (wide.low, wide.high) == (0, 1)
    assert mean_interval([0.2, 0.9]).high > 1
    text = "accuracy on frost: 75.0 ± 3.0 % (wilson 95% interval, n = 800, 1 seed, selection: oracle)"
    assert str(one) == text
    for values, seeds in (([0.7], [0, 1]), ([], []), ([0.7, 0.8], [0, 0])):
        with pytest.raises(DataError, match="pass one value for each seed, each seed once"):
            measure("accuracy", values, dataset="frost", n=800, seeds=seeds, selection="validation")


def test_report_round_trip(tmp_path):
    report = Report("resnet26", "block1", (make(), make(name="mce", low=0.6, high=1.1)), {"lr": 1e-3, "epochs": 15})
    assert Report.from_json(report.to_json()) == report
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report
    assert [m.name for m in report] == ["accuracy", "mce"]
    assert report.find("accuracy") is report.measurements[0]
    assert report.find("mce", "frost").high == 1.1
    with pytest.raises(
        DataError, match="no 'accuracy' on 'fog' in this report: it holds accuracy on frost; mce on frost"
    ):
        report.find("accuracy", "fog")
    rows = report.to_markdown().splitlines()
    assert rows[2] == "| accuracy | frost | 75.0 | 70.0 to 80.0 (t) | 800 | 0, 1 | validation |"
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.target = "all"


def test_a_damaged_report_is_refused(tmp_path):
    report = Report("resnet26", "block1", (make(),))
    content = json.loads(report.to_json())
    for text in ("{", "[]", "{}", json.dumps({**content, "surplus": 1})):
        with pytest.raises(DataError, match=r"not a report .*expected the JSON of model, target, measurements"):
            Report.from_json(text)
    del content["measurements"][0]["selection"]
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"report\.json: not a report .*selection"):
        Report.load(tmp_path / "report.json")
    with pytest.raises(DataError, match="no plain JSON"):
        Report("resnet26", "block1", (), {"lr": torch.tensor(1.0)}).to_json()


def test_one_run_has_the_interval_of_its_examples_and_several_that_of_their_seeds():
    assert interval_of_runs([0.8], 50) == wilson_interval(40, 50)
    assert interval_of_runs([0.8, 0.9, 0.7], 50) == mean_interval([0.8, 0.9, 0.7])
    with pytest.raises(DataError, match="no run has an interval"):
        interval_of_runs([], 50)


def test_numbers_in_percent_with_their_interval():
    stats = pytest.importorskip("scipy.stats")
    half = 100 * stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3)
    assert plus_minus([0.8, 0.9, 0.7]) == f"80.0 ± {half:.1f}"
    assert plus_minus([-0.8, -0.9, -0.7], sign="+") == f"-80.0 ± {half:.1f}"
    assert plus_minus([0.25], sign="+") == "+25.0"
    _, low, high = wilson_interval(10, 40)
    assert plus_minus([0.25], 40) == f"25.0 ± {50 * (high - low):.1f}"
    assert plus_minus([]) == "-"


def test_a_table_as_markdown_and_on_the_terminal(tmp_path, capsys):
    table = TextTable(["method", "gaussian_noise"], [["[all]", "74.6 ± 0.6"]], "n = 800 [test] images")
    assert (
        table.markdown()
        == "| method | gaussian_noise |\n| --- | --- |\n| [all] | 74.6 ± 0.6 |\n\nn = 800 [test] images\n"
    )
    table.save(tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == table.markdown()
    table.show(title="a title")
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("a title", "gaussian_noise", "[all]", "74.6 ± 0.6", "[test] images"))
    assert TextTable(["a"], []).markdown() == "| a |\n| --- |\n"
    with pytest.raises(DataError, match="a row of 1 cells under 2 columns: all"):
        TextTable(["method", "mean"], [["all"]])
