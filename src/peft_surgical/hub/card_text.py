"""What a model card says in words and tables: pure functions of a config and a report."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..blocks.parsing import NUMBERED
from ..config import SurgicalConfig
from ..errors import ConfigError, SurgicalError
from ..evaluation import ORACLE, Measurement, Report
from ..texts import escaped, markdown_code, markdown_text
from ..tuner.saving import is_repository

_BEFORE = ", before tuning"
_CHOOSING = ("tuning", "training", "validation")
_INTERVALS = {"t": "Student's t over the seeds", "wilson": "Wilson's, over the images"}
_SETTINGS = {
    "recipe": "recipe",
    "dataset": "data",
    "corruption": "corruption",
    "severity": "severity",
    "method": "method",
    "lr": "learning rate",
    "epochs": "epochs",
    "batch_size": "batch size",
    "optimizer": "optimizer",
    "lr_scheduler": "learning rate schedule",
    "weight_decay": "weight decay, which pulls towards the pretrained weights",
    "precision": "precision",
    "augment": "augmentation",
    "tuning_images": "images to tune",
    "validation_images": "images to choose with",
    "images": "images",
    "parts": "images",
    "data_parts": "origin of the parts",
    "head": "head",
    "cost": "cost in training steps, all runs together",
    "versions": "versions",
}
"""The settings of a report that a card shows, in this order, and what it calls them; all are in ``report.json``."""
OPEN = """\
from PIL import Image
from peft_surgical.hub import open_adapted

adapted = open_adapted("{repo}")
logits = adapted.logits(Image.open("photo.jpg"))
print({answer})"""
"""The lines of Python that load an adapter whose base `hub.open_adapted` opens."""
BRING_THE_BASE = """\
import peft_surgical
from peft import PeftModel

model = PeftModel.from_pretrained(base, "{repo}").eval()  # base: the network that it was made on"""
"""Those for an adapter whose base nobody can open by name."""
UNNAMED_BASE = "a network that is not on the Hub"
NORMS = {
    "frozen": "frozen: normalisation statistics are those of the base, everywhere",
    "target": "target: the statistics of the tuned modules moved to the target data, and are in the file",
    "all": "all: the statistics of every module moved to the target data, and are in the file",
    "estimated": "estimated: the statistics of every module are those of the tuning images, and are in the file",
}


@dataclass(frozen=True)
class Row:
    """A measurement and what was tuned for it.

    Attributes:
        tuned: A target or method; ``"none"`` for the base.
        own: Whether it was measured with the adapter that the card describes.
        metric: Such as ``accuracy``.
        dataset: What it was measured on.
        measured: The number, with all that belongs to it.
    """

    tuned: str
    own: bool
    metric: str
    dataset: str
    measured: Measurement

    @property
    def is_test(self) -> bool:
        """Whether nothing was trained or selected on these images."""
        return self.dataset.partition(" ")[0] not in _CHOOSING and ORACLE not in self.measured.selection


class AlternativesTable(NamedTuple):
    """What could have been tuned instead, with one number each; fractions are shown in percent."""

    caption: str
    rows: tuple[tuple[str, float], ...]
    percent: bool


def card_rows(report: Report, comparison: Sequence[Report] = ()) -> list[Row]:
    """The rows of a card's table: for each data set and metric the adapter, then none, all, and what else there is.

    Args:
        report: The adapter's. Its own rows are those of its ``target``.
        comparison: Reports of other targets; their rows with the report's metrics and data sets are taken.
    """
    rows = [_row(report, measured) for measured in report]
    order = {pair: i for i, pair in enumerate(dict.fromkeys((row.metric, row.dataset) for row in rows))}
    others = [_row(other, measured, own=False) for other in comparison for measured in other]
    found: dict[tuple[str, str, str], Row] = {}
    for row in [*rows, *others]:
        if (row.metric, row.dataset) in order:
            found.setdefault((row.metric, row.dataset, row.tuned), row)
    rank = {"none": 1, "all": 2}
    # Sorting is stable: what has no rank stays in the order in which it was reported.
    return sorted(found.values(), key=lambda r: (order[r.metric, r.dataset], 0 if r.own else rank.get(r.tuned, 3)))


def _row(report: Report, measured: Measurement, own: bool = True) -> Row:
    metric, several, tuned = measured.name.partition(" of ")
    dataset = measured.dataset.removesuffix(_BEFORE)
    if not several:
        before = metric.endswith(" before") or dataset != measured.dataset
        metric, tuned = metric.removesuffix(" before"), "none" if before else report.target
    return Row(tuned, own and tuned == report.target, metric, dataset, measured)


def interval_name(kind: str) -> str:
    """What a measurement's interval is, in words."""
    return _INTERVALS.get(kind, kind)


def parents_of(config: SurgicalConfig) -> list[str]:
    """The adapters that this one was combined from, with what is known of each; nothing for one that was trained.

    They are the ``parents`` of the config's ``selection``, or of its ``combined``: names, or mappings with ``adapter``
    and perhaps ``weight``, ``scale`` and ``sha256``.
    """
    choice = config.selection or {}
    rows = choice.get("parents", choice.get("combined", {}).get("parents", ()))
    return [_parent({"adapter": row} if isinstance(row, str) else row) for row in rows]


def _parent(row: Mapping[str, Any]) -> str:
    name = linked(str(row["adapter"]))
    facts = [f"{what} {row[what]:g}" for what in ("weight", "scale") if row.get(what) is not None]
    facts += [f"SHA-256 {markdown_code(row['sha256'][:12] + '...')}"] if row.get("sha256") else []
    return f"{name} ({', '.join(facts)})" if facts else name


