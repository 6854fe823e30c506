"""What an experiment leaves in its folder: the adapter, a report, a figure, a table."""

from __future__ import annotations

import contextlib
import platform
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from ..bases.classes import fit_head
from ..data.labelled import read_data
from ..errors import DataError, reason_of
from ..evaluation import Measurement, Report, TextTable, accuracy, measure, wilson_interval
from ..extras import require
from ..keys import FIGURE, REPORT
from ..training.ledger import Run
from ..training.search import NONE, SELECTION_SEED, Candidate
from ..tuner.saving import write_card
from .choosing import Choice
from .experiment import Experiment
from .keeping import keep_adapter
from .rows import Rows
from .subject import SEARCHES

TABLE = "table.md"
LOADING = """\
from peft import PeftModel
from peft_surgical.bases import load_base
from peft_surgical.evaluation import Report

report = Report.load({report!r})
base = load_base(report.model, **report.settings["open"])
model = PeftModel.from_pretrained(base.model, {folder!r}).eval()
logits = model(base.transform_eval(image)[None])  # image: a PIL image in RGB"""


@dataclass(frozen=True)
class Source:
    """The images that the base was good at, to measure what tuning makes it forget; ``outputs`` as for `items`."""

    part: Any
    name: str
    place: str
    outputs: tuple[int, ...] | None


def read_source(experiment: Experiment, source: Any, **columns: Any) -> Source:
    """The test or validation part that the data brings, or all of it where it brings neither.

    Raises:
        DataError: It has other classes than the experiment's data.
    """
    found = read_data(source, seed=experiment.seed, **columns)
    outputs = _outputs_of(experiment, source, found.label_names)
    if found.test is not None:
        return Source(found.test, f"source {source}, test", place_of(source), outputs)
    if found.origin["validation"] == "given":
        return Source(found.validation, f"source {source}, validation", place_of(source), outputs)
    whole = require("datasets", "reading data").concatenate_datasets([found.tuning, found.validation])
    return Source(whole, f"source {source}", place_of(source), outputs)


def _outputs_of(experiment: Experiment, source: Any, names: tuple[str, ...]) -> tuple[int, ...] | None:
    """For each class of the source its output: those of the data's own classes, or else found by name."""
    own, base = experiment.data(experiment.seed).label_names, experiment.base(experiment.seed)
    if names == own:
        return base.outputs
    known = base.label_names or own
    found = fit_head(len(known), known, names, None, False, experiment.model)
    if found.outputs is None:
        raise DataError(
            f"{source} has the classes {', '.join(names[:8])}, the network {', '.join(known[:8])}: what was forgotten "
            "can be measured on data of its classes only"
        )
    return found.outputs


def write_tuned(experiment: Experiment, choice: Choice, seed: int, source: Source | None = None) -> Report:
    """Save the chosen adapter, reload it onto a base that is opened anew, check it, measure it, and draw.

    Raises:
        AdapterError: What is reloaded does not give the logits of what was saved, bit for bit.
    """
    key, folder = choice.run.key, experiment.folder
    kept = keep_adapter(experiment, choice.run, choice.selection, folder)
    after = kept.model
    # Before is what load_base gives: a new head is a random draw then.
    before = experiment.base(seed).model
    report = Report(
        experiment.model,
        key["method"],
        tuple(_measured(experiment, before, after, choice, seed, source)),
        {
            **key,
            "asked": choice.asked,
            "run": experiment.digest(key),
            "cost": choice.cost,
            "head": kept.head,
            "open": kept.opening,
            "data_parts": dict(experiment.data(seed).origin),
            "images": {part: len(rows) for part, rows in experiment.data(seed).parts.items()},
            "selection": choice.selection,
            "moved": kept.moved,
            **({} if source is None else {"source_from": source.place}),
            **_made(experiment),
        },
    )
    report.save(folder / REPORT)
    write_card(folder, report)
    draw_or_warn(lambda: figure_of(experiment, choice, report))
    experiment.tidy()
    return report


def _measured(
    experiment: Experiment, before: nn.Module, after: nn.Module, choice: Choice, seed: int, source: Source | None
) -> list[Measurement]:
    parts = {part: experiment.rows(part, seed) for part in experiment.data(seed).parts if part != "tuning"}
    rules = dict.fromkeys(parts, choice.rule) | {"validation": f"{choice.rule} on these images, so it flatters"}
    if source is not None:
        parts[source.name] = Rows(source.part, experiment.base(seed).transform_eval, True, source.outputs)
        rules[source.name] = choice.rule
    found = []
    for part, rows in parts.items():
        labels = torch.tensor(rows.labels)
        for name, model, rule in (("accuracy before", before, "none"), ("accuracy", after, rules[part])):
            value = accuracy(experiment.logits(model, rows), labels)
            found.append(measure(name, [value], dataset=part, n=len(labels), seeds=[seed], selection=rule))
    return found


