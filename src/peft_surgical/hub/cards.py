"""Model cards of adapters, and their figure, from config, report, the file and what none of them knows (`About`).

Every number on a card is a `Measurement` of the report or a property of the adapter's file. A field that is missing is
an error that says how to give it; nothing is filled with a placeholder, and without a report the card says that nothing
was measured. The template is ``templates/adapter.md.jinja`` beside this module.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..adapters.adapter import read_adapter
from ..adapters.remote import HTTPError, explained, patiently
from ..config import SurgicalConfig
from ..errors import ConfigError
from ..evaluation import Report
from ..extras import require
from ..keys import CARD, FIGURE
from ..texts import markdown_code, markdown_text
from ..tuner.saving import IMPORT, LOAD_WITH, PAGE_MARK, TAGS, is_repository, target_of
from . import card_text
from .card_text import Row, card_rows

Place = str | os.PathLike[str]
TEMPLATE = "adapter.md.jinja"
TASK = "image-classification"
SHA256 = "weights_sha256"
"""The key of a card's metadata under which the SHA-256 of the adapter file stands."""
UNNAMED_DATA = "imagefolder"
"""What the Hub calls a data set that is no repository of its own."""

_HOW = {
    "license": 'the licence of the deltas, an identifier of the Hub: license="apache-2.0"',
    "license_name": 'what a licence "other" is called: license_name="..."',
    "datasets": "the data sets it was tuned on, as repositories of the Hub, or none where they are not there: "
    'datasets=["uoft-cs/cifar10"] or datasets=[]',
    "base": 'the base that it was made on: base="timm/resnet50.a1_in1k"',
    "loading": "the lines of Python that load it: loading=, as its base cannot be opened by name",
}
_LARGEST = 10  # tensors that the figure has room for


@dataclass(frozen=True)
class About:
    """What a card shows that neither config nor report nor file knows. What is None is missing.

    Attributes:
        repo: The repository, ``owner/name``.
        license: An identifier of the Hub, or ``"other"``.
        datasets: Repositories of the data; empty where it is not on the Hub.
        base: The base's repository; in words where it is not on the Hub.
        loading: Lines of Python that load the adapter; None for a base that `hub.open_adapted` opens.
        base_revision: The base's commit.
        base_parameters: Number of values in the parameters of the base.
        opens: Whether `hub.open_adapted` can open the base; the card's lines call it then.
        labelled: Whether the record of the base names the classes.
        license_name: For ``"other"``.
        license_link: For ``"other"``, if there is a text to link to.
        figure: File name of the figure beside the card.
        comparison: Reports of other targets on the same data, such as none and all.
        tags: Further tags.
        complete: Whether a licence and data sets that are missing are an error.
        page: Whether the card lies beside the adapter, where it is written anew when that is saved.
    """

    repo: str
    license: str | None = None
    datasets: tuple[str, ...] | None = None
    base: str | None = None
    loading: str | None = None
    base_revision: str | None = None
    base_parameters: int | None = None
    opens: bool = True
    labelled: bool = False
    license_name: str | None = None
    license_link: str | None = None
    figure: str | None = None
    comparison: tuple[Report, ...] = ()
    tags: tuple[str, ...] = ()
    complete: bool = True
    page: bool = False


def card_of(config: SurgicalConfig, report: Report | None, weights: Mapping[str, Any], about: About) -> ModelCard:
    """The card of an adapter.

    Args:
        config: The adapter's, as it is on disk.
        report: Its numbers; None where nothing was measured.
        weights: Its file: `Adapter.summary`.
        about: What none of them knows.

    Raises:
        ConfigError: Something is missing; names all of it, and how to give it. Or config or report hold what no card
            can show.
    """
    check(about)
    with card_text.readable(about.repo):
        return ModelCard(_text_of(config, report, weights, about))