def linked(name: str) -> str:
    """A repository's id as a link to it, any other name as code."""
    return f"[{name}](https://huggingface.co/{name})" if is_repository(name) else markdown_code(name)


def why(config: SurgicalConfig) -> str:
    """Who or what chose the target, in one sentence."""
    choice = config.selection
    if not choice:
        return "The target was given by name; no choice from data is recorded."
    if "combined" in choice or "parents" in choice:
        how = choice.get("combined", choice)
        options = [f"{name} {markdown_text(how[name])}" for name in ("density", "majority_sign", "seed") if name in how]
        extra = f" ({', '.join(options)})" if options else ""
        method = markdown_code(how.get("method", "linear"))
        return f"The adapter was not trained: it is combined from others by {method}{extra}."
    if "block_scores" in choice:
        labels = "with" if choice.get("uses_labels", True) else "without"
        limit = f" and at most {choice['budget']:.0%} of the parameters" if choice.get("budget") else ""
        return (
            f"{markdown_code(choice['asked'])} was asked for{limit}: the block was chosen by its "
            f"{markdown_code(choice['criterion'])} score on {int(choice['num_samples'])} "
            f"{markdown_text(choice['split'])} images in {int(choice['num_batches'])} batches, {labels} their labels."
        )
    asked = f"{markdown_code(choice.get('asked', 'a search'))} was asked for, which trains candidates and takes"
    if choice.get("split") == "test":
        return f"{asked} what is best on test images: an oracle's choice, whose accuracy is optimistically biased."
    return f"{asked} what validates best."


def choices(config: SurgicalConfig) -> list[AlternativesTable]:
    """The numbers behind the choice of the target, as the config's ``selection`` has them."""
    choice = config.selection or {}
    found = []
    nested = choice.get("scores")
    for scores in (choice, nested if isinstance(nested, Mapping) else {}):
        if "block_scores" in scores:
            rows = sorted(scores["block_scores"].items(), key=lambda item: _place(item[0]))
            caption = f"{markdown_code(scores['criterion'])} of every block, higher means tune this"
            found.append(AlternativesTable(caption, tuple(rows), percent=False))
    for key, caption in (
        ("validation", "validation accuracy of every candidate"),
        ("learning_rates", "validation accuracy of every learning rate"),
        ("rows", "validation of every row, mean over the seeds"),
        ("test", "test accuracy of every candidate"),
    ):
        if isinstance(choice.get(key), Mapping):
            found.append(AlternativesTable(caption, tuple(choice[key].items()), percent=True))
    return found


def _place(block: str) -> tuple[int, int, str]:
    """A key that sorts blocks in the order in which data flows; a config's JSON is sorted by name."""
    if block in ("embedding", "stem"):
        return 0, 0, block
    number = NUMBERED.fullmatch(block)
    return (1, int(number[2]), block) if number else (2, 0, block)


def moved_of(report: Report | None) -> list[tuple[str, float]]:
    """The base's blocks, each with the L2 norm of its change over its own, where the report says so."""
    moved = report.settings.get("moved") if report is not None else None
    return sorted((moved or {}).items(), key=lambda item: _place(item[0]))


def protocol_of(report: Report | None) -> list[tuple[str, str]]:
    """What the report's settings say about training, as pairs of a name and a value in words."""
    settings = report.settings if report is not None else {}
    shown = [(label, _shown(settings[key])) for key, label in _SETTINGS.items() if key in settings]
    return [(label, text) for label, text in shown if text]


def _shown(value: Any) -> str:
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(part)}" for name, part in value.items() if _shown(part))
    return ", ".join(map(_shown, value)) if isinstance(value, (list, tuple)) else str(value)


def limits_of(config: SurgicalConfig, report: Report | None, rows: Sequence[Row]) -> list[str]:
    """What whoever uses the adapter has to know, each a sentence or two."""
    own = [row for row in rows if row.own]
    seeds = max((row.measured.seeds for row in own), key=len, default=())
    found = ["It fits one base: another one, another revision of it or another dtype is refused when it is loaded."]
    if not own:
        found.append("Nothing was measured: no report came with it. Measure it on your own images before you use it.")
    else:
        found.append("The numbers hold for the data that they name. Measure it on your own images before you use it.")
    if len(seeds) > 1:
        seed = report.settings.get("adapter", {}) if report is not None else {}
        which = f"seed {markdown_text(seed['seed'])}" if isinstance(seed, Mapping) and "seed" in seed else "one of them"
        found.append(f"Means are over the runs of {len(seeds)} seeds; the adapter in this repository is of {which}.")
    if own and not any(_is_source(row.dataset) for row in own):
        found.append("What it makes the base forget was not measured.")
    if any(not row.is_test for row in own):
        found.append("Numbers on images that were selected on are optimistically biased; their selection rule says so.")
    if (config.selection or {}).get("split") == "test" or any(ORACLE in row.measured.selection for row in own):
        found.append("The block or the run was selected on test images: an oracle's choice, not an estimate.")
    if config.scale != 1:
        found.append(f"The deltas are scaled by {config.scale:g}: between the base (0) and what was trained (1).")
    if config.delta_dtype is not None:
        found.append(f"The deltas are rounded to {config.delta_dtype}.")
    return found


def _is_source(dataset: str) -> bool:
    return any(word in ("source", "clean") for word in re.split(r"\W+", dataset.lower()))


@contextmanager
def readable(repo: str) -> Iterator[None]:
    """Raise `ConfigError` for a ``selection`` or ``settings`` of other types than this package writes there."""
    try:
        yield
    except SurgicalError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        raise ConfigError(
            f"no card of {repo} can be written: the selection in its config, or its report, holds what this "
            f"package does not write there ({escaped(str(error))[:200]}). Save or tune it again"
        ) from error
