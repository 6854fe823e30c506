"""What features, labels and scores say together: the kind of a shift, how sure that is, and what to tune."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..evaluation import Interval, paired_difference, wilson_interval
from .drift import Features, Reference, distances, energy, permuted_p
from .probe import CurvePoint, learning_curve, probe_right, spread_against_random

KINDS = {
    "none": "no shift is seen",
    "input": "an input-level shift: the first block's features have moved",
    "feature": "a feature-level shift: features move from a later block on",
    "output": "an output-level shift: features serve, and the head does not",
    "unknown": "not to be told: give source images (source=), or labels",
}
ALPHA = 0.05
ONSET = 0.25
"""The shift begins in the first block that has moved by chance in less than 5% and by this share of the most moved."""
LOST, REGAINED = 0.2, 0.8
"""It lies in the output where this much accuracy is lost, and a new head regains this share of it."""
_HALVES = 50


@dataclass(frozen=True)
class BlockDrift:
    """How far a block's features have moved.

    Attributes:
        name: The block.
        effect: Energy distance between source and target over the mean distance; about 0 without a shift.
        p: By permutation, adjusted for the number of blocks (Holm 1979).
    """

    name: str
    effect: float
    p: float


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    Attributes:
        model: The network.
        images: Number of images of the new place.
        source_images: Number of source images; 0 without.
        kind: A key of `KINDS`.
        sure: Share of random halves of the images that give the same kind and target, in [0, 1]; None without source.
        target: What to tune, as this suggests; None for nothing, or for what cannot be told.
        drift: Blocks in the order in which data flows; ``head`` has the logits.
        confidence: Mean largest probability on the new images, and on source images or None.
        accuracy: On the new images; None without labels or with a new head.
        source_accuracy: On source images, where their labels are known.
        probe: Accuracy of a closed-form probe on the last features, each image predicted from other folds.
        scores: Block -> RGN; None without labels.
        curve: What labels bring, by such a probe.
        label_next: Files to label next, those that stand for most images first; empty where all have labels.
        gain: Number of labels -> accuracy with images chosen so minus with random ones.
        notes: What else has to be known to read this.
    """

    model: str
    images: int
    source_images: int
    kind: str
    sure: float | None
    target: str | None
    drift: tuple[BlockDrift, ...] = ()
    confidence: tuple[float | None, float | None] = (None, None)
    accuracy: Interval | None = None
    source_accuracy: Interval | None = None
    probe: Interval | None = None
    scores: Mapping[str, float] | None = None
    curve: tuple[CurvePoint, ...] = ()
    label_next: tuple[str, ...] = ()
    gain: Mapping[int, Interval] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; intervals as [value, low, high]."""
        return {**asdict(self), "meaning": KINDS[self.kind]}


def judged(
    target: Features,
    reference: Reference | None,
    new_head: bool = False,
    model: str = "",
    scores: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Diagnosis:
    """What features, labels and scores together say; see `diagnose`.

    Args:
        target: Features of the new images.
        reference: Features of the source images; None where there are none.
        new_head: Whether the head was drawn at random, so that logits say nothing.
        model: Name of the network.
        scores: Block -> RGN.
        seed: Seed of everything that is drawn.
    """
    labels, notes = target.labels, []
    if new_head and scores:  # a random draw, whose score says nothing
        scores = {name: value for name, value in scores.items() if name != "head"}
    drift: tuple[BlockDrift, ...] = ()
    right = probed = None
    classes = target.logits.shape[1]
    if labels is not None:
        right = None if new_head else target.logits.argmax(1) == labels
        probed = probe_right(target.last, labels, classes)
    else:
        notes.append("without labels an output-level shift cannot be seen")
    before = None if reference is None or reference.right is None or new_head else float(reference.right.float().mean())
    found: dict[str, Tensor] = {}
    if reference is not None:
        points = reference.seen(target)
        names = [name for name in points if not (new_head and name == "head")]
        found = {name: distances(reference.points[name], points[name]) for name in names}
        first = len(reference.confidence)
        members = (torch.arange(first + len(target.logits)) < first)[None]
        effects = {name: float(energy(one, members)) for name, one in found.items()}
        adjusted = _holm({name: permuted_p(one, first, seed=seed) for name, one in found.items()})
        drift = tuple(BlockDrift(name, effects[name], adjusted[name]) for name in found)
        kind, chosen = verdict(effects, adjusted, right, probed, before)
        sure = _agreement(found, first, (kind, chosen), right, probed, before, seed)
    else:
        kind, chosen = ("unknown", None) if not _is_output(right, probed, before) else ("output", "head")
        sure = None
    if new_head:
        notes.append("the classes are new to the network: its head has to be trained, too")
        if kind == "none":
            kind, chosen = "output", "head"
    if kind == "unknown" and scores:
        chosen = max(scores, key=lambda name: scores[name])
        notes.append("without source images the suggestion is the block with the highest RGN")
    elif scores and chosen and (best := max(scores, key=lambda name: scores[name])) != chosen:
        notes.append(f"RGN is highest for {best}: try both, as `tune --target auto` does")
    confident = None if new_head else float(target.logits.softmax(1).amax(1).mean())
    return Diagnosis(
        model,
        len(target.logits),
        0 if reference is None else len(reference.confidence),
        kind,
        sure,
        chosen,
        drift,
        (confident, None if reference is None or new_head else float(reference.confidence.mean())),
        _share(right),
        None if before is None or reference is None else _share(reference.right),
        _share(probed),
        scores,
        notes=tuple(notes),
    )


def with_curve(found: Diagnosis, target: Features) -> Diagnosis:
    """The diagnosis with what labels bring, and whether to choose which ones; unchanged without labels."""
    if target.labels is None:
        return found
    given = (target.last, target.labels, target.logits.shape[1])
    counts = [count for count in (10, 20, 50) if count <= len(target.labels) // 4]
    return replace(found, curve=learning_curve(*given), gain=spread_against_random(*given, counts))


def verdict(
    effects: Mapping[str, float],
    p: Mapping[str, float],
    right: Tensor | None = None,
    probed: Tensor | None = None,
    before: float | None = None,
) -> tuple[str, str | None]:
    """The kind of shift, and the block to tune.

    Args:
        effects: Block -> energy distance, in the order in which data flows.
        p: Block -> adjusted p.
        right: Which new images the network gets right, bool (n,).
        probed: Which ones a probe on the last features gets right.
        before: Accuracy on the source, a fraction.
    """
    if _is_output(right, probed, before):
        return "output", "head"
    most = max(effects.values())
    moved = [name for name in effects if p[name] <= ALPHA and effects[name] >= ONSET * most]
    if not moved:
        return "none", None
    if moved[0] == "head":
        return "output", "head"
    return ("input" if moved[0] == next(iter(effects)) else "feature"), moved[0]


def _is_output(right: Tensor | None, probed: Tensor | None, before: float | None) -> bool:
    if right is None or probed is None:
        return False
    lost = (1.0 if before is None else before) - float(right.float().mean())
    gained = paired_difference(probed, right)
    return lost >= LOST and gained.low > 0 and gained.value >= REGAINED * lost


def _agreement(
    found: Mapping[str, Tensor],
    first: int,
    said: tuple[str, str | None],
    right: Tensor | None,
    probed: Tensor | None,
    before: float | None,
    seed: int,
) -> float:
    """The share of random halves of both sets that give the same verdict."""
    total = len(next(iter(found.values())))
    agreed = 0
    for number in range(_HALVES):
        generator = torch.Generator().manual_seed(seed + 7919 * (number + 1))
        ours = torch.randperm(first, generator=generator)[: first // 2].sort().values
        theirs = torch.randperm(total - first, generator=generator)[: (total - first) // 2].sort().values
        rows = torch.cat([ours, first + theirs])
        members = (torch.arange(len(rows)) < len(ours))[None]
        halves = {name: one[rows][:, rows] for name, one in found.items()}
        effects = {name: float(energy(one, members)) for name, one in halves.items()}
        p = {name: permuted_p(one, len(ours), 99, number) for name, one in halves.items()}
        own, other = (None if one is None else one[theirs] for one in (right, probed))
        agreed += verdict(effects, p, own, other, before) == said
    return agreed / _HALVES


def _holm(p: Mapping[str, float]) -> dict[str, float]:
    found, least = {}, 0.0
    for number, name in enumerate(sorted(p, key=lambda one: p[one])):
        least = max(least, min(1.0, p[name] * (len(p) - number)))
        found[name] = least
    return found


def _share(right: Tensor | None) -> Interval | None:
    return None if right is None else wilson_interval(int(right.sum()), len(right))
