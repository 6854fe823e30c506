"""Adapt a base to a stream of one's own images: what the command ``adapt`` runs, and what it writes."""

from __future__ import annotations

import csv
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from ..adaptation.objectives import Memo, Tent, norm_target
from ..adaptation.streams import STREAM_OPTIMIZERS, Record
from ..adaptation.views import AugMix, halves
from ..bases.load import Base, load_base
from ..blocks import parse
from ..choosing.forward import logits_of
from ..config import SurgicalConfig
from ..data.incoming import Incoming
from ..errors import AdapterError, ConfigError, DataError
from ..evaluation import Measurement, Report, accuracy, measure, predict_logits, wilson_interval
from ..extras import require
from ..keys import CONFIG, FIGURE, REPORT, WEIGHTS
from ..tuner.card import write_card

METHODS, MODES = ("memo", "tent"), ("online", "episodic")
NORM = "norm"
"""The target that stands for `norm_target`."""
PREDICTIONS = "predictions.csv"
STREAM = "stream"
SAVED = "stream, with the saved adapter"
"""The data set of an accuracy that was measured after the stream, with the adapter loaded again."""
SELECTION = "settings as given; nothing was chosen with these images"
_BATCH = 64  # images that a loaded adapter predicts at a time
_MEMO_BATCH = 16  # images that are read at a time; MEMO takes them one by one
_CHECKED = 16  # images on which the saved adapter is compared


@dataclass(frozen=True)
class AdaptSettings:
    """How to adapt.

    Attributes:
        method: ``memo`` or ``tent``.
        target: What moves; ``norm`` for scale and shift of all normalisations.
        mode: ``online`` or ``episodic``.
        lr: Learning rate, absolute. Without labels nothing can choose it.
        optimizer: ``sgd``, ``adam`` or ``adamw``; None for the method's own: for MEMO SGD online and AdamW episodic
            (Lee et al. 2023), for TENT Adam.
        steps: Per image or batch.
        views: Per image, of MEMO.
        crop: Of the views, see `AugMix`.
        batch_size: Of TENT.
        prior_strength: Of MEMO, for BatchNorms; see `Memo`.
        norm_stats: The adapter's policy; None for ``all`` with TENT, which normalises with the stream's statistics, and
            ``frozen`` with MEMO.
        seed: Of the views.
        reset_on_collapse: See `Memo`.
    """

    method: str
    target: str
    mode: str
    lr: float
    optimizer: str | None = None
    steps: int = 1
    views: int = 32
    crop: str = "pad"
    batch_size: int = 64
    prior_strength: float | None = None
    norm_stats: str | None = None
    seed: int = 0
    reset_on_collapse: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("method", METHODS), ("mode", MODES)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if parse(self.target).needs_data:
            raise ConfigError(
                f"target={self.target!r}: scores and searches need labels, which a stream has not. Name a block, such "
                "as target='stem'"
            )
        AugMix(self.views, self.crop)  # refuses what cannot be made
        if self.chosen_optimizer not in STREAM_OPTIMIZERS:
            raise ConfigError(f"optimizer={self.optimizer!r}: choose one of {', '.join(STREAM_OPTIMIZERS)}")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size}: give 1 or more")
        if self.prior_strength is not None and self.method != "memo":
            raise ConfigError("prior_strength is MEMO's: TENT normalises with the batch's statistics alone")

    @property
    def chosen_optimizer(self) -> str:
        """The optimizer's name."""
        own = "adam" if self.method == "tent" else "sgd" if self.mode == "online" else "adamw"
        return self.optimizer or own

    @property
    def chosen_norm_stats(self) -> str:
        """The adapter's policy for normalisation statistics."""
        return self.norm_stats or ("all" if self.method == "tent" else "frozen")

    def adapter(self, base: Base) -> Any:
        """A fresh adapter on the base, which is changed."""
        target = norm_target(base.model) if self.target == NORM else self.target
        return get_peft_model(base.model, SurgicalConfig(target=target, norm_stats=self.chosen_norm_stats))

    def method_on(self, model: nn.Module, normalise: Callable[[Tensor], Tensor]) -> Memo | Tent:
        """The method, ready for the first image."""
        shared: dict[str, Any] = {"lr": self.lr, "steps": self.steps, "optimizer": self.chosen_optimizer}
        shared |= {"episodic": self.mode == "episodic", "preprocess": normalise}
        shared |= {"reset_on_collapse": self.reset_on_collapse}
        if self.method == "tent":
            return Tent(model, **shared)
        views = AugMix(self.views, self.crop)
        return Memo(model, views=views, seed=self.seed, prior_strength=self.prior_strength, **shared)


