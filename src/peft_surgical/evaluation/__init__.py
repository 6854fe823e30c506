"""Metrics, their intervals, and reports: what is known of a run, and how well.

Metrics and intervals are pure functions. The metrics as ``evaluate.Metric`` are in
`peft_surgical.evaluation.evaluate_metrics`, which needs the extra that installs ``evaluate``.
"""

from .intervals import Interval, interval_of_runs, mean_interval, wilson_interval
from .metrics import (
    ALEXNET_ERRORS,
    SEVERITIES,
    accuracy,
    average_group_accuracy,
    corruption_error,
    corruption_errors,
    group_accuracies,
    mean_corruption_error,
    predicted_classes,
    severity_errors,
    worst_group_accuracy,
)
from .predicting import predict_logits
from .report import ORACLE, Measurement, Report, measure
from .tables import TextTable, plus_minus

__all__ = [
    "ALEXNET_ERRORS",
    "ORACLE",
    "SEVERITIES",
    "Interval",
    "Measurement",
    "Report",
    "TextTable",
    "accuracy",
    "average_group_accuracy",
    "corruption_error",
    "corruption_errors",
    "group_accuracies",
    "interval_of_runs",
    "mean_corruption_error",
    "mean_interval",
    "measure",
    "plus_minus",
    "predict_logits",
    "predicted_classes",
    "severity_errors",
    "wilson_interval",
    "worst_group_accuracy",
]
