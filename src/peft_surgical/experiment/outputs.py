"""What an experiment leaves in its folder: the adapter, a report, a figure, a table."""

from __future__ import annotations

import contextlib
import os
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.classes import fit_head
from ..data.labelled import read_data
from ..errors import DataError
from ..evaluation import Interval, Measurement, Report, measure, wilson_interval
from ..extras import require
from ..keys import FIGURE, REPORT
from ..results import published
from ..training.search import HOW, NONE, candidate_of
from ..tuner.saving import write_card
from .choosing import Choice
from .experiment import Experiment
from .keeping import keep_adapter
from .mistakes import MISTAKES, accuracy_of_class, confusion_of, write_mistakes
from .subject import Rows

LOADING = """\
from peft import PeftModel
from peft_surgical.bases import load_base
from peft_surgical.evaluation import Report

report = Report.load({report!r})
base = load_base(report.model, **report.settings["open"])
model = PeftModel.from_pretrained(base.model, {folder!r}).eval()
logits = model(base.transform_eval(image)[None])  # image: a PIL image in RGB"""


# --- reports ---


@dataclass(frozen=True)
class Source:
    """Images of the data that the base was trained on, to measure what tuning makes it forget."""

    rows: Rows
    name: str
    place: str


def read_source(experiment: Experiment, source: Any, **columns: Any) -> Source:
    """The test or validation part that the data brings, or all of it where it brings neither.

    Raises:
        DataError: It has other classes than the experiment's data.
    """
    found = read_data(source, seed=experiment.seed, **columns)
    outputs, place = _outputs_of(experiment, source, found.label_names), place_of(source)
    name = f"source {source if isinstance(source, (str, Path)) else place}"
    if found.test is not None:
        part, name = found.test, f"{name}, test"
    elif found.origin["validation"] == "given":
        part, name = found.validation, f"{name}, validation"
    else:
        part = require("datasets", "reading data").concatenate_datasets([found.tuning, found.validation])
    return Source(Rows(part, experiment.base(experiment.seed).transform_eval, True, outputs), name, place)


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


def place_of(source: Any) -> str:
    """Where data lies: the whole path of a file or folder, an id of the Hub as it is, and of other objects the type."""
    if not isinstance(source, (str, Path)):
        return f"a {type(source).__name__} in memory"
    path = Path(os.path.expanduser(source))
    return str(path.absolute()) if path.exists() else str(source)


@dataclass(frozen=True)
class Tuned:
    """What tuning gave.

    Attributes:
        model: The tuned model as it is loaded from ``adapter``: a PeftModel in ``eval()``, or the base itself where not
            to tune validates best.
        report: Accuracy before and after, and all settings; as in ``report.json``.
        adapter: Folder of the adapter; None where not to tune validates best.
        folder: Folder of report, figure and run log.
    """

    model: Any
    report: Report
    adapter: Path | None
    folder: Path


def write_tuned(experiment: Experiment, choice: Choice, seed: int, source: Source | None = None) -> Tuned:
    """Save the chosen adapter, reload it onto a base that is opened anew, check it, measure it, and draw.

    Raises:
        AdapterError: What is reloaded does not give the logits of what was saved, bit for bit.
    """
    key, folder, data = choice.run.key, experiment.folder, experiment.data(seed)
    kept = keep_adapter(experiment, choice.run, choice.selection, folder)
    privacy = {name: choice.run.result[name] for name in ("epsilon", "delta", "noise") if name in choice.run.result}
    settings = {
        **key,
        "asked": choice.asked,
        "run": experiment.digest(key),
        "cost": choice.cost,
        "taken": {"seconds": choice.seconds, "saved": choice.saved},
        "prefix": choice.run.notes.get("prefix"),
        "head": kept.head,
        "open": kept.opening,
        "data_parts": dict(data.origin),
        "images": {part: len(rows) for part, rows in data.parts.items()},
        "selection": choice.selection,
        "moved": kept.moved,
        **({"privacy": privacy} if privacy else {}),
        **({} if source is None else {"source_from": source.place}),
        **provenance(experiment),
    }
    test = None if data.test is None else experiment.logits(kept.model, experiment.rows("test", seed))
    measured = _measured(experiment, kept.model, choice, seed, source, test)
    with published(folder) as stage:
        if test is not None:
            settings["test"] = _looked_at(experiment, test, seed, stage / MISTAKES)
        report = Report(experiment.model, key["method"], tuple(measured), settings)
        report.save(stage / REPORT)
        draw_or_warn(lambda: figure_of(experiment, choice, report, stage / FIGURE))
    write_card(folder, report)
    experiment.tidy()
    return Tuned(kept.model, report, None if key["method"] == NONE else folder, folder)


def _looked_at(experiment: Experiment, logits: Tensor, seed: int, file: Path) -> dict[str, Any]:
    """The accuracy of each class on the test images and which class is taken for which; mistakes go to a table.

    Where the network has classes that the data has not, the last column of ``confusion`` counts them together.
    """
    rows, names = experiment.rows("test", seed), list(experiment.data(seed).label_names)
    labels = rows.label_tensor
    known, others = experiment.base(seed).label_names, []
    if (outputs := experiment.outputs) is not None:  # those of the data's classes, in their order, and then the others
        others = [output for output in range(logits.shape[1]) if output not in outputs]
        logits = logits[:, [*outputs, *others]]
        labels = torch.tensor([outputs.index(label) for label in labels.tolist()])
    confusion = confusion_of(logits, labels, logits.shape[1])[: len(names)]
    if others:
        confusion = [[*row[: len(names)], sum(row[len(names) :])] for row in confusion]
    found = {
        name: None if share is None else round(share, 4)
        for name, share in zip(names, accuracy_of_class(confusion), strict=True)
    }
    files = list(experiment.data(seed).parts["test"].select_columns(["file"])["file"][:])
    every = [*names, *(known[one] if known else str(one) for one in others)]
    wrong = write_mistakes(file, files, logits, labels, every)
    return {"accuracy_of_class": found, "confusion": confusion, "mistakes": wrong}


