"""Pretrained bases by name: a timm id, a transformers id, or a folder of either, with the transforms they expect."""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from transformers.utils import logging

from ..blocks import anatomy_of
from ..errors import ConfigError, DataError, SurgicalError
from ..extras import require
from ..files import printable
from .classes import HeadFit, fit_head
from .libraries import TimmBase, TransformersBase
from .transforms import AUGMENTS

WEIGHT_CHOICES = ("pretrained", "random")
HEADS = ("auto", "keep", "new", "zero")
_FOLDER = "local-dir:"
_HUB = re.compile(r"hf[-_]hub:")


@dataclass(frozen=True)
class Base:
    """A base, ready to be tuned.

    Attributes:
        model: The network, in ``eval()``, on the CPU.
        name: What it was asked for by.
        library: ``"timm"``, whose networks return logits, or ``"transformers"``: an object with ``.logits``.
        classes: Number of outputs.
        label_names: What they mean, where the checkpoint or the caller says so.
        transform_train: PIL image in RGB -> float tensor (3, h, w), normalised, with the augmentation asked for.
        transform_eval: The same without augmentation.
        head_is_new: Whether the head's values are a random draw, so that the head has to be tuned, too.
        outputs: For each of the ``label_names`` that were asked for the output that stands for it, which is the number
            that its label has to have; None where the n-th stands for the n-th.
        head_note: What became of the head and why, in words that begin with ``kept`` or ``new``.
    """

    model: nn.Module
    name: str
    library: str
    classes: int
    label_names: tuple[str, ...] | None
    transform_train: Callable[[Any], Tensor]
    transform_eval: Callable[[Any], Tensor]
    head_is_new: bool
    outputs: tuple[int, ...] | None = None
    head_note: str = "kept"


def load_base(
    name: str | os.PathLike[str],
    num_classes: int | None = None,
    *,
    label_names: Sequence[str] | None = None,
    head: str = "auto",
    weights: str = "pretrained",
    augment: str = "none",
    image_size: int | None = None,
    seed: int = 0,
) -> Base:
    """Load a base and the transforms that belong to it. Weights come from safetensors only, and no code is downloaded.

    The head is kept where the checkpoint's classes have all ``label_names`` among them, in whatever order: ``outputs``
    says where each is found, and the network keeps its other classes, too. Where classes are not named it is kept if
    their number is the same. Else the network gets a new head.

    Args:
        name: A timm model (``resnet50.a1_in1k``, ``timm/...``, ``hf-hub:owner/name``), a transformers model
            (``owner/name``), or a folder with the ``config.json`` and ``model.safetensors`` of either (also
            ``local-dir:...``).
        num_classes: Classes of the data; None keeps the checkpoint's.
        label_names: The names of the data's classes, in order; their number counts as ``num_classes``.
        head: ``"auto"`` is described above. ``"keep"`` keeps the head or raises, and takes the n-th class for the n-th
            output where the names of as many classes have nothing in common. ``"new"`` draws a new head; ``"zero"`` is
            a new head whose values are all 0, the same with every seed, so that deltas on it can be saved.
        weights: ``"random"`` reads the architecture only: for tests, and to look at blocks.
        augment: What ``transform_train`` does: ``"none"``; ``"flip"``, half of the images mirrored; or ``"crop"``, a
            random part of each image resized, and flips, as timm trains.
        image_size: Height and width that the transforms give, in pixels; None takes the checkpoint's. For networks that
            take images of any size.
        seed: Seed of a new head, or of all weights.

    Raises:
        DataError: If no such model can be loaded; names what was tried.
        ConfigError: For an unknown choice, choices that contradict each other, or an image size that the network does
            not take.

    Warns:
        UserWarning: If ``"auto"`` numbers classes in another way than ``label_names`` does, or replaces a head that has
            some of them.
    """
    base = _load(os.fspath(name), num_classes, label_names, head, weights, seed)
    with _quiet():
        train, evaluation = base.transforms(_choice("augment", augment, AUGMENTS), image_size)
    if image_size is not None:
        _check_size(base.model, image_size)
    return Base(
        model=base.model,
        name=os.fspath(name),
        library=base.library,
        classes=base.classes,
        label_names=base.label_names,
        transform_train=train,
        transform_eval=evaluation,
        head_is_new=base.head_is_new,
        outputs=None if base.fit.outputs in (None, tuple(range(base.classes))) else base.fit.outputs,
        head_note=base.fit.note,
    )


def load_model(
    name: str | os.PathLike[str], num_classes: int | None = None, *, weights: str = "pretrained", seed: int = 0
) -> nn.Module:
    """The network of `load_base` alone, which needs no transforms: to look at its blocks."""
    return _load(os.fspath(name), num_classes, None, "auto", weights, seed).model


