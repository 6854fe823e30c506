"""What a comparison leaves in its folder: a report, a table and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..errors import reason_of
from ..evaluation import Measurement, Report, TextTable, measure
from ..extras import require
from ..keys import FIGURE, REPORT
from ..results import published
from ..training.ledger import Run
from ..training.search import NONE, SELECTION_SEED
from .experiment import Experiment
from .outputs import draw_bars, draw_or_warn, provenance
from .subject import SEARCHES

TABLE = "table.md"
HEADINGS = ("method", "accuracy (%)", "95% interval", "rank", "cost", "seconds", "saved", "chosen")


def write_compared(
    experiment: Experiment,
    rows: Mapping[str, list[Run]],
    seeds: Sequence[int],
    failed: Mapping[str, Exception] | None = None,
) -> Report:
    """The comparison as a report (with ranks and costs in its settings), a Markdown table and a figure.

    What a later call needs to finish rows that failed stays in the folder.

    Args:
        experiment: The experiment that carried out the runs.
        rows: Row -> its runs, in the order of the seeds.
        seeds: The seeds.
        failed: Rows that are not among them, and why.
    """
    reasons = {name: reason_of(error) for name, error in (failed or {}).items()}
    part = "validation" if experiment.data(seeds[0]).test is None else "test"
    n = len(experiment.data(seeds[0]).parts[part])
    values = {name: [run.result[part] for run in runs] for name, runs in rows.items()}
    measured = [
        measure(f"accuracy of {name}", own, dataset=part, n=n, seeds=seeds, selection=rule_of(experiment, name))
        for name, own in values.items()
    ]
    ranks = {
        name: fmean(1 + sum(other[i] > own[i] for other in values.values()) for i in range(len(seeds)))
        for name, own in values.items()
    }
    missing = f" Missing, since they failed: {', '.join(reasons)}." if reasons else ""
    settings = {
        **experiment.shared,
        "seeds": list(seeds),
        "rank": ranks,
        "cost": {name: fmean(run.result["cost"] for run in runs) for name, runs in rows.items()},
        "taken": {name: {note: mean_of(runs, note) for note in ("seconds", "saved")} for name, runs in rows.items()},
        "chosen": {name: [chosen_of(run) for run in runs] for name, runs in rows.items()},
        "caption": caption_of(experiment, rows, seeds, part) + missing,
        **({"failed": reasons} if reasons else {}),
        **provenance(experiment),
    }
    report = Report(experiment.model, "comparison", tuple(measured), settings)
    with published(experiment.folder) as stage:
        report.save(stage / REPORT)
        TextTable(list(HEADINGS), list(compared(report)), settings["caption"]).save(stage / TABLE)
        draw_or_warn(lambda: bars(measured, list(rows), "accuracy (%)", f"{part}, 95% intervals", stage / FIGURE))
    if not reasons:
        experiment.tidy()
    return report


def caption_of(experiment: Experiment, rows: Mapping[str, list[Run]], seeds: Sequence[int], part: str) -> str:
    """The caption of a comparison's table: data, intervals, selection and units."""
    n, shown = len(experiment.data(seeds[0]).parts[part]), ", ".join(map(str, seeds))
    overlap = ", whose images overlap" if experiment.draws else ""
    interval = f"mean with the 95% interval (Student's t) over the seeds {shown}{overlap}"
    if len(seeds) == 1:
        interval = f"with Wilson's 95% interval over the images, seed {shown}"
    several = any(len(experiment.rates(name)) > 1 for name in rows if name not in SEARCHES)
    rates = f"learning rate by validation accuracy of seed {SELECTION_SEED}, " if several else ""
    searches = "; a search chooses target and rate by that of each seed" if set(rows) & set(SEARCHES) else ""
    used = "test images were not used for selection"
    if part == "validation":
        used = "on the very images that are reported, which is optimistically biased"
    drawn = "drawn" if experiment.draws else "drawn anew"
    head = f" The head is new and {drawn} by each seed." if experiment.head_is_new else ""
    what = "the split and the training order" if experiment.draws else "only the training order"
    return (
        f"{experiment.model}: accuracy in percent on {n} {part} images per seed, {interval}. A seed changes {what}. "
        f"Selection: {rates}epoch by validation accuracy of each run{searches}; {used}.{head} Rank: mean over seeds. "
        "Cost: training steps of one run, or of the whole search. Seconds: the same, measured. Saved: the part of the "
        "cost that was looked up in the cached prefix instead of computed."
    )


def compared(report: Report) -> list[list[str]]:
    """The cells of a comparison's table, a row for each method, below `HEADINGS`."""
    found = []
    for one, (name, rank) in zip(report, report.settings["rank"].items(), strict=True):
        chosen = ", ".join(dict.fromkeys(report.settings["chosen"][name]))
        ends = f"{100 * one.low:.1f} to {100 * one.high:.1f}"
        found.append([name, f"{100 * one.value:.1f}", ends, f"{rank:.1f}", *spent(report.settings, name), chosen])
    return found


def mean_of(runs: Sequence[Run], note: str) -> float | None:
    """The mean over runs of one of `ledger.NOTES`; None where one does not have it."""
    return fmean(run.notes[note] for run in runs) if all(note in run.notes for run in runs) else None


def spent(settings: Mapping[str, Any], name: str) -> list[str]:
    """Cost, seconds and what was saved of a row, from the settings of a report; "-" for what is not known."""
    cost, taken = settings["cost"][name], settings["taken"][name]
    saved = "-" if not cost or taken["saved"] is None else f"{taken['saved'] / cost:.0%}"
    return [f"{cost:.0f}", "-" if taken["seconds"] is None else f"{taken['seconds']:.1f}", saved]


def rule_of(experiment: Experiment, name: str) -> str:
    """How the runs of a row were selected, in words."""
    if name == NONE:
        return "none"
    metric = f"validation {experiment.metrics[0].replace('_', ' ')}"
    if name in SEARCHES:
        return f"{name}: target, learning rate and epoch by {metric} of each seed"
    several = len(experiment.rates(name)) > 1
    return f"{f'learning rate by {metric} of seed {SELECTION_SEED}, ' if several else ''}epoch by {metric}"


def chosen_of(run: Run) -> str:
    """What was chosen for a run, in short."""
    lr = run.key["lr"]
    return run.result.get("chosen") or ("-" if lr is None else f"lr {lr:g}")


def bars(measured: Sequence[Measurement], names: list[str], label: str, title: str, file: Path) -> None:
    """Bars in percent with their intervals, into a file."""
    figures = require("matplotlib.figure", "drawing a figure", "plots")
    figure = figures.Figure((6, 1.5 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    draw_bars(axes, names, measured)
    axes.set(xlabel=label, title=title)
    figure.savefig(file, dpi=120)
