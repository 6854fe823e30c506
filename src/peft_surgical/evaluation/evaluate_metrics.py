"""The metrics of :mod:`peft_surgical.evaluation` as ``evaluate.Metric``: batches, processes, ``evaluate.combine``.

``evaluate.load`` fetches a script from the Hub; these are classes, so they work offline:

    compute_metrics = lambda p: metric("accuracy").compute(predictions=p.predictions, references=p.label_ids)

gives a ``Trainer`` its metric. One that needs more than predictions and labels gets a column for it, such as
``groups``, in ``add_batch`` or ``compute``; a ``Trainer`` evaluates in the order of its dataset, so the groups of the
dataset fit. Every accuracy and error is a fraction.

Predictions may be logits (n, classes) or classes (n,). Only the class is stored, so a set of any size fits on disk, and
what does not fit fails with its batch. Like every ``evaluate.Metric``, these write to ``cache_dir``, or to evaluate's
cache in the user's home; ``keep_in_memory=True`` stores no examples on disk.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import fmean
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

    columns: ClassVar[Mapping[str, str]] = {}
    """Columns beside predictions and references -> their type in datasets."""

    def _info(self) -> Any:
        columns = "".join(f"    {name} ({kind}): one for each example.\n" for name, kind in self.columns.items())
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description=(
                "\n\nArgs:\n    predictions: logits (n, classes) or classes (n,).\n    references: classes (n,).\n"
                + columns
            ),
            features=Features(
                {name: Value(kind) for name, kind in {"predictions": "int64", "references": "int64"}.items()}
                | {name: Value(kind) for name, kind in self.columns.items()}
            ),
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
        for name, kind in self.columns.items():
            batch[name] = self._column(name, kind, columns[name], len(labels))
        super().add_batch(**batch)

    @staticmethod
    def _column(name: str, kind: str, values: Any, n: int) -> list[Any]:
        if isinstance(values, str) or np.ndim(values) == 0:  # one for the whole batch
            values = [values] * n
        column = [str(v) for v in values] if kind == "string" else _integers(values, name).tolist()
        if len(column) != n or any(isinstance(value, list) for value in column):
            raise DataError(
                f"{name} of shape {tuple(np.shape(values))} do not fit {n} references: pass one for each example"
            )
        return column

    def add(self, *, prediction: Any = None, reference: Any = None, **columns: Any) -> None:
        """Store one example: its logits (classes,) or its class, its label, and its columns."""
        if prediction is None or reference is None:
            raise DataError(f"{self.name} needs a prediction and a reference: pass both for each example")
        self.add_batch(
            predictions=_tensor(prediction, "the prediction")[None],
            references=_integers(reference, "the reference")[None],
            **{name: [value] for name, value in columns.items()},
        )

    def _tolerate(self, others: Mapping[str, Any]) -> None:
        # evaluate.combine hands every argument to every metric: those of the others pass, a mistyped one does not.
        known = {"minimum", "ignore", "baseline", *(name for c in METRICS.values() for name in c.columns)}
        if unknown := sorted(set(others) - known):
            raise DataError(
                f"{self.name} does not know {', '.join(unknown)}: these metrics take {', '.join(sorted(known))}"
            )


class Accuracy(_Metric):
    """Share of correct predictions."""

    def _compute(self, *, predictions: Sequence[int], references: Sequence[int], **others: Any) -> dict[str, float]:
        self._tolerate(others)
        return {"accuracy": metrics.accuracy(_integers(predictions, ""), _integers(references, ""))}


def _by_group(
    kind: str,
    predictions: Sequence[int],
    references: Sequence[int],
    groups: Sequence[int],
    minimum: int,
    ignore: Collection[int],
) -> dict[str, float]:
    arrays = [_integers(values, kind) for values in (predictions, references, groups)]
    worst = metrics.worst_group_accuracy(*arrays, minimum=minimum, ignore=ignore)
    average = metrics.average_group_accuracy(*arrays, minimum=minimum, ignore=ignore)
    each = {f"accuracy_{kind}_{number}": a for number, a in metrics.group_accuracies(*arrays).items()}
    return {f"worst_{kind}_accuracy": worst, f"average_{kind}_accuracy": average, **each}


class WorstGroupAccuracy(_Metric):
    """Accuracy of the worst group, the mean over groups, and each group's (``accuracy_group_3``).

    A group without examples does not count. The mean weighs every group the same; :class:`Accuracy` weighs examples.
    """

    columns: ClassVar[Mapping[str, str]] = {"groups": "int64"}

    def _compute(
        self, *, predictions: Sequence[int], references: Sequence[int], groups: Sequence[int], **others: Any
    ) -> dict[str, float]:
        self._tolerate(others)
        return _by_group("group", predictions, references, groups, 1, ())


class WorstRegionAccuracy(_Metric):
    """The same over regions, as for FMoW, of which some may not count.

    ``compute`` takes ``minimum``, the number of examples that a region needs to count (1), and ``ignore``, regions that
    never count. WILDS leaves out the region "Other" and regions without examples, and has no other minimum: for its
    number pass ``ignore=[the number of "Other"]``. Regions that do not count still have their own accuracy shown.
    """

    columns: ClassVar[Mapping[str, str]] = {"regions": "int64"}

    def _compute(
        self,
        *,
        predictions: Sequence[int],
        references: Sequence[int],
        regions: Sequence[int],
        minimum: int = 1,
        ignore: Collection[int] = (),
        **others: Any,
    ) -> dict[str, float]:
        self._tolerate(others)
        return _by_group("region", predictions, references, regions, minimum, ignore)


class CorruptionError(_Metric):
    """Corruption error of each corruption and their mean, mCE (Hendrycks & Dietterich 2019), as fractions.

    ``corruptions`` and ``severities`` may be one value for a whole batch. ``compute`` takes ``baseline``, by default
    AlexNet's errors on ImageNet-C, which need severities 1 to 5; see :func:`metrics.corruption_errors` for others.
    """

    columns: ClassVar[Mapping[str, str]] = {"corruptions": "string", "severities": "int64"}

    def _compute(
        self,
        *,
        predictions: Sequence[int],
        references: Sequence[int],
        corruptions: Sequence[str],
        severities: Sequence[int],
        baseline: Mapping[str, float | Mapping[int, float]] = metrics.ALEXNET_ERRORS,
        **others: Any,
    ) -> dict[str, float]:
        self._tolerate(others)
        errors = metrics.severity_errors(
            _integers(predictions, ""), _integers(references, ""), list(corruptions), _integers(severities, "")
        )
        each = metrics.corruption_errors(errors, baseline)
        # Nothing added raises above, where the examples are counted.
        return {"mean_corruption_error": fmean(each.values())} | {f"corruption_error_{c}": e for c, e in each.items()}


METRICS: dict[str, type[_Metric]] = {
    "accuracy": Accuracy,
    "worst_group_accuracy": WorstGroupAccuracy,
    "worst_region_accuracy": WorstRegionAccuracy,
    "corruption_error": CorruptionError,
}
"""Name -> class."""


def metric(name: str, **settings: Any) -> _Metric:
    """A new metric of this name.

    Args:
        name: Key of :data:`METRICS`.
        settings: Of ``evaluate.Metric``, such as ``cache_dir``, ``keep_in_memory``, ``num_process``, ``process_id``.

    Raises:
        DataError: If the name is unknown.
    """
    if name not in METRICS:
        raise DataError(f"unknown metric {name!r}: choose one of {', '.join(METRICS)}")
    return METRICS[name](**settings)
