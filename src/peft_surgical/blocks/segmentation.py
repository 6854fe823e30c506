"""Blocks of segmentation networks: those of the encoder, then the decoder, then the layer that gives the classes."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel

from .inventory import Cut, Inventory
from .layouts import final_linear

_DECODERS = ("decode_head", "head", "classifier")
"""Children that end in the classes: UperNet's and SegFormer's, DPT's, torchvision's."""


def cut_segmentation(
    model: nn.Module, inventory: Inventory, find: Callable[[nn.Module, Inventory], Cut | dict[str, str]]
) -> Cut | str:
    """Cuts transformers' ``...ForSemanticSegmentation`` and torchvision's segmentation networks.

    The blocks of the encoder are those of the same network as a classifier. ``decoder`` is all that follows it, a neck
    and an auxiliary decoder with its classes too, but for ``head``, the decoder's last layer, which gives the classes.

    Args:
        model: The network.
        inventory: Its tensors.
        find: Cuts the encoder.
    """
    encoder = _encoder(model)
    after = [name for name, _ in model.named_children() if name != encoder and inventory.below(name)]
    last = next((name for name in _DECODERS if name in after), None)
    if encoder is None or last is None:
        return "no segmentation network with an encoder and a decoder beside it"
    found = find(inventory.modules[encoder], Inventory(inventory.modules[encoder]))
    if not isinstance(found, Cut):
        return "; ".join(f"encoder {encoder!r}, {source}: {reason}" for source, reason in found.items())
    if "head" in found.blocks:
        return f"encoder {encoder!r} ends in a classifier of its own, {found.blocks['head'][0]!r}"
    decoder = inventory.modules[last]
    # UperNet registers its classifier first.
    named = [f"{last}.classifier"] if isinstance(getattr(decoder, "classifier", None), nn.Module) else None
    head = inventory.below(*(named or final_linear(last, decoder)))
    blocks, parts = (
        {block: [f"{encoder}.{name}" for name in names] for block, names in those.items()}
        for those in (found.blocks, found.parts)
    )
    rest = [name for name in inventory.below(*after) if name not in set(head)]
    blocks |= {"decoder": rest} if rest else {}
    return Cut(found.source, blocks | {"head": head}, parts)


def _encoder(model: nn.Module) -> str | None:
    """The child that holds the encoder, if this is a segmentation network."""
    if isinstance(model, PreTrainedModel) and type(model).__name__.endswith("ForSemanticSegmentation"):
        names = ["backbone", model.base_model_prefix]
    elif any(base.__name__ == "_SimpleSegmentationModel" for base in type(model).__mro__):
        names = ["backbone"]
    else:
        return None
    return next((name for name in names if isinstance(getattr(model, name, None), nn.Module)), None)