def place_of(source: Any) -> str:
    """Where data lies: the whole path of a file or folder, and an id of the Hub as it is."""
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() else str(source)


def _made(experiment: Experiment) -> dict[str, Any]:
    """Where the data was, and when, how long and with which versions the experiment was run.

    ``seconds`` is the time of the call that wrote the report, in which ``runs_from_ledger`` runs of earlier calls were
    not repeated.
    """
    found: dict[str, Any] = {} if callable(experiment.source) else {"data_from": place_of(experiment.source)}
    return found | {
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - experiment.started, 1),
        "runs_from_ledger": len(experiment.found),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Name -> version of Python and of the packages that decide what a run gives, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "timm", "peft-surgical"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


# --- tables ---


def caption_of(experiment: Experiment, rows: Mapping[str, list[Run]], seeds: Sequence[int], part: str) -> str:
    """What a comparison's table has to say about itself."""
    n = len(getattr(experiment.data(seeds[0]), part))
    shown = ", ".join(map(str, seeds))
    if len(seeds) == 1:
        interval = f"with Wilson's 95% interval over the images, seed {shown}"
    else:
        overlap = ", whose images overlap" if experiment.draws else ""
        interval = f"mean with the 95% interval (Student's t) over the seeds {shown}{overlap}"
    several = any(len(experiment.rates(name)) > 1 for name in rows if name not in SEARCHES)
    rates = f"learning rate by validation accuracy of seed {SELECTION_SEED}, " if several else ""
    searches = "; a search chooses target and rate by that of each seed" if set(rows) & set(SEARCHES) else ""
    honest = "no test image had a say" if part == "test" else "on the very images that are reported, so it flatters"
    head = (
        f" The head is new and {'drawn' if experiment.draws else 'drawn anew'} by each seed."
        if experiment.head_is_new
        else ""
    )
    what = "the split and the training order" if experiment.draws else "only the training order"
    return (
        f"{experiment.model}: accuracy in percent on {n} {part} images per seed, {interval}. A seed changes {what}. "
        f"Selection: {rates}epoch by validation accuracy of each run{searches}; {honest}.{head} Rank: mean over seeds. "
        "Cost: training steps of one run, or of the whole search."
    )


def write_compared(
    experiment: Experiment,
    rows: Mapping[str, list[Run]],
    seeds: Sequence[int],
    failed: Mapping[str, Exception] | None = None,
) -> Report:
    """The comparison as a report (with ranks and costs in its settings), a Markdown table and a figure.

    What a later call needs to finish rows that failed stays in the folder.

    Args:
        experiment: That ran it.
        rows: Row -> its runs, in the order of the seeds.
        seeds: The seeds.
        failed: Rows that are not among them, and why.
    """
    reasons = {name: reason_of(error) for name, error in (failed or {}).items()}
    part = "validation" if experiment.data(seeds[0]).test is None else "test"
    n = len(getattr(experiment.data(seeds[0]), part))
    values = {name: [run.result[part] for run in runs] for name, runs in rows.items()}
    rules = {name: rule_of(experiment, name) for name in rows}
    measured = [
        measure(f"accuracy of {name}", values[name], dataset=part, n=n, seeds=seeds, selection=rules[name])
        for name in rows
    ]
    ranks = {
        name: fmean(1 + sum(other[i] > values[name][i] for other in values.values()) for i in range(len(seeds)))
        for name in rows
    }
    settings = {
        **experiment.shared,
        "seeds": list(seeds),
        "rank": ranks,
        "cost": {name: fmean(run.result["cost"] for run in runs) for name, runs in rows.items()},
        "chosen": {name: [chosen_of(run) for run in runs] for name, runs in rows.items()},
        "caption": caption_of(experiment, rows, seeds, part) + _missing(reasons),
        **({"failed": reasons} if reasons else {}),
        **_made(experiment),
    }
    report = Report(experiment.model, "comparison", tuple(measured), settings)
    folder = experiment.folder
    report.save(folder / REPORT)
    TextTable(COMPARED, list(compared(report)), settings["caption"]).save(folder / TABLE)
    draw_or_warn(lambda: bars(measured, list(rows), "accuracy (%)", f"{part}, 95% intervals", folder / FIGURE))
    if not reasons:
        experiment.tidy()
    return report


