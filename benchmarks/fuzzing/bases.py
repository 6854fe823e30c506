"""What is mutated: whole adapters of several kinds on a small base."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_surgical import SurgicalConfig

from .files import CONFIG, WEIGHTS, Files


class Network(nn.Module):
    """A base of a few tensors of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 3))
        self.conv1 = nn.Conv2d(3, 3, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(3)
        self.layer1 = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 2) of images (n, 3, h, w)."""
        return self.fc(self.layer1(self.bn1(self.conv1(x))).mean((2, 3)) + self.token)


BLOCKS = {"embedding": ["token"], "block1": ["conv1", "bn1"], "block2": ["layer1"], "head": ["fc"]}
KINDS: dict[str, dict[str, Any]] = {
    "deltas": {"target": "block1 + token"},
    "statistics": {"target": "block1", "norm_stats": "all", "scale": 0.5},
    "half": {"target": "all", "delta_dtype": "bfloat16"},
    "whole": {"target": "block2", "modules_to_save": ["fc"]},
}


def make_base() -> nn.Module:
    torch.manual_seed(0)
    network = Network().eval()
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))
    return network


def make_sources(base: nn.Module) -> dict[str, Files]:
    """A whole adapter of each kind."""
    found = {}
    for number, (kind, settings) in enumerate(KINDS.items()):
        model = get_peft_model(copy.deepcopy(base), SurgicalConfig(blocks=BLOCKS, **settings))
        generator = torch.Generator().manual_seed(number)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            own = any(mark in name for mark in ("surgical_delta", "surgical_stats", "modules_to_save"))
            if own and tensor.is_floating_point():
                tensor.data += torch.rand(tensor.shape, generator=generator)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            found[kind] = Files(Path(folder, WEIGHTS).read_bytes(), Path(folder, CONFIG).read_bytes())
    return found
