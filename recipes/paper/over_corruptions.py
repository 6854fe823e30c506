"""What ImageNet-C's cells give together: mean accuracy over corruptions, and mCE, from one report for each cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from peft_surgical.errors import DataError
from peft_surgical.evaluation import (
    Measurement,
    Report,
    TextTable,
    mean_interval,
    wilson_interval,
)

from .corruptions import ALEXNET_ERRORS, CORRUPTIONS, SEVERITIES

Cells = Mapping[tuple[str, int], Report]
"""(Corruption, severity) -> report of `findings.write_study`."""


def mean_corruption_error(errors: Mapping[str, float]) -> float:
    """mCE: mean over corruptions of the error over AlexNet's, a fraction; the literature prints it in percent.

    Hendrycks & Dietterich 2019, Sec. 4, sum both errors over the severities, which gives the ratio of their means.

    Args:
        errors: Corruption -> the network's top-1 error, its mean over the severities, a fraction.

    Raises:
        DataError: If nothing is given, or AlexNet's error under a corruption is not known.
    """
    if unknown := sorted(set(errors) - set(ALEXNET_ERRORS)):
        raise DataError(f"no error of AlexNet for {', '.join(unknown)}: there are {', '.join(sorted(ALEXNET_ERRORS))}")
    if not errors:
        raise DataError("no corruption given: pass the error of each corruption by name")
    return fmean(error / ALEXNET_ERRORS[name] for name, error in errors.items())


MOST = mean_corruption_error(dict.fromkeys(ALEXNET_ERRORS, 1.0))
"""mCE of a network that is always wrong, which AlexNet is not: more than 1."""


def why_no_mce(cells: Cells) -> str | None:
    """What is missing for mCE, in words; None if nothing is."""
    missing = [f"{c} {s}" for c in CORRUPTIONS for s in SEVERITIES if (c, s) not in cells]
    if not missing:
        return None
    severities = {severity for _, severity in cells}
    what = "severities" if severities != set(SEVERITIES) else "corruptions"
    return (
        f"not all {what}: {len(missing)} of {len(CORRUPTIONS) * len(SEVERITIES)} cells are missing, first {missing[0]}"
    )


def summary_of(cells: Cells) -> Report:
    """Accuracy by severity, the mean over corruptions, and mCE where all cells are there; row by row.

    Every cell has a network of its own: mCE is that of a network which is tuned anew to each corruption and severity.

    Intervals are Student's t over seeds. For a single seed they are Wilson's, as if each photograph counted once: all
    cells show the same photographs, and the mean of several answers to one varies no more than a single answer.

    Raises:
        DataError: There are no cells, or they differ in model, rows or seeds, or lack a corruption at a severity.
    """
    if not cells:
        raise DataError("there is no cell to summarise: run one corruption at least")
    reports = list(cells.values())
    rows, seeds = list(reports[0].settings["by_seed"]), reports[0].settings["seeds"]
    for (corruption, severity), report in cells.items():
        if (report.model, list(report.settings["by_seed"]), report.settings["seeds"]) != (
            reports[0].model,
            rows,
            seeds,
        ):
            raise DataError(
                f"{corruption} {severity} was run with another model, other rows or seeds than the first cell: run all "
                "cells alike"
            )
    corruptions = list(dict.fromkeys(corruption for corruption, _ in cells))
    severities = sorted({severity for _, severity in cells})
    if absent := [f"{c} {s}" for c in corruptions for s in severities if (c, s) not in cells]:
        raise DataError(f"the cells lack {absent[0]}: a mean over some corruptions would not compare")
    n = min(report.settings["parts"]["test"] for report in reports)
    measured = []
    for row in rows:
        right = {cell: report.settings["by_seed"][row] for cell, report in cells.items()}
        rule = reports[0].find(f"accuracy of {row}").selection
        for severity in severities:
            values = [fmean(of_seed) for of_seed in zip(*(right[c, severity] for c in corruptions), strict=True)]
            where = f"ImageNet-C, severity {severity}, mean over {len(corruptions)} corruptions"
            measured.append(_measured(f"accuracy of {row}", where, values, 1.0, n, seeds, rule))
        if why_no_mce(cells) is None:
            errors = [
                {c: 1 - fmean(right[c, s][i] for s in severities) for c in corruptions} for i in range(len(seeds))
            ]
            values = [mean_corruption_error(of_seed) for of_seed in errors]
            measured.append(_measured(f"mCE of {row}", "ImageNet-C", values, MOST, n, seeds, rule))
    settings = {
        "seeds": seeds,
        "corruptions": corruptions,
        "severities": severities,
        "rows": rows,
        "test_images": n,
        "mce": why_no_mce(cells) or "of 15 corruptions at 5 severities",
        "chosen": {f"{c} {s}": report.settings["chosen"] for (c, s), report in cells.items()},
    }
    return Report(reports[0].model, "comparison", tuple(measured), settings)


def _measured(
    name: str, dataset: str, values: Sequence[float], most: float, n: int, seeds: Sequence[int], selection: str
) -> Measurement:
    """A mean over n photographs of numbers between 0 and ``most``, for each seed."""
    if len(values) > 1:
        (value, low, high), kind = mean_interval(values), "t"
        low, high = max(0.0, low), min(most, high)
    else:
        value, kind = values[0], "wilson"
        _, low, high = (most * end for end in wilson_interval(round(value / most * n), n))
        # Wilson's is of whole photographs, and the value is none.
        low, high = min(low, value), max(high, value)
    return Measurement(name, dataset, value, low, high, kind, n, tuple(seeds), selection)


def corruption_table(summary: Report, published: Mapping[str, float], published_mce: Mapping[str, float]) -> str:
    """The summary as Markdown, in percent.

    Args:
        summary: From `summary_of`.
        published: Row -> the paper's accuracy at severity 5, a mean over all 15 corruptions, in percent.
        published_mce: Row -> the paper's mCE in percent.
    """
    settings = summary.settings
    severities, whole = settings["severities"], len(settings["corruptions"]) == len(CORRUPTIONS)
    with_mce = any(one.name.startswith("mCE") for one in summary)
    header = ["row", *(f"severity {severity} (%)" for severity in severities)]
    header += ["paper, severity 5 (%)", *(["mCE (%)", "paper, mCE (%)"] if with_mce else [])]
    lines = []
    for row in settings["rows"]:
        numbers = [_shown(one) for one in summary if one.name == f"accuracy of {row}"]
        cells = [row, *numbers, _paper(published, row) if whole else "-"]
        if with_mce:
            cells += [_shown(summary.find(f"mCE of {row}")), _paper(published_mce, row)]
        lines.append(cells)
    one = len(settings["seeds"]) == 1
    caption = (
        f"ImageNet-C, {summary.model}: test accuracy, mean over {len(settings['corruptions'])} corruption(s), n = "
        f"{settings['test_images']} photographs, seeds {', '.join(map(str, settings['seeds']))}, 95% intervals "
        f"({'over photographs' if one else 't over seeds'}). Every cell is tuned on its own; nothing was chosen on "
        f"test images. mCE: {settings['mce']}. The paper drew other images."
    )
    return TextTable(header, lines, caption).markdown()


def _shown(one: Measurement) -> str:
    return f"{100 * one.value:.1f} ({100 * one.low:.1f} to {100 * one.high:.1f})"


def _paper(published: Mapping[str, float], row: str) -> str:
    return f"{published[row]:g}" if row in published else "-"
