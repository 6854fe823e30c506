"""Adapt a base to a stream of one's own images: what the command ``adapt`` runs, and what it writes."""

from __future__ import annotations

import csv
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from ..adaptation.objectives import Memo, Tent, norm_target
from ..adaptation.streams import STREAM_OPTIMIZERS, Record
from ..adaptation.views import AugMix, halves
from ..bases.load import Base, load_base
from ..blocks import parse
from ..choosing.models import logits_of
from ..config import SurgicalConfig
from ..data.incoming import Incoming
from ..errors import AdapterError, ConfigError, DataError
from ..evaluation import Report, accuracy, measure, predict_logits, wilson_interval
from ..extras import LARGEST_SEED, check_range, require
from ..keys import CONFIG, FIGURE, REPORT, WEIGHTS
from ..results import claim, published, withdraw
from ..texts import csv_cell
from ..tuner.saving import publish_adapter, write_card

ADAPTATION_METHODS, MODES = ("memo", "tent"), ("online", "episodic")
PREDICTIONS = "predictions.csv"
ADAPTED_FILES = (PREDICTIONS, REPORT, FIGURE, CONFIG, WEIGHTS)
STREAM, SAVED = "stream", "stream, with the saved adapter"  # datasets of measurements
_UNKEPT = {
    "tent": "TENT predicts with the statistics of each batch, which norm_stats={!r} does not keep for every BatchNorm, "
    "so that a loaded adapter would give other numbers. norm_stats='all' (--norm-stats all) keeps them",
    "memo": "with prior_strength (--prior-strength) MEMO predicts with statistics of each image, which no adapter "
    "holds, so that a loaded one would give other numbers. Leave it out to save one",
}
_BATCH, _MEMO_BATCH = 64, 16  # images at a time: that a loaded adapter predicts; that are read for MEMO


@dataclass(frozen=True)
class AdaptSettings:
    """How to adapt. What is not described here is described in `Memo`, ``views`` and ``crop`` in `AugMix`.

    Attributes:
        method: ``memo`` or ``tent``.
        target: What moves; ``norm`` for scale and shift of all normalisations.
        mode: ``online`` or ``episodic``.
        optimizer: None for the method's own: for MEMO SGD online and AdamW episodic (Lee et al. 2023), for TENT Adam.
        batch_size: Images that TENT takes at a time.
        norm_stats: The adapter's policy; None for ``frozen`` with MEMO, ``all`` with TENT, which uses the stream's.

    Raises:
        ConfigError: A setting is unknown or out of range, or needs labels.
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
        choices = {"method": ADAPTATION_METHODS, "mode": MODES, "norm_stats": (None, "frozen", "target", "all")}
        choices["optimizer"] = (None, *STREAM_OPTIMIZERS)
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(filter(None, known))}")
        if parse(self.target).needs_data:
            way = "scores and searches need labels, which a stream has not. Name a block, such as target='stem'"
            raise ConfigError(f"target={self.target!r}: {way}")
        AugMix(self.views, self.crop)  # refuses what cannot be made
        for one, low, high in (("lr", 0, 1e6), ("batch_size", 1, 1e9), ("seed", 0, LARGEST_SEED)):
            check_range(one, getattr(self, one), low, high)
        if self.prior_strength is not None and self.method != "memo":
            raise ConfigError("prior_strength is MEMO's: TENT normalises with the batch's statistics alone")
        tent, online = self.method == "tent", self.mode == "online"
        object.__setattr__(self, "optimizer", self.optimizer or ("adam" if tent else "sgd" if online else "adamw"))
        object.__setattr__(self, "norm_stats", self.norm_stats or ("all" if tent else "frozen"))

    def method_on(self, network: Any, normalise: Callable[[Tensor], Tensor], device: Any) -> Memo | Tent:
        """The method, ready for the first image, on a fresh adapter of the network."""
        target = norm_target(network) if self.target == "norm" else self.target
        model: Any = get_peft_model(network, SurgicalConfig(target=target, norm_stats=self.norm_stats or "frozen"))
        shared: dict[str, Any] = {name: getattr(self, name) for name in ("lr", "steps", "reset_on_collapse")}
        shared |= {"optimizer": self.optimizer, "episodic": self.mode == "episodic", "preprocess": normalise}
        if self.method == "memo":
            shared |= {"views": AugMix(self.views, self.crop), "seed": self.seed, "prior_strength": self.prior_strength}
        return (Tent if self.method == "tent" else Memo)(model.to(device).eval(), **shared)


@dataclass(frozen=True)
class AdaptResult:
    """What a stream gave.

    Attributes:
        model: The PeftModel as the stream left it.
        before: Logits (n, classes) without adaptation, on the CPU.
        after: Logits (n, classes) along the stream.
        record: What happened.
        names: What the outputs mean, by the network or else by the data; None where neither says so.
        keeps_statistics: Whether a saved adapter normalises as the predictions did.
    """

    model: Any
    before: Tensor
    after: Tensor
    record: Record
    names: tuple[str, ...] | None = None
    keeps_statistics: bool = True


def open_base(name: str, images: Incoming, weights: str = "pretrained", head: str = "auto") -> Base:
    """The base for a stream, with the head that it was trained with.

    Raises:
        ConfigError: ``head`` is neither ``auto`` nor ``keep``.
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
    numbers = range(base.classes)
    names = base.label_names or tuple(map(str, numbers))
    return images if images.label_names is None else images.among(base.outputs or numbers, names)


