"""`diagnose`: what has shifted at a new place, how sure that is, and what it suggests to tune."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bases.load import Base, load_base
from ..blocks import Anatomy, anatomy_of
from ..choosing.resolve import score_blocks
from ..data.incoming import Incoming, read_incoming
from ..errors import ConfigError, DataError
from ..experiment.adapting import numbered_as
from ..extras import accelerator_or_cpu
from .drift import Features, Reference, block_features
from .probe import spread
from .verdict import Diagnosis, judged, with_curve

FEWEST = 20


@dataclass(frozen=True)
class Seen:
    """The images that were diagnosed, for pages that show them, and what the network makes of them."""

    images: Incoming
    features: Features


def diagnose(
    model: str,
    data: Any,
    *,
    source: Any = None,
    save_reference: str | os.PathLike[str] | None = None,
    images: int = 300,
    label_next: int = 20,
    unlabelled: bool = False,
    on_broken: str = "raise",
    head: str = "auto",
    weights: str = "pretrained",
    batch_size: int = 32,
    seed: int = 0,
    cpu: bool = False,
    **columns: Any,
) -> tuple[Diagnosis, Seen]:
    """Compare a new place with the source, block by block, and read from it what to tune. Nothing is trained.

    Args:
        model: As for `load_base`.
        data: Images of the new place, with labels or without; see `read_incoming`.
        source: Images of the source, in the same way; or a ``.safetensors`` file that ``save_reference`` wrote.
        save_reference: Write what is kept of the source images to this file, some 100 KB for each block.
        images: Use so many of each at most.
        label_next: How many images to name for labelling.
        unlabelled: Subfolders are not classes.
        on_broken: As for `read_data`.
        head: As for `load_base`.
        weights: As for `load_base`.
        batch_size: Images per forward pass.
        seed: Seed of everything that is drawn.
        cpu: Leave an accelerator alone.
        columns: ``image_column`` and ``label_column`` of `read_data`.

    Raises:
        DataError: There are too few images, or a reference is of another network.
        ConfigError: A reference is to be saved without source images.
    """
    is_file = isinstance(source, (str, os.PathLike)) and Path(source).suffix == ".safetensors"
    if save_reference is not None and (source is None or is_file):
        raise ConfigError("save_reference= writes what is kept of source images: give them as source=")
    reading = {"unlabelled": unlabelled, "seed": seed, "limit": images, "on_broken": on_broken, **columns}
    reading["in_order"] = False  # the first files by name may be of one class, or of one day
    found = _read(data, "the new place", reading)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The head is")
        base = load_base(model, label_names=found.label_names, head=head, weights=weights)
        found = numbered_as(base, found)
        known = None if source is None or is_file else _read(source, "the source", reading)
        same = known is not None and known.labels is not None and not base.head_is_new
        if known is not None and same and set(known.label_names or ()) <= set(base.label_names or ()):
            known = numbered_as(base, known)
        elif known is not None and known.label_names != found.label_names:
            known = Incoming(known.files, known.encoded)  # its classes are not the network's
    network = base.model.to(accelerator_or_cpu(cpu)).eval()
    anatomy = anatomy_of(network)
    target, pixels = _features(base, anatomy, found, batch_size)
    reference = None
    if is_file:
        reference = Reference.load(source)
    elif known is not None:
        reference = Reference.of(_features(base, anatomy, known, batch_size)[0], Path(str(model)).name)
    if reference is not None and save_reference is not None:
        reference.save(save_reference)
    scores = None
    if target.labels is not None:
        rows = zip(pixels, target.labels.split(batch_size), strict=True)
        batches = [{"pixel_values": one, "labels": labels} for one, labels in rows]
        scores = dict(score_blocks(network, batches, "rgn", None).block_scores)
    diagnosis = judged(target, reference, base.head_is_new, str(model), scores, seed)
    rest = spread(target.last, label_next, seed) if target.labels is None else []
    named = tuple(found.files[number] for number in rest)
    return replace(with_curve(diagnosis, target), label_next=named), Seen(found, target)


def _read(data: Any, what: str, reading: Mapping[str, Any]) -> Incoming:
    found = read_incoming(data, **reading)
    if len(found) < FEWEST:
        raise DataError(f"{len(found)} images of {what}: give {FEWEST} or more, better 50 to 300")
    return found


def _features(base: Base, anatomy: Anatomy, images: Incoming, batch_size: int) -> tuple[Features, list[Tensor]]:
    device = next(base.model.parameters()).device
    pixels = [base.transform_eval(images.read(number)) for number in range(len(images))]
    batches = [torch.stack(pixels[begun : begun + batch_size]) for begun in range(0, len(pixels), batch_size)]
    return block_features(base.model, anatomy, (one.to(device) for one in batches), images.labels), batches


def least_sure(features: Features, count: int) -> Sequence[int]:
    """The images with the smallest largest probability, the least sure first."""
    return features.logits.softmax(1).amax(1).argsort()[:count].tolist()