def _text_of(config: SurgicalConfig, report: Report | None, weights: Mapping[str, Any], about: About) -> str:
    rows = card_rows(report, about.comparison) if report is not None else []
    answer = "adapted.label_names[logits.argmax()]" if about.labelled else "logits.softmax(-1)"
    # Not `ModelCard.from_template`, which would write an empty string for a name that nothing gives.
    return str(
        _environment()
        .get_template(TEMPLATE)
        .render(
            metadata=_metadata(rows, weights["sha256"], about).to_yaml(),
            name=about.repo.rpartition("/")[2],
            config=config,
            weights=weights,
            about=about,
            base=card_text.linked(str(about.base)) if is_repository(str(about.base)) else markdown_text(about.base),
            norm=card_text.NORMS[config.norm_stats],
            target=target_of(config),
            mark=PAGE_MARK,
            parents=card_text.parents_of(config),
            why=card_text.why(config),
            choices=card_text.choices(config),
            rows=rows,
            moved=card_text.moved_of(report),
            protocol=card_text.protocol_of(report),
            limits=card_text.limits_of(config, report, rows),
            loading=about.loading or card_text.OPEN.format(repo=about.repo, answer=answer),
        )
    )


def check(about: About, later: Sequence[str] = ()) -> None:
    """Raise `ConfigError` for what a card cannot do without, all of it at once.

    Args:
        about: What there is.
        later: Fields that may still be None, because they are filled in before the card is written.
    """
    needed = ("license", "datasets", "base") if about.complete else ("base",)
    missing = [name for name in needed if getattr(about, name) is None and name not in later]
    if about.license == "other" and about.license_name is None:
        missing.append("license_name")
    if not about.opens and about.loading is None:
        missing.append("loading")
    if missing:
        lines = "; ".join(f"{name}, {_HOW[name]}" for name in missing)
        raise ConfigError(f"the card of {about.repo} lacks {lines}")


def _metadata(rows: Sequence[Row], sha256: str, about: About) -> ModelCardData:
    """The card's metadata, with an evaluation result for each measurement of the adapter on test images.

    Values are fractions, as `evaluate` has them; the interval, n, seeds and the selection rule stand beside each.
    """
    on_hub = about.base is not None and is_repository(about.base)
    own = [row for row in rows if row.own and row.is_test]
    own_keys: dict[str, Any] = {LOAD_WITH: IMPORT, SHA256: sha256}
    return ModelCardData(
        base_model=about.base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        datasets=list(about.datasets or ()) or None,
        eval_results=[_result(row, about) for row in own] or None,
        library_name="peft",
        license=about.license,
        license_name=about.license_name,
        license_link=about.license_link,
        metrics=sorted({row.metric.replace(" ", "_") for row in own}) or None,
        model_name=about.repo.rpartition("/")[2] if own else None,
        pipeline_tag=TASK,
        tags=[*TAGS, *([f"base_model:adapter:{about.base}"] if on_hub else []), *about.tags],
        **own_keys,
    )


def _result(row: Row, about: About) -> EvalResult:
    measured, datasets = row.measured, about.datasets or ()
    split = row.dataset if row.dataset == "test" else None
    return EvalResult(
        task_type=TASK,
        dataset_type=datasets[0] if len(datasets) == 1 else UNNAMED_DATA,
        dataset_name=row.dataset,
        # Results are grouped by type, config and split: without either, two data sets would become one.
        dataset_config=None if split else row.dataset,
        dataset_split=split,
        metric_type=row.metric.replace(" ", "_"),
        metric_value=measured.value,
        metric_name=f"{row.metric.replace('_', ' ')} (a fraction, 0 to 1)",
        metric_args={
            "interval_95": [measured.low, measured.high],
            "interval": card_text.interval_name(measured.interval),
            "n": measured.n,
            "seeds": list(measured.seeds),
            "selection": measured.selection,
        },
    )


