"""The two small CIFAR networks that recipes, benchmarks and slow tests share.

:class:`ResNet26` has GroupNorm, :class:`ResNet32` BatchNorm. Nothing is downloaded, and nothing here trains.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_surgical.bases import Base, load_base
from peft_surgical.errors import ConfigError, DataError

from .cifar import CLASSES

SHARED_VARIABLE = "PEFT_SURGICAL_SHARED"
"""Environment variable that points at the folder holding ``models/`` and ``data/``."""


class _PreActivationBlock(nn.Module):
    """norm-relu-conv-norm-relu-conv plus its input; a strided block pools its input and appends zero channels."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.bn1 = nn.GroupNorm(8, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride)
            x = F.pad(x, (0, 0, 0, 0, 0, out.shape[1] - x.shape[1]))
        return x + out


class _PostActivationBlock(nn.Module):
    """conv-norm-relu-conv-norm plus its input, relu; a strided block subsamples it, zero channels on both sides."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride > 1:
            side = (out.shape[1] - x.shape[1]) // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, side, side))
        return F.relu(x + out)


def _stage(block: type[nn.Module], depth: int, channels_in: int, channels: int, stride: int) -> nn.Sequential:
    first = block(channels_in, channels, stride)
    return nn.Sequential(first, *(block(channels, channels, 1) for _ in range(depth - 1)))


class ResNet26(nn.Module):
    """The pre-activation CIFAR ResNet-26 with GroupNorm that the surgical fine-tuning and MEMO papers adapt.

    Its state-dict keys are those of the published checkpoint, which calls its GroupNorms ``bn``. 366,938 parameters,
    no buffers. The modules stand in the order in which data flows: conv1, layer1, layer2, layer3, bn, fc.

    Args:
        num_classes: Width of the classifier ``fc``.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.layer1 = _stage(_PreActivationBlock, 4, 16, 16, 1)
        self.layer2 = _stage(_PreActivationBlock, 4, 16, 32, 2)
        self.layer3 = _stage(_PreActivationBlock, 4, 32, 64, 2)
        self.bn = nn.GroupNorm(8, 64)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised images (n, 3, 32, 32) -> logits (n, num_classes)."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(pixel_values))))
        return self.fc(F.avg_pool2d(F.relu(self.bn(x)), 8).flatten(1))


class ResNet32(nn.Module):
    """The post-activation CIFAR ResNet-32 with BatchNorm (He et al. 2016, option A). 464,154 parameters.

    Args:
        num_classes: Width of the classifier ``linear``.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(_PostActivationBlock, 5, 16, 16, 1)
        self.layer2 = _stage(_PostActivationBlock, 5, 16, 32, 2)
        self.layer3 = _stage(_PostActivationBlock, 5, 32, 64, 2)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised images (n, 3, 32, 32) -> logits (n, num_classes)."""
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


@dataclass(frozen=True)
class Network:
    """A network of the registry: how to build it, where its weights lie, what its input is normalised with.

    Attributes:
        build: The class; called without arguments.
        checkpoint: Folder of ``model.safetensors`` inside the models folder.
        mean: Per-channel mean of RGB in [0, 1].
        std: Per-channel standard deviation of RGB in [0, 1].
    """

    build: type[nn.Module]
    checkpoint: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


NETWORKS: dict[str, Network] = {
    "resnet26": Network(ResNet26, "cifar10_rn26_gn", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "resnet32": Network(ResNet32, "cifar10_resnet32_bn", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def load_network(name: str, folder: str | os.PathLike[str] | None = None) -> nn.Module:
    """Build a network of :data:`NETWORKS` with its pretrained weights, in ``eval()``.

    Args:
        name: Key of :data:`NETWORKS`.
        folder: Folder that holds ``<checkpoint>/model.safetensors``, or one whose ``models/`` does. By default the one
            that the environment variable ``PEFT_SURGICAL_SHARED`` names.

    Raises:
        DataError: If the name is unknown, or the weights are missing or not this network's.
    """
    if name not in NETWORKS:
        raise DataError(f"unknown network {name!r}: choose one of {', '.join(NETWORKS)}")
    folder = folder or os.environ.get(SHARED_VARIABLE)
    if folder is None:
        raise DataError(f"no folder with the weights of {name!r}: pass one, or set {SHARED_VARIABLE}")
    entry = NETWORKS[name]
    tried = [Path(folder) / sub / entry.checkpoint / "model.safetensors" for sub in (".", "models")]
    file = next((f for f in tried if f.is_file()), None)
    if file is None:
        raise DataError(
            f"no weights for {name!r}: put them at {tried[0]}, or pass the folder that holds {entry.checkpoint}/"
        )
    network = entry.build()
    try:
        network.load_state_dict(load_file(file))
    except RuntimeError as error:
        raise DataError(f"{file} does not hold the weights of {name!r}: {error}") from error
    return network.eval()


def normalise(pixels: Tensor, network: str) -> Tensor:
    """uint8 images (n, 3, 32, 32) -> the float32 input of a network of :data:`NETWORKS`.

    Raises:
        DataError: If the images are not uint8 or the name is unknown.
    """
    if network not in NETWORKS:
        raise DataError(f"unknown network {network!r}: choose one of {', '.join(NETWORKS)}")
    if pixels.dtype != torch.uint8:
        raise DataError(f"images must be uint8 in 0..255, got {pixels.dtype}: pass them as read_images returns them")
    mean, std = (
        torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (NETWORKS[network].mean, NETWORKS[network].std)
    )
    return (pixels.float() / 255 - mean) / std


def open_network(models: str | None, name: str, *, weights: str = "pretrained", **how: Any) -> Base:
    """A network of :data:`NETWORKS` as a base that keeps its head, or any other, which `load_base` opens.

    Args:
        models: Folder of the weights, as for `load_network`.
        name: Key of :data:`NETWORKS`, or what `load_base` opens.
        weights: As for `load_base`.
        **how: As for `load_base`; one of these networks needs none of it.

    Raises:
        ConfigError: Augmentation of 32 x 32 images is asked for.
    """
    if name not in NETWORKS:
        return load_base(name, weights=weights, **how)
    if how.get("augment", "none") != "none":
        raise ConfigError(f"--augment {how['augment']}: {name} takes its 32 x 32 images as they are, choose none")
    network = load_network(name, models) if weights == "pretrained" else NETWORKS[name].build().eval()
    transform = functools.partial(_to_input, name)
    return Base(network, name, "cifar", len(CLASSES), CLASSES, transform, transform, head_is_new=False)


def _to_input(network: str, image: Any) -> Tensor:
    return normalise(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None], network)[0]
