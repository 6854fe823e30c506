"""The metrics for evaluate against hand-worked values and scikit-learn, in batches, two processes and combined."""

import ast
import importlib
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from peft_surgical.errors import DataError
from peft_surgical.evaluation import metrics as evaluation

evaluate = pytest.importorskip("evaluate")
metrics = pytest.importorskip("peft_surgical.evaluation.evaluate_metrics")


@pytest.fixture
def make(tmp_path):
    return lambda name, **settings: metrics.metric(name, cache_dir=str(tmp_path), **settings)


@pytest.fixture
def scored():
    rng = np.random.default_rng(0)
    return rng.normal(size=(97, 4)).astype(np.float32), rng.integers(4, size=97), rng.integers(3, size=97)


def test_the_package_does_not_import_evaluate():
    # Read, not run: a fresh interpreter takes seconds to import the package.
    for file in sorted(Path(evaluation.__file__).parents[1].rglob("*.py")):
        if file.name == "evaluate_metrics.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"evaluate", "evaluate_metrics"}, file


def test_without_evaluate_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    monkeypatch.delitem(sys.modules, "peft_surgical.evaluation.evaluate_metrics")
    with pytest.raises(
        DataError,
        match=r'peft_surgical\.evaluation\.evaluate_metrics needs evaluate: pip install "peft-surgical\[recipes\]"',
    ):
        importlib.import_module("peft_surgical.evaluation.evaluate_metrics")


def test_registry(make):
    for name, cls in metrics.METRICS.items():
        one = make(name)
        assert isinstance(one, evaluate.Metric)
        assert type(one) is cls
        assert one.name == name
        assert set(one.features) == {"predictions", "references", *cls.columns}
    with pytest.raises(DataError, match="unknown metric 'f1': choose one of accuracy, worst_group_accuracy"):
        metrics.metric("f1")


def test_accuracy_by_hand_and_against_sklearn(make, scored):
    sklearn = pytest.importorskip("sklearn.metrics")
    one = make("accuracy")
    assert one.compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2]) == {"accuracy": 0.75}
    logits, labels, _ = scored
    expected = sklearn.accuracy_score(labels, logits.argmax(1))
    for predictions in (logits, logits.argmax(1), torch.from_numpy(logits), logits.tolist()):
        found = one.compute(predictions=predictions, references=labels)
        assert found["accuracy"] == pytest.approx(expected, abs=1e-15)


def test_accuracy_is_a_trainers_compute_metrics(make, scored):
    logits, labels, _ = scored
    logits.setflags(write=False)  # as a Trainer that gathers from a memory map may hand them out
    one = make("accuracy")
    found = (lambda p: one.compute(predictions=p.predictions, references=p.label_ids))(EvalPrediction(logits, labels))
    assert found == {"accuracy": evaluation.accuracy(torch.tensor(logits), torch.tensor(labels))}
    with pytest.raises(DataError, match=r"of a model that returns more than logits, pass predictions\[0\]"):
        one.compute(predictions=(logits, logits[:, :2]), references=labels)


def test_batches_and_single_examples_add_up(make, scored):
    logits, labels, groups = scored
    whole = make("worst_group_accuracy").compute(predictions=logits, references=labels, groups=groups)
    one = make("worst_group_accuracy", keep_in_memory=True)
    for rows in np.array_split(np.arange(90), 4):
        one.add_batch(predictions=logits[rows], references=labels[rows], groups=groups[rows])
    one.add_batch(predictions=logits[:0], references=labels[:0], groups=groups[:0])
    for row in range(90, 97):
        one.add(prediction=logits[row], reference=labels[row], groups=groups[row])
    assert one.compute() == whole
    # The examples are gone: the next evaluation starts afresh.
    assert one.compute(predictions=[1], references=[1], groups=[7])["accuracy_group_7"] == 1


def test_worst_group_by_hand_and_against_sklearn(make, scored):
    sklearn = pytest.importorskip("sklearn.metrics")
    found = make("worst_group_accuracy").compute(
        predictions=[1, 1, 0, 0, 1], references=[1, 0, 0, 1, 1], groups=[0, 0, 5, 5, 5]
    )
    assert found == {
        "worst_group_accuracy": 0.5,
        "average_group_accuracy": pytest.approx(7 / 12),  # not 3 / 5, the accuracy
        "accuracy_group_0": 0.5,
        "accuracy_group_5": pytest.approx(2 / 3),
    }
    logits, labels, groups = scored
    found = make("worst_group_accuracy").compute(predictions=logits, references=labels, groups=groups)
    each = [sklearn.accuracy_score(labels[groups == g], logits[groups == g].argmax(1)) for g in range(3)]
    assert [found[f"accuracy_group_{g}"] for g in range(3)] == pytest.approx(each, abs=1e-15)
    assert found["worst_group_accuracy"] == pytest.approx(min(each))
    assert found["average_group_accuracy"] == pytest.approx(sum(each) / 3)


