"""Arithmetic on several adapters' deltas, which are task vectors, and the config of the result."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft.utils import merge_utils

from ..blocks import parse
from ..config import SurgicalConfig
from ..errors import AdapterError
from ..files import shown
from ..keys import join
from .layer import SurgicalLayer

COMBINATIONS = ("linear", "disjoint", "ties", "dare_linear", "dare_ties", "magnitude_prune")
MAJORITY_SIGNS = ("total", "frequency")
_PRUNE_AT_RANDOM = ("dare_linear", "dare_ties")
_ELECT_A_SIGN = ("ties", "dare_ties")


@dataclasses.dataclass(frozen=True)
class Combination:
    """How deltas are combined.

    Attributes:
        method: ``linear`` is the weighted sum (task arithmetic, Ilharco et al. 2023). ``disjoint`` is the same for
            adapters that share no tensor, and refuses others. ``ties`` (Yadav et al. 2023) keeps the largest values of
            each, elects a sign for each entry, and takes the mean of those that agree with it. ``dare_linear`` and
            ``dare_ties`` (Yu et al. 2024) drop values at random instead and rescale the others. ``magnitude_prune``
            sums the largest values of each.
        density: Share of a tensor's values to keep, in (0, 1]; needed by all but the first two. As in PEFT it is a
            share of every single tensor, of which at least one value is kept; Yadav et al. rank all values of a model.
        majority_sign: How a sign is elected: ``total`` by the sum of the values, ``frequency`` by their number.
        seed: Seed of the random draw, which depends on the tensor's name and not on the order of tensors.

    Raises:
        AdapterError: For an unknown choice, or a density that is missing or out of range.
    """

    method: str = "linear"
    density: float | None = None
    majority_sign: str = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in COMBINATIONS:
            raise AdapterError(f"No method {self.method!r} of combining: choose one of {', '.join(COMBINATIONS)}.")
        if self.majority_sign not in MAJORITY_SIGNS:
            choices = " or ".join(MAJORITY_SIGNS)
            raise AdapterError(f"majority_sign={self.majority_sign!r} elects no sign: choose {choices}.")
        if self.prunes and (self.density is None or not 0 < self.density <= 1):
            raise AdapterError(f"{self.method!r} needs a density in (0, 1], got {self.density}.")

    @property
    def prunes(self) -> bool:
        """Whether it drops values, and so needs a density."""
        return self.method not in ("linear", "disjoint")

    def record(self) -> dict[str, Any]:
        """The settings that this method uses, as plain JSON values."""
        used: dict[str, Any] = {"method": self.method}
        used |= {"density": self.density} if self.prunes else {}
        used |= {"majority_sign": self.majority_sign} if self.method in _ELECT_A_SIGN else {}
        return used | ({"seed": self.seed} if self.method in _PRUNE_AT_RANDOM else {})


def combine_deltas(
    parents: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float], how: Combination
) -> dict[str, torch.Tensor]:
    """Combine deltas by name. A tensor that only some of the parents have is combined from those.

    Args:
        parents: Name -> delta (float32 or wider) of each parent; deltas of one name have one shape.
        weights: One factor for each parent.
        how: The method.

    Raises:
        AdapterError: The method is ``disjoint`` and a tensor has two deltas.

    Example:
        >>> a, b = {"w": torch.tensor([1.0, -2.0])}, {"w": torch.tensor([3.0, 1.0]), "v": torch.ones(1)}
        >>> combine_deltas([a, b], [1.0, 0.5], Combination())
        {'w': tensor([ 2.5000, -1.5000]), 'v': tensor([0.5000])}
    """
    check_disjoint(parents, how)
    combined = {}
    for name in dict.fromkeys(name for deltas in parents for name in deltas):
        present = [(deltas[name], weight) for deltas, weight in zip(parents, weights, strict=True) if name in deltas]
        combined[name] = combine_tensor(name, [delta for delta, _ in present], [w for _, w in present], how)
    return combined


def check_disjoint(parents: Sequence[Any], how: Combination) -> None:
    """Raise `AdapterError` if the method is ``disjoint`` and two parents (collections of names) share a tensor."""
    if how.method != "disjoint":
        return
    seen: set[str] = set()
    for parent in parents:
        if common := [name for name in parent if name in seen]:
            raise AdapterError(
                f"Two of the adapters tune {shown(common)}: they are not disjoint. Say how to combine what overlaps: "
                f"{', '.join(method for method in COMBINATIONS if method != 'disjoint')}."
            )
        seen.update(parent)


def combine_tensor(name: str, tensors: list[torch.Tensor], weights: Sequence[float], how: Combination) -> torch.Tensor:
    """Combine the deltas of the tensor ``name``, all of one shape, with one weight each."""
    if len(tensors) == 1 and not how.prunes:
        # Not the sum of one: 0.0 + -0.0 is 0.0, and a delta of -0.0 is the identity bit for bit.
        return tensors[0] * weights[0]
    if how.prunes:
        tensors = _pruned(name, tensors, how)
    if how.method not in _ELECT_A_SIGN:
        return merge_utils.task_arithmetic(tensors, _factors(weights, tensors[0]))
    # A negative weight negates its adapter, so it does before signs are elected; PEFT elects by the unweighted values.
    tensors = [-tensor if weight < 0 else tensor for tensor, weight in zip(tensors, weights, strict=True)]
    stacked = torch.stack(tensors)
    factors = merge_utils.reshape_weight_task_tensors(stacked, _factors(weights, stacked).abs())
    mask = merge_utils.calculate_majority_sign_mask(stacked, how.majority_sign)
    return merge_utils.disjoint_merge(stacked * factors, mask)


def _factors(weights: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(weights, dtype=like.dtype, device=like.device)


def _pruned(name: str, tensors: list[torch.Tensor], how: Combination) -> list[torch.Tensor]:
    assert how.density is not None
    if how.density == 1:  # merge_utils would warn that nothing is pruned
        return tensors
    if how.method not in _PRUNE_AT_RANDOM:
        return [_largest(tensor, how.density) for tensor in tensors]
    # On the CPU, and from a generator of its own state: equal on every machine, whatever was drawn before.
    digest = hashlib.sha256(f"{how.seed}|{name}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        pruned = [merge_utils.prune(tensor.cpu(), how.density, "random", rescale=True) for tensor in tensors]
    return [new.to(old.device) for new, old in zip(pruned, tensors, strict=True)]


def _largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    n = tensor.numel()
    if int(density * n) == 0:  # merge_utils rounds down, which would drop a small tensor (a bias, a scale) as a whole
        density = 1.5 / n if n > 1 else 1.0
    return tensor if density == 1 else merge_utils.prune(tensor, density, "magnitude")


# --- configs ---


def combined_config(
    configs: Sequence[SurgicalConfig], names: Sequence[str], record: Mapping[str, Any], **values: Any
) -> SurgicalConfig:
    """The config of an adapter that was combined from others.

    Fields that all parents agree on are kept, others have their default. The names of the tensors decide what is tuned;
    the target is the sum of the parents' targets where that means the same tensors, else it is left out.

    Args:
        configs: The configs of the parents.
        names: The tensors of the combined adapter.
        record: The method and the parents, kept under ``selection``.
        **values: Fields to set instead.
    """
    default = SurgicalConfig(tensor_names=[])
    fields: dict[str, Any] = {}
    for entry in (entry for entry in dataclasses.fields(SurgicalConfig) if entry.init):
        first, *others = (getattr(config, entry.name) for config in configs)
        fields[entry.name] = first if all(one == first for one in others) else getattr(default, entry.name)
    fields |= {"scale": 1.0, "base_fingerprint": None, "weights_sha256": None, "strict_base": True}
    fields |= {"tensor_names": list(names), "selection": {"combined": dict(record)}, **values}
    if len(configs) > 1:
        fields |= _joined_target(configs, fields["modules_to_save"])
    fields.pop("peft_type")
    return SurgicalConfig(**fields)


def _joined_target(configs: Sequence[SurgicalConfig], whole: Sequence[str] | None) -> dict[str, Any]:
    names = ("target", "target_modules", "exclude_modules", "blocks", "modules_to_save")
    if all(getattr(config, name) == getattr(configs[0], name) for config in configs for name in names):
        return {name: getattr(configs[0], name) for name in names}
    unknown = dict.fromkeys(("target", "target_modules", "exclude_modules", "blocks"))
    saved = {module for config in configs for module in config.modules_to_save or ()}
    other_blocks = any(config.exclude_modules or config.blocks != configs[0].blocks for config in configs)
    if other_blocks or saved != {*(whole or ())}:
        return unknown
    if all(isinstance(config.target_modules, list) for config in configs):
        joined = dict.fromkeys(module for config in configs for module in config.target_modules or ())
        return {**unknown, "target_modules": list(joined), "blocks": configs[0].blocks}
    if any(config.target is None for config in configs):
        return unknown
    specs = [parse(config.target or "") for config in configs]
    # Terms are read from left to right, so what one parent takes away would be taken from the parents before it.
    if any(step.minus for spec in specs for step in spec.steps):
        return unknown
    terms = dict.fromkeys(str(term) for spec in specs for term in spec.terms)
    return {**unknown, "target": " + ".join(terms), "blocks": configs[0].blocks}


# --- adapters of one model ---


def config_of_combination(
    configs: Mapping[str, SurgicalConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    how: Combination,
) -> SurgicalConfig:
    """Check that adapters of a model can be combined into one called ``name``, and make its config."""
    if (missing := [adapter for adapter in adapters if adapter not in configs]) or not adapters:
        raise AdapterError(f"No adapter {', '.join(missing) or 'given'}; there are {', '.join(configs)}.")
    if name in configs:
        raise AdapterError(f"An adapter {name!r} exists already: choose another name or delete it first.")
    check_weights(weights, len(adapters))
    if moving := [adapter for adapter in adapters if configs[adapter].norm_stats != "frozen"]:
        raise AdapterError(
            f"{', '.join(moving)} carry statistics, which do not add up; combine frozen-policy adapters, or saved "
            "ones by peft_surgical.combine_adapters, which can take the statistics of one."
        )
    if whole := [adapter for adapter in adapters if configs[adapter].modules_to_save]:
        raise AdapterError(
            f"{', '.join(whole)} carry modules_to_save, which are no deltas and cannot be combined; save the adapters "
            "and call peft_surgical.combine_adapters, which can take those of one."
        )
    parents = [configs[adapter] for adapter in adapters]
    check_disjoint([parent.tensor_names for parent in parents], how)
    names = list(dict.fromkeys(name for parent in parents for name in parent.tensor_names or ()))
    rows = [
        {"adapter": adapter, "weight": float(weight), "scale": parent.scale}
        for adapter, weight, parent in zip(adapters, weights, parents, strict=True)
    ]
    return combined_config(parents, names, {**how.record(), "parents": rows})


@torch.no_grad()
def fill_combined(
    layers: Iterable[tuple[str, SurgicalLayer]],
    new: str,
    adapters: Sequence[str],
    weights: Sequence[float],
    how: Combination,
) -> None:
    """Set the deltas of ``new``, which is attached already, to the combination of those of ``adapters``, scaled.

    Args:
        layers: (path, layer) of a model; see `surgical_layers`.
        new: The adapter to fill.
        adapters: The adapters to combine.
        weights: One factor for each of them.
        how: The method.

    Raises:
        AdapterError: A combined delta is not finite.
    """
    for path, layer in layers:
        pairs = [(name, w) for name, w in zip(adapters, weights, strict=True) if name in layer.surgical_delta]
        for key, target in layer.surgical_delta[new].named_parameters() if pairs else ():
            present = [(name, w) for name, w in pairs if key in layer.surgical_delta[name]._parameters]
            tensors = [layer.delta(name, key).to(target.dtype) * layer.scaling[name] for name, _ in present]
            combined = combine_tensor(join(path, key), tensors, [w for _, w in present], how)
            if not bool(torch.isfinite(combined).all()):
                raise AdapterError(f"{join(path, key)} would not be finite: choose smaller weights.")
            target.copy_(combined)


def check_weights(weights: Sequence[float], adapters: int) -> None:
    """Raise `AdapterError` unless there is one finite weight for each adapter."""
    if len(weights) != adapters:
        raise AdapterError(f"{adapters} adapters but {len(weights)} weights: give one weight per adapter.")
    if broken := [weight for weight in weights if not math.isfinite(weight)]:
        raise AdapterError(f"The weight {broken[0]} is not finite.")
