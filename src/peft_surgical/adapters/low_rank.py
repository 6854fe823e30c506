"""What of an adapter LoRA can express: factors of its deltas, and the modules that PEFT keeps beside them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import SurgicalConfig
from ..keys import PEFT_PREFIX, join
from ..tuner.attach import bare
from ..tuner.plan import Plan
from ..tuner.specialise import base_class
from ..tuner.support import ModulePlan

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# They take their children's weights without calling the children, so a LoRA layer in a child's place would not be run.
_READS_CHILDREN = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


# --- factors ---


def low_rank(
    matrix: torch.Tensor, rank: int | None = None, energy: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best approximation ``B @ A`` of a matrix (Eckart and Young 1936).

    Args:
        matrix: (out, in), finite.
        rank: Number of singular values to keep, at most.
        energy: Instead: keep the fewest that hold this share of the sum of all squared singular values, in (0, 1].

    Returns:
        A of shape (r, in) and B of shape (out, r), with r at least 1, in the matrix's dtype, at least float32. The
        singular values are in B, as in PEFT.

    Example:
        >>> a, b = low_rank(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), energy=0.9)
        >>> b @ a
        tensor([[3., 0.],
                [0., 0.]])
    """
    u, s, v = torch.linalg.svd(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), full_matrices=False)
    kept = len(s) if rank is None else min(rank, len(s))
    if energy is not None:
        held = s.double().square().cumsum(0)
        kept = int((held < energy * held[-1]).sum()) + 1
    return v[:kept].contiguous(), (u[:, :kept] * s[:kept]).contiguous()


def as_matrix(module: nn.Module, delta: torch.Tensor) -> torch.Tensor:
    """(out, in) of the delta of a weight; a convolution's input is a patch. Some store theirs transposed."""
    return delta.T if isinstance(module, (Conv1D, nn.Embedding)) else delta.flatten(1)


