"""Several adapters become one ordinary adapter, from their files: no base is needed.

Deltas of one base add up (`combine_adapters`), so an adapter of block 1 and one of the head make an adapter of both,
equal to the two being active together. Adapters of different bases do not add up, and are refused by their
fingerprints.

Norm statistics and the modules of ``modules_to_save`` are *values*, which do not add up. The result carries a value
that one parent alone brings with the factor 1; in every other case the caller names the parent to take them from.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Sequence

import torch

from ..errors import AdapterError, BaseMismatchError
from ..files import shown
from ..fingerprints import differing, joined
from ..tuner.base import is_whole
from ..tuner.combine import Combination, check_weights, combine_deltas, combined_config
from .adapter import Adapter, AdapterSource, read_adapter


def combine_adapters(
    adapters: Sequence[AdapterSource],
    weights: Sequence[float] | None = None,
    method: str = "linear",
    *,
    density: float | None = None,
    majority_sign: str = "total",
    seed: int = 0,
    values_from: int | None = None,
    strict_base: bool = True,
    output: str | os.PathLike[str] | None = None,
) -> Adapter:
    """Combine adapters into one, which saves, loads, merges and combines like any other.

    ::

        combine_adapters(["frost", "head-b"], method="disjoint", output="both")     # block1 of one, head of the other
        combine_adapters(["frost"], [-1.0], output="minus-frost")                   # negation
        combine_adapters(["a", "b", "c"], [1, 1, 1], "ties", density=0.2, output="merged")

    A tensor that only some of the adapters tune is combined from those. Each adapter's scale counts into its weight,
    and the result's scale is 1. Its deltas have the parents' common ``delta_dtype``, or that of the sum. Its config
    names the parents, their weights and the method under ``selection``, and has the base's fingerprint of its tensors.

    Args:
        adapters: Folders, Hub ids, or live adapters; see `read_adapter`.
        weights: One factor for each; 1 by default, which adds them up.
        method: How overlapping deltas are combined; this and the next three are described in `Combination`.
        density: Share of the values to keep.
        majority_sign: How TIES elects a sign.
        seed: Seed of the draw of what DARE drops.
        values_from: Position of the adapter whose norm statistics and ``modules_to_save`` the result has, unscaled;
            the others' are left out. None refuses what is not clear by itself.
        strict_base: False combines adapters whose fingerprints differ, as for one base in two dtypes.
        output: A new folder to save the result to.

    Raises:
        BaseMismatchError: They were trained on different bases. Names the first tensors that differ.
        AdapterFileError: One of them cannot be read.
        AdapterError: For unknown choices, or what does not add up.
    """
    how = Combination(method, density, majority_sign, seed)
    if not adapters:
        raise AdapterError("No adapter to combine: give one or more.")
    weights = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    check_weights(weights, len(adapters))
    if values_from is not None and not 0 <= values_from < len(adapters):
        raise AdapterError(f"values_from={values_from}: give a position from 0 to {len(adapters) - 1}.")
    parents = [read_adapter(source) for source in adapters]
    for a, b in itertools.combinations(parents, 2):
        check_shapes(a, b)
    if strict_base:
        _check_one_base(parents)
    kept = _parents_with_values(parents, weights, values_from)
    statistics = {name: value for parent in kept for name, value in parent.statistics.items()}
    whole = {name: value for parent in kept for name, value in parent.whole.items()}
    policies = {parent.config.norm_stats for parent in kept if parent.statistics}
    modules = dict.fromkeys(module for parent in kept for module in parent.config.modules_to_save or ())
    deltas = combine_deltas([parent.scaled() for parent in parents], weights, how)
    _check_result(deltas, whole)

    rows = [
        {
            "adapter": parent.label,
            "weight": weight,
            "scale": parent.config.scale,
            "sha256": parent.config.weights_sha256,
        }
        for parent, weight in zip(parents, weights, strict=True)
    ]
    record = {**how.record(), "parents": rows}
    config = combined_config(
        [parent.config for parent in parents],
        [*deltas, *statistics],
        record if values_from is None else {**record, "values_from": values_from},
        norm_stats=next((policy for policy in ("all", "estimated", "target") if policy in policies), "frozen"),
        modules_to_save=list(modules) or None,
        base_fingerprint=joined(map(_fingerprint, parents)),
    )
    if config.delta_dtype is not None:
        deltas = {name: delta.to(getattr(torch, config.delta_dtype)) for name, delta in deltas.items()}
    combined = Adapter(os.fspath(output or "combined"), config, deltas, statistics, whole)
    if output is not None:
        combined.save(output)
    return combined


def check_shapes(a: Adapter, b: Adapter) -> None:
    """Raise `BaseMismatchError` if a tensor that both adapters tune has another shape in each."""
    for name in a.deltas:
        if name in b.deltas and a.deltas[name].shape != b.deltas[name].shape:
            shapes = f"{tuple(a.deltas[name].shape)} in {a.label}, {tuple(b.deltas[name].shape)} in {b.label}"
            raise BaseMismatchError(
                f"{name} has the shape {shapes}: the adapters belong to other architectures or heads. Take two of one "
                "base."
            )


def _fingerprint(adapter: Adapter) -> dict[str, str]:
    return adapter.config.base_fingerprint or {}


def _check_one_base(parents: Sequence[Adapter]) -> None:
    way_out = "Combine adapters of one base; or, if you know that the deltas fit together, say strict_base=False."
    for parent in parents:
        if unknown := [name for name in parent.deltas if name not in _fingerprint(parent)]:
            raise BaseMismatchError(f"{parent.label} does not say what its base is at {shown(unknown)}. {way_out}")
    for a, b in itertools.combinations(parents, 2):
        one, other = (parent.config.base_model_name_or_path or None for parent in (a, b))
        common = [name for name in _fingerprint(a) if name in _fingerprint(b)]
        held = [parent.config for parent in (a, b)]
        wrong = differing(_fingerprint(a), _fingerprint(b))
        if wrong := [name for name in wrong if not any(is_whole(name, config) for config in held)]:
            raise BaseMismatchError(
                f"{a.label} and {b.label} were trained on different bases ({one}, {other}): {len(wrong)} of their "
                f"{len(common)} common tensors differ there, first {shown(wrong)}. {way_out}"
            )
        # Without a common tensor only the names can tell, and the fingerprint when the result is loaded.
        if not common and None not in (one, other) and one != other:
            raise BaseMismatchError(
                f"{a.label} was trained on {one} and {b.label} on {other}, and they have no tensor in common by which "
                f"to tell whether that is one base. {way_out}"
            )


def _parents_with_values(parents: Sequence[Adapter], weights: Sequence[float], chosen: int | None) -> list[Adapter]:
    """Those whose statistics and whole modules the result gets."""
    if chosen is not None:
        one = parents[chosen]
        if one.statistics and one.config.scale != 1:
            raise AdapterError(
                f"{one.label} has the scale {one.config.scale:g}, which shows statistics between the base's and its "
                "own; the base's are not in the file. Set its scale to 1, or take the values from another adapter."
            )
        return [one]
    way_out = "Say values_from=POSITION of the adapter whose values to take as they are."
    factors = [weight * parent.config.scale for parent, weight in zip(parents, weights, strict=True)]
    carrying = [(parent, factor) for parent, factor in zip(parents, factors, strict=True) if _value_names(parent)]
    for (a, _), (b, _) in itertools.combinations(carrying, 2):
        if both := [name for name in _value_names(a) if name in _value_names(b)]:
            raise AdapterError(
                f"{a.label} and {b.label} both carry {shown(both)}. Norm statistics and modules_to_save are values, "
                f"which do not add up. {way_out}"
            )
    for parent, factor in carrying:
        # A live model does not scale a whole module either; but what half of one would be is not defined.
        if factor != 1:
            raise AdapterError(
                f"{parent.label} carries {_value_names(parent)[0]}, a value, and enters with the factor {factor:g}. "
                f"Values are kept as they are, with the factor 1 or not at all. {way_out}"
            )
    return [parent for parent, _ in carrying]


def _value_names(adapter: Adapter) -> list[str]:
    return [*adapter.statistics, *adapter.whole]


def _check_result(deltas: dict[str, torch.Tensor], whole: Collection[str]) -> None:
    if broken := [name for name, delta in deltas.items() if not bool(torch.isfinite(delta).all())]:
        raise AdapterError(f"{shown(broken)} would not be finite: choose smaller weights.")
    if both := [name for name in deltas if name in whole]:
        raise AdapterError(
            f"{shown(both)} is tuned by one adapter and saved whole by another (modules_to_save): its delta belongs to "
            "another value. Take the values from the adapter with the delta (values_from), or leave one of them out."
        )