def _missing(failed: Mapping[str, str]) -> str:
    return f" Missing, since they failed: {', '.join(failed)}." if failed else ""


COMPARED = ["method", "accuracy (%)", "95% interval", "rank", "cost", "chosen"]


def compared(report: Report) -> list[list[str]]:
    """The cells of a comparison's table, a row for each method, below the headings `COMPARED`."""
    found = []
    for one, (name, rank) in zip(report, report.settings["rank"].items(), strict=True):
        chosen = ", ".join(dict.fromkeys(report.settings["chosen"][name]))
        ends = f"{100 * one.low:.1f} to {100 * one.high:.1f}"
        cost = f"{report.settings['cost'][name]:.0f}"
        found.append([name, f"{100 * one.value:.1f}", ends, f"{rank:.1f}", cost, chosen])
    return found


def rule_of(experiment: Experiment, name: str) -> str:
    """How the runs of a row were selected, in words."""
    if name == NONE:
        return "none"
    metric = f"validation {experiment.metrics[0].replace('_', ' ')}"
    if name in SEARCHES:
        return f"{name}: target, learning rate and epoch by {metric} of each seed"
    several = len(experiment.rates(name)) > 1
    rate = f"learning rate by {metric} of seed {SELECTION_SEED}, " if several else ""
    return f"{rate}epoch by {metric}"


def chosen_of(run: Run) -> str:
    """What was chosen for a run, in short."""
    lr = run.key["lr"]
    return run.result.get("chosen") or ("-" if lr is None else f"lr {lr:g}")


# --- figures ---


def draw_or_warn(draw: Any) -> None:
    """Draw a figure, or say what to install for it."""
    try:
        draw()
    except DataError as error:  # without matplotlib the numbers are worth having, too
        warnings.warn(f"no figure: {error}", stacklevel=3)


def figure_of(experiment: Experiment, choice: Choice, report: Report) -> None:
    """Validation accuracy of every candidate, the scores if they had a say, and what moved."""
    figures = require("matplotlib.figure", "drawing a figure", "plots")
    best: dict[str, float] = {}
    for run in choice.trials:
        name = str(Candidate(run.key["method"], run.key["lr"]))
        best[name] = max(best.get(name, 0.0), run.result["validation"])
    moved = report.settings["moved"]
    panels = 2 + (choice.scores is not None)
    height = 1.5 + 0.25 * max(len(best), len(moved), 6)
    figure = figures.Figure(figsize=(5 * panels, height), layout="constrained")
    axes = figure.subplots(1, panels)
    n = report.settings["images"]["validation"]
    intervals = [wilson_interval(round(value * n), n) for value in best.values()]
    _bar(axes[0], list(best), [100 * i.value for i in intervals], "best validation accuracy (%)")
    errors = [[100 * (i.value - i.low) for i in intervals], [100 * (i.high - i.value) for i in intervals]]
    axes[0].errorbar([100 * i.value for i in intervals], range(len(best)), xerr=errors, fmt="none", color="black")
    before = 100 * report.find("accuracy before", "validation").value
    axes[0].axvline(before, linestyle=":", color="black")
    stopped = ", most stopped early" if any("stop" in run.key for run in choice.trials) else ""
    axes[0].set_title(f"candidates (dotted: before, {before:.1f} %){stopped}")
    _bar(axes[1], list(moved), list(moved.values()), "L2 norm of the change / of the block")
    axes[1].set_title("what moved")
    if choice.scores is not None:
        choice.scores.plot(axes[2])
    figure.savefig(experiment.folder / FIGURE, dpi=120)


def _bar(axes: Any, names: list[str], values: list[float], label: str) -> None:
    axes.barh(range(len(names)), values)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(label)


def bars(measured: Sequence[Measurement], names: list[str], label: str, title: str, file: Path) -> None:
    """Bars in percent with their intervals, into a file."""
    figures = require("matplotlib.figure", "drawing a figure", "plots")
    figure = figures.Figure(figsize=(6, 1.5 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    values = [100 * one.value for one in measured]
    _bar(axes, names, values, label)
    errors = [[100 * (o.value - o.low) for o in measured], [100 * (o.high - o.value) for o in measured]]
    axes.errorbar(values, range(len(names)), xerr=errors, fmt="none", color="black", capsize=2)
    axes.set_title(title)
    figure.savefig(file, dpi=120)
