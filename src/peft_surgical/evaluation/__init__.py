"""Metrics, their intervals, and reports: what is known of a run, and how well.

Metrics and intervals are pure functions. The metrics as ``evaluate.Metric`` are in
`peft_surgical.evaluation.evaluate_metrics`, which needs the extra that installs ``evaluate``.
"""

from .intervals import Interval, interval_of_runs, mean_interval, paired_difference, wilson_interval
from .metrics import accuracy, predict_logits, predicted_classes, worst_group_accuracy
from .report import ORACLE, Measurement, Report, TextTable, measure, plus_minus

__all__ = [
    "ORACLE",
    "Interval",
    "Measurement",
    "Report",
    "TextTable",
    "accuracy",
    "interval_of_runs",
    "mean_interval",
    "measure",
    "paired_difference",
    "plus_minus",
    "predict_logits",
    "predicted_classes",
    "wilson_interval",
    "worst_group_accuracy",
]