def _measured(
    experiment: Experiment, after: nn.Module, choice: Choice, seed: int, source: Source | None, test: Tensor | None
) -> list[Measurement]:
    parts = {part: experiment.rows(part, seed) for part in experiment.data(seed).parts if part != "tuning"}
    biased = f"{choice.rule} on these images, which is optimistically biased"
    rules = dict.fromkeys(parts, choice.rule) | {"validation": biased}
    base = experiment.base(seed)  # before tuning, a new head is a random draw
    if source is not None:
        parts[source.name], rules[source.name] = source.rows, choice.rule
    found = []
    refit = choice.run.key.get(HOW, {}).get("refit", False)
    for part, rows in parts.items():
        for name, model, rule in (("accuracy before", base.model, "none"), ("accuracy", after, rules[part])):
            if refit and model is after and part == "validation":
                # It is trained on these now: what they say is from before.
                how = f"{rule}; measured before the adapter was trained on these images, too"
                value = choice.run.result["validation"]
                found.append(measure(name, [value], dataset=part, n=len(rows), seeds=[seed], selection=how))
                continue
            known = test if model is after and part == "test" else None
            logits = experiment.logits(model, rows) if known is None else known
            value = experiment.judge(["accuracy"], logits, rows.label_tensor, rows.groups)["accuracy"]
            found.append(measure(name, [value], dataset=part, n=len(rows), seeds=[seed], selection=rule))
    return found


def provenance(experiment: Experiment) -> dict[str, Any]:
    """Where the data was, and when, how long and with which versions the experiment was run.

    ``seconds`` is the time of the call that wrote the report, in which ``runs_from_ledger`` runs of earlier calls were
    not repeated.
    """
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "timm", "peft-surgical"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        **({} if callable(experiment.source) else {"data_from": place_of(experiment.source)}),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - experiment.started, 1),
        "runs_from_ledger": len(experiment.found),
        "versions": versions,
    }


# --- figures ---


def draw_or_warn(draw: Callable[[], None]) -> None:
    """Draw a figure, or say what to install for it."""
    try:
        draw()
    except DataError as error:  # without matplotlib the numbers are worth having, too
        warnings.warn(f"no figure: {error}", stacklevel=3)


def figure_of(experiment: Experiment, choice: Choice, report: Report, file: Path) -> None:
    """Draw the validation accuracy of every candidate, what moved, and the scores if the choice depends on them."""
    figures = require("matplotlib.figure", "drawing a figure", "plots")
    best: dict[str, float] = {}
    for run in choice.trials:
        if candidate_of(run).how.refit:  # the candidate that is the best of the others
            continue
        name = str(candidate_of(run))
        best[name] = max(best.get(name, 0.0), run.result["validation"])
    moved, n = report.settings["moved"], report.settings["images"]["validation"]
    looked = report.settings.get("test")
    panels = 2 + (choice.scores is not None) + (looked is not None)
    figure = figures.Figure((5 * panels, 1.5 + 0.25 * max(len(best), len(moved), 6)), layout="constrained")
    axes = figure.subplots(1, panels)
    draw_bars(axes[0], list(best), [wilson_interval(round(value * n), n) for value in best.values()])
    axes[0].set_xlabel("best validation accuracy (%)")
    before = 100 * report.find("accuracy before", "validation").value
    axes[0].axvline(before, linestyle=":", color="black")
    stopped = ", most stopped early" if any("stop" in run.key for run in choice.trials) else ""
    axes[0].set_title(f"candidates (dotted: before, {before:.1f} %){stopped}")
    axes[1].barh(list(moved), list(moved.values()))
    axes[1].invert_yaxis()
    axes[1].set(xlabel="L2 norm of the change / of the block", title="what moved")
    if choice.scores is not None:
        choice.scores.plot(axes[2])
    if looked is not None:
        draw_confusion(axes[-1], list(looked["accuracy_of_class"]), looked["confusion"])
    figure.savefig(file, dpi=120)


def draw_confusion(axes: Any, names: list[str], confusion: list[list[int]]) -> None:
    """Counts of test images, true class by predicted class; the shade is the share of the true class."""
    shares = [[count / max(1, sum(row)) for count in row] for row in confusion]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 20:
        others = ["another class"] * (len(shares[0]) - len(names))
        axes.set_xticks(range(len(shares[0])), [*names, *others], rotation=90)
        axes.set_yticks(range(len(names)), names)
        for i, row in enumerate(confusion):
            for j, count in enumerate(row):
                if count:
                    axes.text(j, i, count, ha="center", va="center", color="white" if shares[i][j] > 0.5 else "black")
    axes.set(xlabel="predicted", ylabel="true", title="test images, tuned")


def draw_bars(axes: Any, names: list[str], found: Sequence[Measurement | Interval]) -> None:
    """Horizontal bars in percent, the first on top, with their intervals."""
    errors = [[100 * (one.value - one.low) for one in found], [100 * (one.high - one.value) for one in found]]
    axes.barh(range(len(names)), [100 * one.value for one in found], xerr=errors, capsize=2)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