@dataclass(frozen=True)
class Adapted:
    """What a stream gave.

    Attributes:
        model: The PeftModel as the stream left it.
        before: Logits (n, classes) without adaptation, on the CPU.
        after: Logits (n, classes) along the stream.
        record: What happened.
        input: Pixels -> the network's input.
        first: Pixels of the first images.
        names: What the outputs mean, by the network or else by the data; None where neither says so.
        keeps_statistics: Whether a saved adapter normalises as the predictions did.
    """

    model: Any
    before: Tensor
    after: Tensor
    record: Record
    input: Callable[[Tensor], Tensor]
    first: Tensor
    names: tuple[str, ...] | None = None
    keeps_statistics: bool = True


Tell = Callable[[int, int, float | None, float | None], None]
"""Called with the images that are done, all images, and the accuracy so far with and without adaptation."""


def open_base(name: str, images: Incoming, weights: str = "pretrained", head: str = "auto") -> Base:
    """The base, with the head that it was trained with.

    Args:
        name: As for `load_base`.
        images: The stream.
        weights: As for `load_base`.
        head: ``auto`` or ``keep``, as for `load_base`.

    Raises:
        ConfigError: For another ``head``.
        DataError: If it has other classes than the data: adaptation has no labels, so it cannot train a head.
    """
    if head not in ("auto", "keep"):
        raise ConfigError(f"head={head!r}: adaptation has no labels to train another head with. Choose auto or keep")
    base = load_base(name, label_names=images.label_names, weights=weights, head=head)
    if base.head_is_new and weights == "pretrained":
        raise DataError(
            f"{name} has no head for the {len(images.label_names or ())} classes of the data, and without labels none "
            f"can be trained ({base.head_note}). Tune it first (peft-surgical tune), or say unlabelled=True to adapt "
            "without the classes of the data"
        )
    return base


def numbered_as(base: Base, images: Incoming) -> Incoming:
    """The images with their classes in the numbers, and by the names, of the base that was opened for them."""
    if images.label_names is None:
        return images
    names = base.label_names or tuple(map(str, range(base.classes)))
    return images.among(base.outputs or range(base.classes), names)


def adapt(
    base: Base, images: Incoming, settings: AdaptSettings, device: torch.device | str = "cpu", tell: Tell | None = None
) -> Adapted:
    """Adapt a base to a stream, and predict every image of it, with and without.

    Args:
        base: It is changed: an adapter is added.
        images: The stream.
        settings: How.
        device: Where to compute.
        tell: Progress.

    Warns:
        UserWarning: If no adapter can be saved, because none can hold the statistics of the predictions.
    """
    to_pixels, normalise = halves(base.transform_eval)
    model = settings.adapter(base).to(device).eval()
    method = settings.method_on(model, normalise)
    if settings.mode == "online" and not method.keeps_statistics:
        warnings.warn(f"No adapter will be saved: {_unkept(settings)}", stacklevel=2)
    size = settings.batch_size if settings.method == "tent" else _MEMO_BATCH
    before: list[Tensor] = []
    after: list[Tensor] = []
    first: list[Tensor] = []
    for start in range(0, len(images), size):
        batch = torch.stack([to_pixels(images.read(i)) for i in range(start, min(start + size, len(images)))])
        batch = batch.to(device)
        with model.disable_adapter(), torch.no_grad():
            before.append(logits_of(model(normalise(batch))).float().cpu())
        after.append(method(batch).float().cpu())
        first.extend(batch[: _CHECKED - len(first)].cpu())
        if tell is not None:
            tell(start + len(batch), len(images), _so_far(after, images), _so_far(before, images))
    results = torch.cat(before), torch.cat(after), method.record
    names = base.label_names or images.label_names
    return Adapted(model, *results, normalise, torch.stack(first), names, method.keeps_statistics)


