"""Several adapters become one ordinary adapter, from their files: no base is needed.

Deltas of one base add up (`combine`), so an adapter of block 1 and one of the head make an adapter of both, equal to
the two being active together. Adapters of different bases do not, and are refused by their fingerprints.

Norm statistics and the modules of ``modules_to_save`` are *values*, which do not add up. The result carries a value
that one parent alone brings with the factor 1; in every other case the caller names the parent to take them from.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..errors import AdapterError, BaseMismatchError
from ..files import shown
from ..tuner.combine import Combination, check_weights, combine_deltas, combined_config
from .adapter import Adapter, AdapterSource, read_adapter


class _Values(NamedTuple):
    """What of a combined adapter is no delta; see `Adapter`."""

    statistics: dict[str, torch.Tensor]
    whole: dict[str, torch.Tensor]
    norm_stats: str
    modules_to_save: list[str] | None


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
        method: How overlapping deltas are combined; this and what follows is described in `Combination`.
        density: Share of the values to keep.
        majority_sign: How TIES elects a sign.
        seed: Of what DARE drops.
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
    _check_shapes(parents)
    fingerprint = _common_base(parents, strict_base)
    values = _values(parents, weights, values_from)
    deltas = combine_deltas([parent.scaled() for parent in parents], weights, how)
    _check(deltas, values)
    record = {**how.record(), "parents": [_row(*pair) for pair in zip(parents, weights, strict=True)]}
    config = combined_config(
        [parent.config for parent in parents],
        [*deltas, *values.statistics],
        record if values_from is None else {**record, "values_from": values_from},
        norm_stats=values.norm_stats,
        modules_to_save=values.modules_to_save,
        base_fingerprint={name: fingerprint[name] for name in deltas if name in fingerprint},
    )
    if config.delta_dtype is not None:
        deltas = {name: delta.to(getattr(torch, config.delta_dtype)) for name, delta in deltas.items()}
    combined = Adapter(os.fspath(output or "combined"), config, deltas, values.statistics, values.whole)
    if output is not None:
        combined.save(output)
    return combined


def _row(parent: Adapter, weight: float) -> dict[str, Any]:
    config = parent.config
    return {"adapter": parent.label, "weight": weight, "scale": config.scale, "sha256": config.weights_sha256}


def _check_shapes(parents: Sequence[Adapter]) -> None:
    for a, b in itertools.combinations(parents, 2):
        for name in a.deltas:
            if name in b.deltas and a.deltas[name].shape != b.deltas[name].shape:
                shapes = f"{tuple(a.deltas[name].shape)} in {a.label}, {tuple(b.deltas[name].shape)} in {b.label}"
                raise BaseMismatchError(f"{name} has the shape {shapes}: they belong to other architectures or heads.")


def _common_base(parents: Sequence[Adapter], strict: bool) -> dict[str, str]:
    """The parents' fingerprints together."""
    together: dict[str, str] = {}
    for parent in parents:
        together = {**(parent.config.base_fingerprint or {}), **together}
    if not strict:
        return together
    way_out = "Combine adapters of one base; or, if you know that the deltas fit together, say strict_base=False."
    for parent in parents:
        expected = parent.config.base_fingerprint or {}
        if unknown := [name for name in parent.deltas if name not in expected]:
            raise BaseMismatchError(f"{parent.label} does not say what its base is at {shown(unknown)}. {way_out}")
    for a, b in itertools.combinations(parents, 2):
        common = [name for name in a.deltas if name in b.deltas]
        marks, others = (parent.config.base_fingerprint or {} for parent in (a, b))
        if wrong := [name for name in common if marks[name] != others[name]]:
            raise BaseMismatchError(
                f"{a.label} and {b.label} were trained on different bases ({_base(a)}, {_base(b)}): {len(wrong)} of "
                f"their {len(common)} common tensors differ there, first {shown(wrong)}. {way_out}"
            )
        # Without a common tensor only the names can tell, and the fingerprint when the result is loaded.
        if not common and None not in (names := (_base(a), _base(b))) and names[0] != names[1]:
            raise BaseMismatchError(
                f"{a.label} was trained on {names[0]} and {b.label} on {names[1]}, and they have no tensor in common "
                f"by which to tell whether that is one base. {way_out}"
            )
    return together


def _base(adapter: Adapter) -> str | None:
    return adapter.config.base_model_name_or_path or None


def _values(parents: Sequence[Adapter], weights: Sequence[float], chosen: int | None) -> _Values:
    if chosen is not None:
        one = parents[chosen]
        if one.statistics and one.config.scale != 1:
            raise AdapterError(
                f"{one.label} has the scale {one.config.scale:g}, which shows statistics between the base's and its "
                "own; the base's are not in the file. Set its scale to 1, or take the values from another adapter."
            )
        kept = [one]
    else:
        kept = [parent for parent in parents if parent.statistics or parent.whole]
        _refuse_unclear(kept, parents, weights)
    policies = {parent.config.norm_stats for parent in kept if parent.statistics}
    modules = dict.fromkeys(module for parent in kept for module in parent.config.modules_to_save or ())
    return _Values(
        {name: value for parent in kept for name, value in parent.statistics.items()},
        {name: value for parent in kept for name, value in parent.whole.items()},
        next((policy for policy in ("all", "target") if policy in policies), "frozen"),
        list(modules) or None,
    )


def _refuse_unclear(kept: Sequence[Adapter], parents: Sequence[Adapter], weights: Sequence[float]) -> None:
    way_out = "Say values_from=POSITION of the adapter whose values to take as they are."
    for a, b in itertools.combinations(kept, 2):
        if both := [name for name in (*a.statistics, *a.whole) if name in b.statistics or name in b.whole]:
            raise AdapterError(
                f"{a.label} and {b.label} both carry {shown(both)}. Norm statistics and modules_to_save are values, "
                f"which do not add up. {way_out}"
            )
    for parent, weight in zip(parents, weights, strict=True):
        factor = weight * parent.config.scale
        # A whole module is not scaled by a live model either; but what half of it would be, nobody can say.
        if (parent.statistics or parent.whole) and factor != 1:
            first = next(iter((*parent.statistics, *parent.whole)))
            raise AdapterError(
                f"{parent.label} carries {first}, a value, and enters with the factor {factor:g}. Values are kept as "
                f"they are, with the factor 1 or not at all. {way_out}"
            )


def _check(deltas: dict[str, torch.Tensor], values: _Values) -> None:
    if broken := [name for name, delta in deltas.items() if not bool(torch.isfinite(delta).all())]:
        raise AdapterError(f"{shown(broken)} would not be finite: choose smaller weights.")
    if both := [name for name in deltas if name in values.whole]:
        raise AdapterError(
            f"{shown(both)} is tuned by one adapter and saved whole by another (modules_to_save): its delta belongs to "
            "another value. Take the values from the adapter with the delta (values_from), or leave one of them out."
        )