def test_judging_with_evaluate_is_judging(scored, tmp_path, monkeypatch):
    """The same numbers, to the last bit, and nothing left on disk."""
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "cache"))
    logits, labels, groups = (torch.from_numpy(values) for values in scored)
    for scores in (logits, logits.argmax(1), evaluation.tolerant(logits)):
        for names in (["accuracy"], ["average_group_accuracy"], list(evaluation.JUDGES), list(evaluation.JUDGES)[::-1]):
            found = metrics.judge_with_evaluate(names, scores, labels, groups)
            assert found == evaluation.judge(names, scores, labels, groups)
            assert list(found) == names
    found = metrics.judge_with_evaluate(["accuracy"], logits, labels, None)
    assert found == evaluation.judge(["accuracy"], logits, labels, None)
    with pytest.raises(DataError, match="worst_group_accuracy needs the group of every image"):
        metrics.judge_with_evaluate(["worst_group_accuracy"], logits, labels, None)
    with pytest.raises(DataError, match="the scores hold NaN"):
        metrics.judge_with_evaluate(["accuracy"], logits * math.nan, labels, None)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"predictions": np.zeros((3, 4))}, r"scores of shape \(3, 4\) do not fit labels of shape \(2,\)"),
        ({"predictions": np.full((2, 4), math.nan)}, "the scores hold NaN: the model diverged"),
        ({"predictions": [0.0, math.nan]}, "the scores hold NaN"),
        ({"predictions": [0.0, 0.7]}, r"0\.7 is no predicted class: pass logits"),
        ({"predictions": [[1, 2], [3]]}, "predictions of type list are no array of numbers"),
        ({"predictions": ["cat", "dog"]}, "predictions of type list are no array of numbers"),
        ({"predictions": None}, "worst_group_accuracy needs predictions: pass predictions, references, groups"),
        ({"references": [0.5, 1.0]}, "references must be whole numbers, got torch.float64"),
        ({"references": [[0], [1]]}, r"do not fit labels of shape \(2, 1\)"),
        ({"groups": None}, "worst_group_accuracy needs groups"),
        ({"groups": [1]}, r"groups of shape \(1,\) do not fit 2 references"),
        ({"groups": [[1], [2]]}, r"groups of shape \(2, 1\) do not fit 2 references"),
        ({"groups": [0.5, 1]}, "groups must be whole numbers"),
        ({"group": [1, 2]}, "worst_group_accuracy has no column group: it takes predictions, references, groups"),
    ],
)
def test_batches_that_do_not_fit_are_refused(make, change, match):
    one = make("worst_group_accuracy")
    good = {"predictions": [0, 1], "references": [0, 0], "groups": [3, 4]}
    with pytest.raises(DataError, match=match):
        one.add_batch(**{**good, **change})
    # Nothing of a refused batch is kept.
    one.add_batch(**good)
    assert one.compute()["average_group_accuracy"] == 0.5


def test_no_examples_and_mistyped_arguments_are_refused(make):
    one = make("accuracy")
    one.add_batch(predictions=[], references=[])
    with pytest.raises(DataError, match="no examples to evaluate on"):
        one.compute()
    with pytest.raises(DataError, match="accuracy does not know minmum: these metrics take groups"):
        one.compute(predictions=[1], references=[1], minmum=3)
    with pytest.raises(DataError, match="needs a prediction and a reference"):
        one.add(prediction=1)
    # After an error it serves again.
    assert one.compute(predictions=[1], references=[1]) == {"accuracy": 1}


def test_combine(make, scored):
    logits, labels, groups = scored
    both = evaluate.combine([make("accuracy"), make("worst_group_accuracy")])
    for rows in np.array_split(np.arange(97), 3):
        both.add_batch(predictions=logits[rows], references=labels[rows], groups=groups[rows])
    found = both.compute()
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())
    assert found["worst_group_accuracy"] == min(found[f"accuracy_group_{g}"] for g in range(3))
    assert both.compute(predictions=logits, references=labels, groups=groups) == found


def test_two_processes_add_up(make, scored):
    logits, labels, groups = scored
    whole = make("worst_group_accuracy").compute(predictions=logits, references=labels, groups=groups)

    def process(number):
        # evaluate's processes meet through files and their locks; threads meet in the same way, without a start-up.
        one = make("worst_group_accuracy", num_process=2, process_id=number, experiment_id="two", timeout=30)
        rows = np.arange(number, 97, 2)
        one.add_batch(predictions=logits[rows], references=labels[rows], groups=groups[rows])
        return one.compute()

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(process, (0, 1))
    assert first == whole
    assert second is None