def adapt(
    base: Base,
    images: Incoming,
    settings: AdaptSettings,
    device: torch.device | str = "cpu",
    tell: Callable[[int, int, float | None, float | None], None] | None = None,
) -> AdaptResult:
    """Adapt a base to a stream, and predict every image of it, with and without; warn if no adapter can be saved.

    Args:
        base: It is changed: an adapter is added.
        images: The stream.
        settings: How to adapt.
        device: Where to compute.
        tell: Called with the number of images done, of all images, and the accuracy so far with and without adaptation.
    """
    to_pixels, normalise = halves(base.transform_eval)
    method = settings.method_on(base.model, normalise, device)
    if settings.mode == "online" and not method.keeps_statistics:
        reason = _UNKEPT[settings.method].format(settings.norm_stats)
        warnings.warn(f"No adapter will be saved: {reason}", stacklevel=2)
    size = settings.batch_size if settings.method == "tent" else _MEMO_BATCH
    before: list[Tensor] = []
    after: list[Tensor] = []
    for start in range(0, len(images), size):
        rows = range(start, min(start + size, len(images)))
        batch = torch.stack([to_pixels(images.read(i)) for i in rows]).to(device)
        with method.model.disable_adapter(), torch.no_grad():
            before.append(logits_of(method.model(normalise(batch))).float().cpu())
        after.append(method(batch).float().cpu())
        if tell is not None:
            labels = None if images.labels is None else images.labels[: rows.stop]
            right = [labels if labels is None else accuracy(_ranked(torch.cat(at)), labels) for at in (after, before)]
            tell(rows.stop, len(images), *right)
    names, keeps = base.label_names or images.label_names, method.keeps_statistics
    return AdaptResult(method.model, torch.cat(before), torch.cat(after), method.record, names, keeps)


def _ranked(logits: Tensor) -> Tensor:
    """Predicted classes; -1, which is wrong, where the logits are not finite."""
    return torch.where(torch.isfinite(logits).all(1), logits.argmax(1), -1)