def lora_tensors(
    path: str, module: nn.Module, shape: Sequence[int], a: torch.Tensor, b: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The factors of the weight of ``module``, of this shape, by PEFT's keys and in its layout."""
    if isinstance(module, nn.Embedding):
        return {f"{PEFT_PREFIX}{path}.lora_embedding_A": a, f"{PEFT_PREFIX}{path}.lora_embedding_B": b}
    if isinstance(module, _CONVOLUTIONS):
        a, b = a.reshape(-1, *shape[1:]), b.reshape(*b.shape, *(1 for _ in shape[2:]))
    return {f"{PEFT_PREFIX}{path}.lora_A.weight": a, f"{PEFT_PREFIX}{path}.lora_B.weight": b}


# --- what is kept how ---


@dataclass(frozen=True)
class LoraPlan:
    """What becomes of the tensors of an adapter.

    Attributes:
        factors: Modules whose weight gets factors, by path.
        bias: Whether ``lora_B`` has a bias, which takes the deltas of biases.
        whole: Paths of the modules that are kept whole, by ``modules_to_save``.
        nothing: Names of the tensors that PEFT has no place for.
    """

    factors: Mapping[str, ModulePlan]
    bias: bool
    whole: tuple[str, ...]
    nothing: tuple[str, ...]


def plan_lora(network: nn.Module, plan: Plan, moved: Collection[str], saved: Sequence[str], keep: bool) -> LoraPlan:
    """Decide what is kept how.

    Args:
        network: The base, with or without adapters.
        plan: The adapter's.
        moved: Names of the tensors with a delta other than zero, and of the adapter's statistics.
        saved: The adapter's own ``modules_to_save``.
        keep: Whether to keep anything but factors.
    """
    with bare(network):
        modules = dict(network.named_modules())
        factors, others, nothing = _sorted_by_kind(plan, moved, modules)
        biased = [path for path in factors if join(path, "bias") in moved]
        bias = False
        if not keep:
            nothing += [join(path, "bias") for path in biased]
            factors = {path: entry for path, entry in factors.items() if join(path, "weight") in moved}
        elif biased:
            # PEFT's lora_bias is for all targets, and merges only into those that have a bias: either these are kept
            # whole or the others, whichever has fewer values.
            without = [path for path in factors if getattr(modules[path], "bias", None) is None]
            sizes = [sum(p.numel() for path in some for p in modules[path].parameters()) for some in (without, biased)]
            bias = sizes[0] < sizes[1]
            others |= {path: factors.pop(path) for path in (without if bias else biased)}
        whole = _unambiguous(_units(others, modules) if keep else set(), factors, modules, saved)
        kept = tuple(path for path in modules if path in whole)
        factors = {path: entry for path, entry in factors.items() if path not in whole}
        for path, entry in others.items():
            if not _within(path, kept):
                nothing += _moved_in(entry, moved)
        return LoraPlan(factors, bias, kept, tuple(sorted(nothing, key=plan.names.index)))


def _sorted_by_kind(
    plan: Plan, moved: Collection[str], modules: Mapping[str, nn.Module]
) -> tuple[dict[str, ModulePlan], dict[str, ModulePlan], list[str]]:
    """The modules that can have factors, the others, and the tensors of which nothing can be kept."""
    factors: dict[str, ModulePlan] = {}
    others: dict[str, ModulePlan] = {}
    nothing: list[str] = []
    for entry in plan.modules:
        names = _moved_in(entry, moved)
        leaves = {name.rpartition(".")[2] for name in names}
        parent = modules.get(entry.path.rpartition(".")[0])
        if any(len(entry.parameters.get(leaf, ())) > 1 for leaf in leaves):
            # A tied tensor: LoRA and a whole copy would change it in one of the places that read it.
            nothing += names
        elif not names:
            continue
        elif entry.path and leaves <= {"weight", "bias"} and _has_factors(entry.module, parent):
            factors[entry.path] = entry
        else:
            others[entry.path] = entry
    return factors, others, nothing


def _moved_in(entry: ModulePlan, moved: Collection[str]) -> list[str]:
    names = (join(entry.path, name) for name in (*entry.parameters, *entry.statistics))
    return [name for name in names if name in moved]


def _has_factors(module: nn.Module, parent: nn.Module | None) -> bool:
    """Whether PEFT's LoRA on this module is the same as a delta of its weight.

    Exact classes: a subclass may use its weight otherwise (timm's weight-standardised convolutions). PEFT's LoRA of a
    convolution takes over kernel, stride and padding, and nothing else.
    """
    kind = base_class(module)
    if isinstance(parent, _READS_CHILDREN):
        return False
    if kind in _CONVOLUTIONS:
        plain: tuple[object, ...] = (module.groups, set(module.dilation), module.padding_mode)  # type: ignore[arg-type]
        return plain == (1, {1}, "zeros")
    return kind in (nn.Linear, Conv1D) or (kind is nn.Embedding and module.max_norm is None)


def _units(entries: Iterable[str], modules: Mapping[str, nn.Module]) -> set[str]:
    """The modules to keep whole for these: themselves, where no other module's tensors would come along."""
    chosen = {path for path in entries if path and isinstance(modules[path], nn.MultiheadAttention)}
    chosen |= {path for path in entries if path and _is_leaf(modules[path])}
    return {path for path in chosen if not _within(path, chosen - {path})}


def _is_leaf(module: nn.Module) -> bool:
    return not any(child._parameters or child._buffers for child in module.modules() if child is not module)


def _within(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def _unambiguous(
    whole: set[str], factors: Mapping[str, ModulePlan], modules: Mapping[str, nn.Module], saved: Sequence[str]
) -> set[str]:
    """The modules that ``modules_to_save`` can name, and those that it then names besides.

    PEFT takes every module whose path *ends in* the text, so that the final ``norm`` names all of a network's; and it
    adds no LoRA to a module of which a part of the path matches.
    """
    while True:
        taken = {path for path in modules if whole and path.endswith(tuple(whole))}
        besides = taken - whole - {path for path in modules if saved and path.endswith(tuple(saved))}
        besides = {path for path in besides if modules[path].state_dict()}
        containers = [path for path in besides if not _is_leaf(modules[path])]
        elsewhere = [path for path in factors if path not in taken]
        ambiguous = {
            path
            for path in whole
            if any(other.endswith(path) for other in containers)
            or any(re.match(rf"(^|.*\.){path}($|\..*)", other) for other in elsewhere)
        }
        if not ambiguous and not besides:
            return whole
        whole = whole - ambiguous if ambiguous else whole | besides


def lora_config(
    source: SurgicalConfig, chosen: LoraPlan, ranks: Mapping[str, int], network: nn.Module, rank: int | None
) -> LoraConfig:
    """The config by which PEFT loads what was kept.

    Args:
        source: The surgical adapter's.
        chosen: What is kept how.
        ranks: Module -> rank of its factors.
        network: The base.
        rank: The rank that was asked for, if any.
    """
    common = rank if rank in ranks.values() else Counter(ranks.values()).most_common(1)[0][0]
    # Anchored: PEFT matches the ends of paths, and "conv1" is the end of "layer1.0.conv1", too.
    pattern = {f"^{re.escape(path)}": found for path, found in ranks.items() if found != common}
    paths = [path for path, _ in network.named_modules()]
    exact = all(sum(path == end or path.endswith(f".{end}") for path in paths) == 1 for end in ranks)
    return LoraConfig(
        r=common,
        lora_alpha=common,
        target_modules=list(ranks) if exact else "|".join(re.escape(path) for path in ranks),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        modules_to_save=[*(source.modules_to_save or ()), *chosen.whole] or None,
        lora_bias=chosen.bias,
        fan_in_fan_out=all(isinstance(entry.module, Conv1D) for entry in chosen.factors.values()),
        base_model_name_or_path=source.base_model_name_or_path,
        revision=source.revision,
        task_type=source.task_type,
        inference_mode=True,
    )