@functools.cache
def _environment() -> jinja2.Environment:
    # Strict: a name that the template uses and nothing gives is an error, not an empty string.
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("peft_surgical.hub", "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown
    )
    filters: dict[str, Any] = {
        # Text that stays within its cell of a table.
        "cell": markdown_text,
        "percent": lambda value: f"{100 * value:.1f}",
        "size": lambda n: f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{n / 1e3:.1f} kB",
        "number": "{:.4g}".format,
        "code": markdown_code,
        "interval": card_text.interval_name,
    }
    found.filters |= filters
    return found


def draw_figure(
    rows: Sequence[Row], weights: Mapping[str, Any], moved: Sequence[tuple[str, float]], file: Path
) -> None:
    """Draw accuracy of what was tuned and of what could have been, and how far each part moved; nothing without rows.

    Args:
        rows: The card's table.
        weights: The adapter's file: `Adapter.summary`.
        moved: Block and its relative change, which is drawn where it is known; else the norms of each part's deltas,
            or of each tensor's where there is one part alone.
        file: A .png file to write.

    Raises:
        DataError: matplotlib is not installed.
    """
    figures = require("matplotlib.figure", "drawing a figure", "plots")
    if not rows:
        return
    # Test images first: other numbers are optimistically biased.
    shown = next((row for row in rows if row.own and row.is_test), rows[0])
    accuracies = [row for row in rows if (row.metric, row.dataset) == (shown.metric, shown.dataset)]
    groups = weights.get("blocks") or weights.get("modules") or []
    norms = groups if len(groups) > 1 else weights["largest"][:_LARGEST]
    parts = list(moved) or [(part["name"], part["norm"]) for part in norms]
    height = 1.5 + 0.3 * max(len(accuracies), len(parts), 3)
    figure = figures.Figure(figsize=(10, height), layout="constrained")
    left, right = figure.subplots(1, 2)
    values = [100 * row.measured.value for row in accuracies]
    left.barh(range(len(values)), values, color=["C1" if row.own else "C0" for row in accuracies])
    ends = [[100 * (row.measured.value - row.measured.low) for row in accuracies]]
    ends.append([100 * (row.measured.high - row.measured.value) for row in accuracies])
    left.errorbar(values, range(len(values)), xerr=ends, fmt="none", color="black", capsize=2)
    left.set_yticks(range(len(values)), [row.tuned for row in accuracies])
    left.set_xlabel(f"{shown.metric.replace('_', ' ')} (%), 95 % interval")
    left.set_title(shown.dataset)
    right.barh(range(len(parts)), [value for _, value in parts], color="C2")
    right.set_yticks(range(len(parts)), [name for name, _ in parts])
    right.set_xlabel("L2 norm of the change / of the block" if moved else "L2 norm of the deltas")
    right.set_title("what moved")
    for axes in (left, right):
        axes.invert_yaxis()
    figure.savefig(file, dpi=120)


def add_card(folder: Path, report: Report | None, figure: Place | None, about: About) -> None:
    """Add figure and card to the folder.

    Raises:
        ConfigError: The figure is none, or the Hub's own check refuses the card.
    """
    adapter = read_adapter(folder)
    weights = adapter.summary()
    if figure is not None:
        if Path(figure).suffix.lower() != ".png" or not Path(figure).is_file():
            raise ConfigError(f"the figure {figure} is no .png file: draw one, or leave it out")
        shutil.copyfile(figure, folder / FIGURE)
    elif report is not None and not (folder / FIGURE).is_file() and importlib.util.find_spec("matplotlib"):
        with card_text.readable(about.repo):
            draw_figure(card_rows(report, about.comparison), weights, card_text.moved_of(report), folder / FIGURE)
    about = replace(about, figure=FIGURE if (folder / FIGURE).is_file() else None)
    card = card_of(adapter.config, report, weights, about)
    with explained("check the card of", about.repo):
        try:
            patiently(card.validate)
        except HTTPError:
            raise
        except ValueError as error:
            raise ConfigError(f"the Hub refuses the card of {about.repo}: {error}") from error
    card.save(folder / CARD)
