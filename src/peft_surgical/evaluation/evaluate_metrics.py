"""The metrics of `peft_surgical.evaluation` as ``evaluate.Metric``: batches, processes, ``evaluate.combine``.

``evaluate.load`` fetches a script from the Hub; these are classes, so they work offline:

    compute_metrics = lambda p: metric("accuracy").compute(predictions=p.predictions, references=p.label_ids)

gives a ``Trainer`` its metric. `WorstGroupAccuracy` needs one column more, ``groups``, in ``add_batch`` or ``compute``;
a ``Trainer`` evaluates in the order of its dataset, so the groups of the dataset fit. Accuracies are fractions.
`judge_with_evaluate` is `metrics.judge` computed by these classes: what recipes report with.

Predictions may be logits (n, classes) or classes (n,), of which only the class is stored. Like every
``evaluate.Metric``, these write to ``cache_dir``, or to evaluate's cache in the user's home; ``keep_in_memory=True``
stores no examples on disk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..extras import require
from . import metrics

require("evaluate", "peft_surgical.evaluation.evaluate_metrics")
import evaluate  # noqa: E402  after require, whose message says what to install
from datasets import Features, Value  # noqa: E402


def _tensor(values: Any, name: str) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().cpu()
    try:
        # A copy: arrays that a Trainer or a memory map hands out may be read-only.
        return torch.tensor(np.asarray(values))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{name} of type {type(values).__name__} are no array of numbers ({error}): pass logits (n, classes) or "
            "class numbers (n,); of a model that returns more than logits, pass predictions[0]"
        ) from error


def _integers(values: Any, name: str) -> Tensor:
    tensor = _tensor(values, name)
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
        raise DataError(f"{name} must be whole numbers, got {tensor.dtype}: pass class or group numbers as int64 (n,)")
    return tensor.to(torch.int64)


class _Metric(evaluate.Metric):
    """What the metrics share: predictions are checked and reduced to classes before evaluate stores them."""

    columns: ClassVar[tuple[str, ...]] = ()
    """Columns of int64 beside predictions and references, one number for each example."""

    def _info(self) -> Any:
        columns = ("predictions", "references", *self.columns)
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description=f"\n\nArgs: {', '.join(columns)}; predictions (n,) or logits (n, classes), others (n,).",
            features=Features({name: Value("int64") for name in columns}),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **columns: Any) -> None:
        """Store a batch, of any size.

        Raises:
            DataError: If a column is missing, unknown or of another length, or a score is NaN.
        """
        given = {"predictions": predictions, "references": references, **columns}
        expected = ["predictions", "references", *self.columns]
        if missing := [name for name in expected if given.get(name) is None]:
            raise DataError(f"{self.name} needs {', '.join(missing)}: pass {', '.join(expected)} for each batch")
        if unknown := [name for name in given if name not in expected]:
            raise DataError(f"{self.name} has no column {', '.join(unknown)}: it takes {', '.join(expected)}")
        labels = _integers(references, "references")
        classes = metrics.predicted_classes(_tensor(predictions, "predictions"), labels)
        batch = {"predictions": classes.to(torch.int64).tolist(), "references": labels.tolist()}
        for name in self.columns:
            column = _integers(columns[name], name)
            if column.shape != labels.shape:
                raise DataError(
                    f"{name} of shape {tuple(column.shape)} do not fit {len(labels)} references: pass one for each "
                    "example"
                )
            batch[name] = column.tolist()
        super().add_batch(**batch)

    def add(self, *, prediction: Any = None, reference: Any = None, **columns: Any) -> None:
        """Store one example: its logits (classes,) or its class, its label, and its columns."""
        if prediction is None or reference is None:
            raise DataError(f"{self.name} needs a prediction and a reference: pass both for each example")
        self.add_batch(
            predictions=_tensor(prediction, "the prediction")[None],
            references=_integers(reference, "the reference")[None],
            **{name: [value] for name, value in columns.items()},
        )

    def _ignore(self, others: Mapping[str, Any]) -> None:
        """Accept the columns of other metrics, which ``evaluate.combine`` passes to all; refuse a mistyped name."""
        known = {name for one in METRICS.values() for name in one.columns}
        if unknown := sorted(set(others) - known):
            raise DataError(
                f"{self.name} does not know {', '.join(unknown)}: these metrics take {', '.join(sorted(known))}"
            )


class Accuracy(_Metric):
    """Share of correct predictions."""

    def _compute(self, *, predictions: Sequence[int], references: Sequence[int], **others: Any) -> dict[str, float]:
        self._ignore(others)
        return {"accuracy": metrics.accuracy(_integers(predictions, ""), _integers(references, ""))}


class WorstGroupAccuracy(_Metric):
    """Accuracy of the worst group, the mean over groups, and each group's (``accuracy_group_3``).

    A group without examples does not count. The mean weighs every group the same; `Accuracy` weighs examples.
    """

    columns: ClassVar[tuple[str, ...]] = ("groups",)

    def _compute(
        self, *, predictions: Sequence[int], references: Sequence[int], groups: Sequence[int], **others: Any
    ) -> dict[str, float]:
        self._ignore(others)
        arrays = [_integers(values, "groups") for values in (predictions, references, groups)]
        each = {f"accuracy_group_{number}": share for number, share in metrics.group_accuracies(*arrays).items()}
        return {
            "worst_group_accuracy": metrics.worst_group_accuracy(*arrays),
            "average_group_accuracy": metrics.average_group_accuracy(*arrays),
            **each,
        }


METRICS: dict[str, type[_Metric]] = {"accuracy": Accuracy, "worst_group_accuracy": WorstGroupAccuracy}
"""Name -> class."""


def metric(name: str, **settings: Any) -> _Metric:
    """A new metric of this name.

    Args:
        name: Key of `METRICS`.
        settings: Arguments of ``evaluate.Metric``, such as ``cache_dir``, ``keep_in_memory``, ``num_process``.

    Raises:
        DataError: If the name is unknown.
    """
    if name not in METRICS:
        raise DataError(f"unknown metric {name!r}: choose one of {', '.join(METRICS)}")
    return METRICS[name](**settings)


def judge_with_evaluate(
    names: Sequence[str], scores: Tensor, labels: Tensor, groups: Tensor | None
) -> dict[str, float]:
    """`metrics.judge`, computed by the ``evaluate.Metric`` classes of this module; nothing stays on disk.

    Arguments, return value and errors as for `metrics.judge`.
    """
    groups = metrics.groups_or_zeros(names, labels, groups)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            if name not in found:  # one class computes both metrics of groups
                one = metric(name if name in METRICS else "worst_group_accuracy", cache_dir=folder, keep_in_memory=True)
                found |= one.compute(predictions=scores, references=labels, **dict.fromkeys(one.columns, groups))
    return {name: found[name] for name in names}
