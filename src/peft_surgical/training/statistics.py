"""Normalisation statistics of target images, estimated once before an adapter is trained.

A network whose BatchNorms keep the source's statistics sees target images through a normalisation that was made for
others (Schneider et al. 2020, Li et al. 2017). Statistics that follow the training batches (``norm_stats="all"``) are
noisy where batches are small. Here they are taken from all tuning images in one pass and then held: no label is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.data import DataLoader, Dataset

from ..choosing.models import forward_loss
from ..errors import AdapterError, DataError
from ..tuner.attach import surgical_layers


@torch.no_grad()
def estimate_statistics(model: nn.Module, batches: Iterable[Any]) -> None:
    """Give the active adapter of ``model`` the statistics of these images, for ``norm_stats="estimated"``.

    Every norm's mean and variance become the averages, over the batches, of those of its inputs, with the norms before
    it normalising by their batch. The base keeps its own. All other modules are in ``eval()`` mode meanwhile.

    Args:
        model: A model with an adapter of this policy.
        batches: As for `forward_loss`; labels are not needed. Batches of 32 images and more give good estimates.

    Raises:
        AdapterError: The active adapter does not own statistics that are held.
        DataError: There is no batch.
    """
    holders = [layer for _, layer in surgical_layers(model) if layer.let_move(False)]
    norms: list[Any] = [layer.get_base_layer() for layer in holders]
    if not holders:
        raise AdapterError(
            "no active adapter has statistics to estimate: give SurgicalConfig norm_stats='estimated', for a network "
            "with BatchNorms"
        )
    modes = {module: vars(module)["training"] for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms if isinstance(norm, _NormBase)}
    count = 0
    try:
        model.eval()
        for layer, norm in zip(holders, norms, strict=True):
            layer.let_move(True)
            norm.training = True
            if norm in momenta:
                norm.momentum = None  # the average over all batches
                norm.reset_running_stats()
        device = next(model.parameters()).device
        for batch in batches:
            count += 1
            forward_loss(model, send_to_device(batch, device), _no_loss)
    finally:
        for layer in holders:
            layer.let_move(False)
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    if not count:
        raise DataError("no images to estimate statistics of: give at least one batch")


def mixed_batches(images: Dataset[Any], collate: Callable[[Any], Any] | None = None) -> DataLoader[Any]:
    """Batches of about equal size, at most 64, in a fixed random order: no batch is all of one class."""
    count = len(images)  # type: ignore[arg-type]
    size = math.ceil(count / max(1, math.ceil(count / 64)))
    generator = torch.Generator().manual_seed(0)
    return DataLoader(images, max(1, size), shuffle=True, generator=generator, collate_fn=collate)


def _no_loss(outputs: Any, labels: Any) -> torch.Tensor:
    return torch.zeros(())
