"""Model cards of adapters: (config, report) and what neither of them knows -> `huggingface_hub.ModelCard`.

Every number on a card is a `Measurement` of the report or a property of the adapter's file. A field that is missing is
an error that says how to give it; nothing is filled with a placeholder, and without a report the card says that nothing
was measured. The template is ``templates/adapter.md.jinja`` beside this module.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..config import SurgicalConfig
from ..errors import ConfigError
from ..evaluation import Report
from ..tuner.saving import IMPORT, LOAD_WITH, PAGE_MARK, TAGS, is_repository, target_of
from . import card_text
from .card_text import Row, card_rows, choices, limits_of, linked, parents_of, protocol_of, why

TEMPLATE = "adapter.md.jinja"
TASK = "image-classification"
SHA256 = "weights_sha256"
"""The key of a card's metadata under which the SHA-256 of the adapter file stands."""
UNNAMED_DATA = "imagefolder"
"""What the Hub calls a data set that is no repository of its own."""

_OPEN = """\
from PIL import Image
from peft_surgical.hub import open_adapted

adapted = open_adapted("{repo}")
logits = adapted.logits(Image.open("photo.jpg"))
print({answer})"""
_HOW = {
    "license": 'the licence of the deltas, an identifier of the Hub: license="apache-2.0"',
    "license_name": 'what a licence "other" is called: license_name="..."',
    "datasets": "the data sets it was tuned on, as repositories of the Hub, or none where they are not there: "
    'datasets=["uoft-cs/cifar10"] or datasets=[]',
    "base": 'the base that it was made on: base="timm/resnet50.a1_in1k"',
    "loading": "the lines of Python that load it: loading=, as its base cannot be opened by name",
}


@dataclass(frozen=True)
class Weights:
    """An adapter's file, in numbers.

    Attributes:
        bytes: Of the file.
        sha256: Of its content.
        tensors: Tuned tensors.
        parameters: Values in their deltas.
        base_parameters: Values in the parameters of the whole base, where it is known.
        dtypes: Of the deltas.
        statistics: Normalisation statistics in the file.
        parts: Block (or module, where the file does not tell the blocks), number of values, L2 norm of its deltas.
        parts_are: ``"block"`` or ``"module"``.
        largest: The tensors whose deltas have the largest L2 norms, with these, largest first.
    """

    bytes: int
    sha256: str
    tensors: int
    parameters: int
    base_parameters: int | None
    dtypes: tuple[str, ...]
    statistics: int
    parts: tuple[tuple[str, int, float], ...]
    parts_are: str
    largest: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class About:
    """What a card needs to be told. What is None is missing, and an error.

    Attributes:
        repo: The repository, ``owner/name``.
        license: An identifier of the Hub, or ``"other"``.
        datasets: Repositories of the data; empty where it is not on the Hub.
        base: The base's repository; in words where it is not on the Hub.
        loading: Lines of Python that load the adapter; None for a base that `hub.open_adapted` opens.
        base_revision: Its commit.
        opens: Whether `hub.open_adapted` can open it, which is what the card's lines do then.
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
    opens: bool = True
    labelled: bool = False
    license_name: str | None = None
    license_link: str | None = None
    figure: str | None = None
    comparison: tuple[Report, ...] = ()
    tags: tuple[str, ...] = ()
    complete: bool = True
    page: bool = False


def card_of(config: SurgicalConfig, report: Report | None, weights: Weights, about: About) -> ModelCard:
    """The card of an adapter.

    Args:
        config: Of the adapter, as it is on disk.
        report: Its numbers; None says that there are none.
        weights: Its file.
        about: What neither of them knows.

    Raises:
        ConfigError: Something is missing; names all of it, and how to give it.
    """
    check(about)
    rows = card_rows(report, about.comparison) if report is not None else []
    text = (
        _environment()
        .get_template(TEMPLATE)
        .render(
            metadata=metadata_of(config, rows, weights, about).to_yaml(),
            name=about.repo.rpartition("/")[2],
            config=config,
            report=report,
            weights=weights,
            about=about,
            base=linked(str(about.base)) if is_repository(str(about.base)) else about.base,
            norm=card_text.NORMS[config.norm_stats],
            target=target_of(config),
            mark=PAGE_MARK,
            parents=parents_of(config),
            why=why(config),
            choices=choices(config),
            rows=rows,
            moved=card_text.moved_of(report),
            protocol=protocol_of(report),
            limits=limits_of(config, report, rows),
            loading=about.loading or _OPEN.format(repo=about.repo, answer=_answer(about)),
        )
    )
    return ModelCard(text)


def check(about: About, later: Sequence[str] = ()) -> None:
    """Raise `ConfigError` for what a card cannot do without, all of it at once.

    Args:
        about: What there is.
        later: Names of what will be known in time.
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


def metadata_of(config: SurgicalConfig, rows: Sequence[Row], weights: Weights, about: About) -> ModelCardData:
    """The card's metadata, with an evaluation result for each measurement of the adapter on test images.

    Values are fractions, as `evaluate` has them; the interval, n, seeds and the selection rule stand beside each.
    """
    on_hub = about.base is not None and is_repository(about.base)
    own = [row for row in rows if row.own and row.is_test]
    tags = [*TAGS, *([f"base_model:adapter:{about.base}"] if on_hub else []), *about.tags]
    own_keys: dict[str, Any] = {LOAD_WITH: IMPORT, SHA256: weights.sha256}
    return ModelCardData(
        base_model=about.base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        datasets=list(about.datasets or ()) or None,
        eval_results=[_result(row, about) for row in own] or None,
        library_name="peft",
        license=about.license,
        license_name=about.license_name,
        license_link=about.license_link,
        metrics=sorted({_identifier(row.metric) for row in own}) or None,
        model_name=about.repo.rpartition("/")[2] if own else None,
        pipeline_tag=TASK,
        tags=tags,
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
        metric_type=_identifier(row.metric),
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


def _identifier(metric: str) -> str:
    return metric.replace(" ", "_")


def _answer(about: About) -> str:
    return "adapted.label_names[logits.argmax()]" if about.labelled else "logits.softmax(-1)"


# --- rendering ---


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
    found.filters |= {"cell": _cell, "percent": _percent, "size": size, "number": "{:.4g}".format}
    found.filters |= {"code": lambda text: f"`{text}`", "interval": card_text.interval_name}
    return found


def _cell(value: Any) -> str:
    """Text that stays within its cell of a table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def size(n: int) -> str:
    """A number of bytes, for people: ``79.6 kB``."""
    return f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{n / 1e3:.1f} kB"
