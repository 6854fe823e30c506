"""Finding where a network can be cut: its module calls are watched in a forward pass of two and of three samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

from ..keys import HOLDER
from ..tuner.attach import surgical_layers
from .cut import Blank, NetworkCut, PrefixCall, UncutError

RunOn = Callable[[int], Any]
"""Runs the network's forward on so many samples."""


@dataclass(eq=False)
class _Call:
    """A call of a module during the pass that is watched."""

    module: nn.Module
    name: str
    work: int
    inside: list[_Call] = field(default_factory=list)
    output: Any = None


def cuts_of(model: nn.Module, run: RunOn) -> Iterator[NetworkCut]:
    """The places where a network can be cut, the deepest first; ``run`` runs it on 2 and on 3 samples.

    Raises:
        UncutError: There is none.
    """
    owners = tuned_modules(model)
    if not owners:
        raise UncutError("nothing is trained")
    (path, total, counted), (other, _, _) = (_watched(model, owners, run, n) for n in (2, 3))
    before, after = ([call.name for outer in one for call in (outer, *outer.inside)] for one in (path, other))
    if before != after:
        raise UncutError("the order of the modules depends on the batch")
    reason = f"nothing comes before {path[-1].name or 'the network itself'}, which is tuned"
    for depth in range(len(path) - 1, 0, -1):
        calls, again = ([call for outer in one[:depth] for call in outer.inside] for one in (path, other))
        if not calls:
            break
        if depth < len(path) - 1 and not path[depth].inside:
            continue  # the same calls as one step deeper
        try:
            sites = [_site(call, twin) for call, twin in zip(calls, again, strict=True)]
        except UncutError as error:
            reason = str(error)
            continue
        share = sum(call.work for call in calls) / max(total, 1)
        yield NetworkCut(sites, path[depth].module, path[depth].name, share, counted)
        reason = ""
    if reason:
        raise UncutError(reason)


def tuned_modules(model: nn.Module) -> set[nn.Module]:
    """The modules that use a tensor that is trained, or statistics that move in training."""
    found = set()
    for path, module in model.named_modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            parts = path.split(".")
            own = ".".join(parts[: parts.index(HOLDER)]) if HOLDER in parts else path
            found.add(model.get_submodule(own))
    for path, layer in surgical_layers(model):
        owner = model.get_submodule(path)
        if owner in found or layer.statistics_move():
            found.add(owner)
            adapters: Any = layer.active_adapters
            for adapter in adapters:  # tensors that are tied are used by other modules, too
                found |= {module for key in layer.keys_of(adapter) for module, _ in layer.sites(key)}
    return found


class _Work(TorchDispatchMode):
    """Counts floating-point operations of matrix products and convolutions."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def _watched(
    model: nn.Module, owners: set[nn.Module], run: RunOn, n: int
) -> tuple[list[_Call], int, dict[str, Tensor]]:
    """The calls that are open when a tuned tensor is used first, the work of the pass, and what is used before."""
    above = {module for module in model.modules() if any(child in owners for child in module.modules())}
    names = {module: name.removeprefix("base_model.model").lstrip(".") for name, module in model.named_modules()}
    open_calls: list[_Call] = []
    found: list[_Call] = []
    called: dict[nn.Module, bool] = {}  # whether before a tuned tensor was used
    work = _Work()

    def enter(module: nn.Module, args: Any) -> None:
        call = _Call(module, names[module], work.total)
        open_calls.append(call)
        if not found and module in owners:
            found.extend(open_calls)
        called.setdefault(module, not found)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        call = open_calls.pop()
        if found:
            return
        call.work, call.output = work.total - call.work, output
        if module in above:  # a tuned tensor in it was used without a call of its owner
            found.extend([*open_calls, call])
        elif open_calls:
            open_calls[-1].inside.append(call)

    # The first hook to enter and the last to leave.
    hooks = [module.register_forward_pre_hook(enter, prepend=True) for module in names if _is_called(module)]
    hooks += [module.register_forward_hook(leave) for module in names if _is_called(module)]
    try:
        with torch.no_grad(), work:
            run(n)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise UncutError("a forward pass uses nothing that is trained")
    return found, work.total, _tensors(model, called, True)


def _tensors(module: nn.Module, called: dict[nn.Module, bool], used: bool, prefix: str = "") -> dict[str, Tensor]:
    """The tensors that may be used before the cut; a module that is not called may be read by the one that holds it."""
    used = called.get(module, used)
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)) if used else ()
    found = {prefix + name: tensor for name, tensor in own}
    for name, child in module.named_children():
        found |= _tensors(child, called, used, f"{prefix}{name}.")
    return found


def _is_called(module: nn.Module) -> bool:
    return not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict))


def _site(call: _Call, twin: _Call) -> PrefixCall:
    """From what a call returned for 2 and for 3 samples."""
    (leaves, spec), (others, again) = tree_flatten(call.output), tree_flatten(twin.output)
    if call.name != twin.name or spec != again:
        raise UncutError(f"what {call.name} returns depends on the batch")
    return PrefixCall(
        call.module, call.name, spec, [_leaf(call.name, *pair) for pair in zip(leaves, others, strict=True)]
    )


def _leaf(name: str, leaf: Any, other: Any) -> Any:
    if not isinstance(leaf, Tensor):
        if isinstance(leaf, (bool, int, float, str, type(None))) and leaf == other:
            return leaf
        raise UncutError(f"{name} returns a {type(leaf).__name__}, or another value from one batch to the next")
    shape = []
    for a, b in zip(leaf.shape, other.shape, strict=True):
        if a != b and a * 3 != b * 2:
            raise UncutError(f"the shape of what {name} returns does not follow the batch")
        shape.append((a, False) if a == b else (a // 2, True))
    return Blank(tuple(shape), leaf.dtype)
