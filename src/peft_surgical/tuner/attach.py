"""Put adapters on a network and take them off: holders, links and special classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

from torch import nn

from ..keys import HOLDER
from ..specialise import Special, restore, specialise
from .layer import SurgicalLayer
from .reading import ReadsDeltas, ReadsRecurrentDeltas


def attach(
    owner: nn.Module,
    adapter: str,
    parameters: Mapping[str, Sequence[tuple[nn.Module, str]]],
    statistics: Sequence[str],
    scale: float,
) -> SurgicalLayer:
    """Give ``owner`` an adapter.

    Args:
        owner: The module that stores the tensors.
        adapter: The adapter's name.
        parameters: Name of each tuned parameter of ``owner`` -> every (module, name) that stores it, the owner's own
            first; more than one for a tied parameter.
        statistics: Names of the owner's buffers that the adapter owns.
        scale: The factor of its deltas.
    """
    layer = owner._modules.get(HOLDER)
    if not isinstance(layer, SurgicalLayer):
        layer = SurgicalLayer(owner)
        owner._modules[HOLDER] = layer
    for key in statistics:
        _link(layer, key, owner, key)
    for key, sites in parameters.items():
        for module, name in sites:
            _link(layer, key, module, name)
    layer.update_layer(adapter, parameters, statistics, scale)
    return layer


def _link(layer: SurgicalLayer, key: str, module: nn.Module, name: str) -> None:
    if "surgery_links" not in module.__dict__:
        module.__dict__["surgery_links"] = {}
    own = module._modules.get(HOLDER) is layer
    module.__dict__["surgery_links"][name] = (None if own else layer, key)
    layer.add_site(key, module, name)
    module.__dict__.pop("_flat_weights", None)
    specialise(module, ReadsRecurrentDeltas if isinstance(module, nn.RNNBase) else ReadsDeltas, (name,))


def detach(model: nn.Module) -> None:
    """Remove every trace: holders, links, special classes. Base tensors stay as they are (merge first to keep)."""
    for module in list(model.modules()):
        if isinstance(module._modules.get(HOLDER), SurgicalLayer):
            del module._modules[HOLDER]
        links = module.__dict__.pop("surgery_links", None)
        restore(module)
        if links and isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]


def surgical_layers(model: nn.Module) -> Iterator[tuple[str, SurgicalLayer]]:
    """(path of the tuned module, its `SurgicalLayer`), in the model's order; the root's path is ""."""
    for path, module in model.named_modules():
        if isinstance(module, SurgicalLayer):
            yield path.removesuffix(HOLDER).removesuffix("."), module


def join(path: str, name: str) -> str:
    """The full name of a tensor: ``path.name``, or ``name`` on the root."""
    return f"{path}.{name}" if path else name


@contextmanager
def bare(model: nn.Module, is_wrapper: Callable[[nn.Module], bool]) -> Iterator[None]:
    """Show ``model`` as it was before any adapter: no holders, no special classes, no ``modules_to_save`` wrappers.

    So that blocks, paths and tensor names are those of the network before any adapter, also for a second one.
    """
    hidden = [
        (module, name, child)
        for module in model.modules()
        for name, child in module._modules.items()
        if isinstance(child, SurgicalLayer) or (child is not None and is_wrapper(child))
    ]
    special = [(module, type(module)) for module in model.modules() if isinstance(module, Special)]
    try:
        for module, name, child in hidden:
            if isinstance(child, SurgicalLayer):
                del module._modules[name]
            else:
                module._modules[name] = cast(nn.Module, child.original_module)
        for module, _ in special:
            restore(module)
        yield
    finally:
        for module, cls in special:
            module.__class__ = cls
        for module, name, child in hidden:
            module._modules[name] = child