def _load(
    name: str, num_classes: int | None, label_names: Sequence[str] | None, head: str, weights: str, seed: int
) -> TimmBase | TransformersBase:
    _choice("head", head, HEADS)
    pretrained = _choice("weights", weights, WEIGHT_CHOICES) == "pretrained"
    given = tuple(label_names) if label_names is not None else None
    if given is not None and num_classes not in (None, len(given)):
        raise ConfigError(
            f"num_classes={num_classes} but {len(given)} label_names: give one of them, or make them agree"
        )
    wanted = len(given) if given is not None else num_classes
    if wanted is not None and wanted < 1:
        raise ConfigError(f"num_classes={wanted}: a classifier has at least one output, and two to choose from")
    library, found = _find(name)
    # A new head neither depends on what was drawn before nor changes what is drawn after.
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.default_generator.manual_seed(seed)  # of the CPU alone, where networks are made
        try:
            base = library(found, pretrained, functools.partial(_fit, name, given, wanted, head, pretrained))
            if pretrained and base.head_is_new and base.fit.outputs is not None:  # the checkpoint had none
                if head == "keep":
                    raise ConfigError(f'head="keep": {name} comes without a head; head="new" gives it one')
                base.fit = HeadFit(base.classes, None, f"new: {name} comes without a head")
            if not base.head_is_new and base.fit.outputs is None:
                base.new_head(base.classes)
            if head == "zero":
                _zero_head(base.model)
        except SurgicalError:
            raise
        except Exception as error:  # either library, and the Hub's client, raise many kinds
            raise DataError(f"cannot load {name!r} with {library.library}: {_reason(error)}") from error
    if given is not None and len(given) == base.classes and (base.head_is_new or base.label_names is None):
        base.name_classes(given)
    if base.fit.warning and head == "auto":
        more = ". Labels count its outputs (in Python, `outputs` of the base)" if base.fit.outputs is not None else ""
        warnings.warn(f"The head is {base.fit.note}{more}", stacklevel=4)
    base.model.eval()
    return base


def _choice(option: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ConfigError(f"{option}={value!r}: choose one of {', '.join(choices)}")
    return value


def _find(name: str) -> tuple[type[TimmBase] | type[TransformersBase], str]:
    """The library that a name belongs to, and what that library calls it."""
    folder = Path(os.path.expanduser(name.removeprefix(_FOLDER)))
    if os.path.isdir(folder) or name.startswith(_FOLDER):
        file = folder / "config.json"
        if not file.is_file():
            raise DataError(
                f"{folder} has no config.json: pass the folder that save_pretrained (transformers) or save_for_hf "
                "(timm) wrote"
            )
        place = folder.absolute()  # an adapter's config names it, and may be read in another working directory
        return (TimmBase, f"{_FOLDER}{place}") if _is_timm(file, name) else (TransformersBase, str(place))
    if _HUB.match(name):
        return TimmBase, _HUB.sub("hf-hub:", name, count=1)
    owner, _, rest = name.rpartition("/")
    if owner in ("", "timm") and _in_timm(rest):
        return TimmBase, rest
    if not owner:
        raise DataError(f"unknown base {name!r}: {_tried(name)}")
    try:
        file = Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # the Hub, its cache and the network each have their own, and so has a malformed id
        raise DataError(
            f"unknown base {name!r}: {_tried(name)}, and its config.json on the Hub ({_reason(error)})"
        ) from error
    return (TimmBase, f"hf-hub:{name}") if _is_timm(file, name) else (TransformersBase, name)


def _is_timm(file: Path, name: str) -> bool:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is no JSON ({error}): save or download {name!r} again") from error
    if not isinstance(config, dict):
        raise DataError(f"{file} holds {printable(config)}, no settings of a network: save or download {name!r} again")
    # A timm network that transformers has saved has both: transformers' names of the weights, and so its reader.
    if "model_type" in config:
        return False
    if "architecture" in config:
        return True
    raise DataError(f"{file} names neither timm's architecture nor transformers' model_type: is {name!r} an adapter?")


def _in_timm(name: str) -> bool:
    # Without timm installed, only its own names need it.
    try:
        timm = require("timm", "", "timm")
    except DataError:
        return False
    return bool(timm.is_model(name.partition(".")[0]))


def _tried(name: str) -> str:
    try:
        timm = require("timm", "", "timm")
    except DataError:
        return f'tried {_absent(name)}, and timm, which is not installed: pip install "peft-surgical[timm]"'
    near = difflib.get_close_matches(name.rpartition("/")[2].partition(".")[0], timm.list_models(), n=3)
    meant = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"tried {_absent(name)}, and timm's models (none{meant})"


def _absent(name: str) -> str:
    return f"the folder {Path(os.path.expanduser(name)).absolute()} (none)"


def _fit(
    name: str,
    given: tuple[str, ...] | None,
    wanted: int | None,
    head: str,
    pretrained: bool,
    classes: int,
    known: tuple[str, ...] | None,
) -> HeadFit:
    """What becomes of a head with so many classes of these names."""
    if not pretrained:
        return HeadFit(wanted or classes, None, "new: all weights are random")
    if head in ("new", "zero"):
        return HeadFit(wanted or classes, None, "new, as asked for")
    return fit_head(classes, known, given, wanted, head == "keep", name)


def _check_size(model: nn.Module, size: int) -> None:
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, size, size))
    except Exception as error:  # each architecture has its own way to say so
        raise ConfigError(
            f"an image size of {size}: this network does not take images of {size} pixels ({_reason(error)}): leave "
            "the size out, or choose a network of that size"
        ) from error


def _reason(error: Exception) -> str:
    """The first sentence of an error: the Hub's client writes whole paragraphs."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else f"{text[:300]}..."


def _zero_head(model: nn.Module) -> None:
    tensors = set(anatomy_of(model)["head"].tensors)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in tensors:
                parameter.zero_()


@contextmanager
def _quiet() -> Iterator[None]:
    # transformers reports a head of another size as a table of mismatches; here it is asked for, and is no news.
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