def _unkept(settings: AdaptSettings) -> str:
    if settings.method == "tent":
        return (
            f"TENT predicts with the statistics of each batch, which norm_stats={settings.chosen_norm_stats!r} does "
            "not keep for every BatchNorm, so that a loaded adapter would give other numbers. norm_stats='all' "
            "(--norm-stats all) keeps them"
        )
    return (
        "with prior_strength (--prior-strength) MEMO predicts with statistics of each image, which no adapter holds, "
        "so that a loaded one would give other numbers. Leave it out to save one"
    )


def _so_far(logits: list[Tensor], images: Incoming) -> float | None:
    if images.labels is None:
        return None
    found = torch.cat(logits)
    return accuracy(_ranked(found), images.labels[: len(found)])


def _ranked(logits: Tensor) -> Tensor:
    """Predicted classes; -1, which is wrong, where the logits are not finite."""
    return torch.where(torch.isfinite(logits).all(1), logits.argmax(1), -1)


def write_adapted(
    folder: Path, name: str, images: Incoming, settings: AdaptSettings, adapted: Adapted, weights: str = "pretrained"
) -> Report:
    """Predictions, report, figure, and after an online stream the adapter, loaded again, compared and measured.

    No adapter is saved if none can hold the statistics that the predictions were made with; `adapt` has warned of it.

    Raises:
        AdapterError: If what is reloaded does not give the logits of what was saved, bit for bit.

    Warns:
        UserWarning: If adaptation made predictions worse.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before, after, record = _ranked(adapted.before), _ranked(adapted.after), adapted.record
    _write_predictions(folder / PREDICTIONS, images, adapted)
    opening: dict[str, Any] = {
        "label_names": list(images.label_names) if images.label_names else None,
        "weights": weights,
    }
    saved = settings.mode == "online" and adapted.keeps_statistics
    found = {STREAM: after}
    if saved:
        adapted.model.eval().save_pretrained(folder)
        base = load_base(name, **opening)
        again = _reloaded(folder, base, adapted)
        if images.labels is not None:
            found[SAVED] = _ranked(_predicted(again, base, images))
    else:
        for file in (CONFIG, WEIGHTS):  # of another stream, earlier
            (folder / file).unlink(missing_ok=True)
    report = Report(
        name,
        settings.target,
        tuple(_measured(before, found, images, settings)),
        {
            **asdict(settings),
            "optimizer": settings.chosen_optimizer,
            "norm_stats": settings.chosen_norm_stats,
            **asdict(record),
            "collapses": list(record.collapses),
            "images": len(images),
            "changed": int((before != after).sum()),
            "most_common": [list(pair) for pair in Counter(after.tolist()).most_common(3)],
            "data": images.fingerprint,
            "open": opening,
            "saved": saved,
            "worse": [part for part, predicted in found.items() if _is_worse(before, predicted, images)],
        },
    )
    report.save(folder / REPORT)
    write_card(folder, report)
    for part in report.settings["worse"]:
        right, earlier = report.find("accuracy", part).value, report.find("accuracy before").value
        warnings.warn(
            f"adaptation made it worse: {right:.1%} of the {part} is predicted right, without it {earlier:.1%}. Take a "
            "smaller lr (--lr), larger and mixed batches for TENT, or another target (--target stem); or leave the "
            "network as it is",
            stacklevel=2,
        )
    try:
        _draw(folder / FIGURE, images, adapted)
    except DataError as error:  # without matplotlib the numbers are worth having, too
        warnings.warn(f"no figure: {error}", stacklevel=2)
    return report


def _measured(
    before: Tensor, found: Mapping[str, Tensor], images: Incoming, settings: AdaptSettings
) -> Iterator[Measurement]:
    if images.labels is None:
        return
    rows = [("accuracy before", STREAM, before, "none")]
    rows += [("accuracy", part, predicted, SELECTION) for part, predicted in found.items()]
    for metric, part, predicted, rule in rows:
        value = accuracy(predicted, images.labels)
        yield measure(metric, [value], dataset=part, n=len(images), seeds=[settings.seed], selection=rule)


def _is_worse(before: Tensor, after: Tensor, images: Incoming) -> bool:
    """Whether more predictions turned wrong than right, by more than chance: the 95% interval of their share."""
    if images.labels is None:
        return False
    lost = int(((before == images.labels) & (after != images.labels)).sum())
    gained = int(((before != images.labels) & (after == images.labels)).sum())
    return lost > 0 and wilson_interval(lost, lost + gained).low > 0.5


def _write_predictions(file: Path, images: Incoming, adapted: Adapted) -> None:
    names, classes, labels = adapted.names, _ranked(adapted.after).tolist(), images.labels
    sure = adapted.after.softmax(1).amax(1).tolist()
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["file", "class", "name", "confidence", "class before"] + ["label"] * (labels is not None))
        for i, before in enumerate(_ranked(adapted.before).tolist()):
            called = names[classes[i]] if names and classes[i] >= 0 else ""
            row = [images.files[i], classes[i], called, f"{sure[i]:.4f}", before]
            writer.writerow(row + ([int(labels[i])] if labels is not None else []))


def _draw(file: Path, images: Incoming, adapted: Adapted) -> None:
    """Accuracy so far along the stream (compare Lee et al. 2023, Figure 4, right); without labels the confidence."""
    figures = require("matplotlib.figure", "drawing a figure", "plots")
    figure = figures.Figure(figsize=(6, 4), layout="constrained")
    axes, count = figure.subplots(), torch.arange(1, len(images) + 1)
    for name, logits in (("without", adapted.before), ("adapted", adapted.after)):
        if images.labels is not None:
            values = (_ranked(logits) == images.labels).float()
        else:
            values = logits.softmax(1).amax(1).nan_to_num(0.0)
        axes.plot(count, 100 * values.cumsum(0) / count, label=name)
    for place in adapted.record.collapses:
        axes.axvline(place, linestyle=":", color="black")
    what = "accuracy" if images.labels is not None else "mean confidence"
    axes.set(xlabel="images of the stream", ylabel=f"{what} so far (%)")
    axes.legend()
    figure.savefig(file, dpi=120)


def _reloaded(folder: Path, base: Base, adapted: Adapted) -> Any:
    """The adapter that was just saved, on a base that was opened anew."""
    device = next(adapted.model.parameters()).device
    inputs = adapted.input(adapted.first.to(device))
    again = PeftModel.from_pretrained(base.model, folder).to(device)
    if not torch.equal(predict_logits(adapted.model, inputs), predict_logits(again, inputs)):
        raise AdapterError(f"{folder} does not reload to what the stream left: do not use it, and report this")
    return again


def _predicted(model: nn.Module, base: Base, images: Incoming) -> Tensor:
    """Logits (n, classes) of all images of a stream, on the CPU."""
    found = []
    for start in range(0, len(images), _BATCH):
        rows = range(start, min(start + _BATCH, len(images)))
        found.append(predict_logits(model, torch.stack([base.transform_eval(images.read(i)) for i in rows])).float())
    return torch.cat(found)