def write_adapted(
    folder: Path, name: str, images: Incoming, settings: AdaptSettings, result: AdaptResult, weights: str = "pretrained"
) -> Report:
    """Write predictions, report, figure, and after an online stream the adapter, loaded again, compared and measured.

    No adapter is saved if none can hold the statistics that the predictions were made with; `adapt` has warned of it.
    A warning says so if adaptation made predictions worse.

    Raises:
        AdapterError: If what is reloaded does not give the logits of what was saved, bit for bit.
    """
    folder, before, after = claim(folder, ADAPTED_FILES), _ranked(result.before), _ranked(result.after)
    with published(folder) as stage:
        _write_predictions(stage / PREDICTIONS, images, result)
    opening = {"label_names": [*images.label_names] if images.label_names else None, "weights": weights}
    saved, labels = settings.mode == "online" and result.keeps_statistics, images.labels
    found = {STREAM: after}
    if saved:
        publish_adapter(result.model.eval(), folder)
        logits = _predicted_again(folder, load_base(name, **opening), images, result)  # type: ignore[arg-type]
        found |= {} if logits is None else {SAVED: _ranked(logits)}
    else:
        withdraw(folder, (CONFIG, WEIGHTS))  # of an earlier stream
    rule = "settings as given; nothing was chosen with these images"
    rows = [("accuracy before", STREAM, before, "none"), *(("accuracy", *part, rule) for part in found.items())]
    measured = [
        measure(metric, [accuracy(at, labels)], dataset=part, n=len(images), seeds=[settings.seed], selection=selection)
        for metric, part, at, selection in rows
        if labels is not None
    ]
    facts = {
        **asdict(settings),
        **asdict(result.record),
        "collapses": list(result.record.collapses),
        "images": len(images),
        "changed": int((before != after).sum()),
        "most_common": [list(pair) for pair in Counter(after.tolist()).most_common(3)],
        "data": images.fingerprint,
        "open": opening,
        "saved": saved,
        "worse": [part for part, at in found.items() if labels is not None and _is_worse(before, at, labels)],
    }
    report = Report(name, settings.target, tuple(measured), facts)
    for part in report.settings["worse"]:
        right, earlier = report.find("accuracy", part).value, report.find("accuracy before").value
        worse = f"{right:.1%} of the {part} is predicted right, without it {earlier:.1%}. Take a smaller lr (--lr), "
        worse += "larger and mixed batches for TENT, or another target (--target stem); or leave the network as it is"
        warnings.warn(f"adaptation made it worse: {worse}", stacklevel=2)
    with published(folder) as stage:
        report.save(stage / REPORT)
        try:
            _draw(stage / FIGURE, images, result)
        except DataError as error:  # without matplotlib the numbers are worth having, too
            warnings.warn(f"no figure: {error}", stacklevel=2)
    write_card(folder, report)
    return report


def _is_worse(before: Tensor, after: Tensor, labels: Tensor) -> bool:
    """Whether more predictions turned wrong than right, by more than chance: the 95% interval of their share."""
    lost, gained = (int(((x == labels) & (y != labels)).sum()) for x, y in ((before, after), (after, before)))
    return lost > 0 and wilson_interval(lost, lost + gained).low > 0.5


def _write_predictions(file: Path, images: Incoming, adapted: AdaptResult) -> None:
    labels = [] if images.labels is None else images.labels[:, None].tolist()
    classes, before = _ranked(adapted.after).tolist(), _ranked(adapted.before).tolist()
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["file", "class", "name", "confidence", "class before", *(["label"] if labels else [])])
        for i, confidence in enumerate(adapted.after.softmax(1).amax(1).tolist()):
            name = csv_cell(adapted.names[classes[i]]) if adapted.names and classes[i] >= 0 else ""
            row = [csv_cell(images.files[i]), classes[i], name, f"{confidence:.4f}", before[i]]
            writer.writerow(row + (labels[i] if labels else []))


def _predicted_again(folder: Path, base: Base, images: Incoming, adapted: AdaptResult) -> Tensor | None:
    """Logits (n, classes) of the saved adapter on a base that was opened anew, if there are labels to compare with."""
    again = PeftModel.from_pretrained(base.model, folder).to(next(adapted.model.parameters()).device)
    logits: list[Tensor] = []
    for rows in torch.arange(len(images)).split(_BATCH):
        inputs = torch.stack([base.transform_eval(images.read(int(i))) for i in rows])
        logits.append(predict_logits(again, inputs))
        if len(logits) == 1 and not torch.equal(predict_logits(adapted.model, inputs), logits[0]):
            raise AdapterError(f"{folder} does not reload to what the stream left: do not use it, and report this")
        if images.labels is None:
            return None
    return torch.cat(logits).float()


def _draw(file: Path, images: Incoming, adapted: AdaptResult) -> None:
    """Accuracy so far along the stream (compare Lee et al. 2023, Figure 4, right); without labels the confidence."""
    figure = require("matplotlib.figure", "drawing a figure", "plots").Figure(figsize=(6, 4), layout="constrained")
    axes, count = figure.subplots(), torch.arange(1, len(images) + 1)
    for name, logits in (("without", adapted.before), ("adapted", adapted.after)):
        values = logits.softmax(1).amax(1).nan_to_num(0.0)
        if images.labels is not None:
            values = (_ranked(logits) == images.labels).float()
        axes.plot(count, 100 * values.cumsum(0) / count, label=name)
    for place in adapted.record.collapses:
        axes.axvline(place, linestyle=":", color="black")
    what = "mean confidence" if images.labels is None else "accuracy"
    axes.set(xlabel="images of the stream", ylabel=f"{what} so far (%)")
    axes.legend()
    figure.savefig(file, dpi=120)
