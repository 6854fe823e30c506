"""Tiny networks of every shape that the tuner has to serve, and the inputs to call them with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from torch.utils.data import Dataset
from transformers.integrations.peft import MIN_PEFT_VERSION

native_adapters = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"add_adapter and load_adapter of transformers {transformers.__version__} ask for peft {MIN_PEFT_VERSION}, "
    f"and peft {peft.__version__} is installed",
)
"""For tests that call transformers' own adapter methods, which refuse to run with a PEFT that they find too old."""


class Rows(Dataset):
    """Images that look a little like their class, as Trainer takes them; keeps the order in which it was asked."""

    def __init__(self, count: int = 10, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(count, 3, 8, 8, generator=generator)
        self.classes = torch.randint(5, (count,), generator=generator)
        looks = torch.randn(5, 3, 1, 1, generator=torch.Generator().manual_seed(0))
        self.images += 0.5 * looks[self.classes]
        self.drawn: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Any]:
        self.drawn.append(int(i))
        return {"pixel_values": self.images[i], "labels": int(self.classes[i])}


class ConvNet(nn.Module):
    """conv1, layer1, layer2, fc, with the norm that is asked for; the layout of torchvision's ResNets."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = norm(4)
        self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), norm(4), nn.Tanh())
        self.layer2 = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2), norm(8), nn.Tanh())
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.tanh(self.bn1(self.conv1(x)))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


def used_batchnorm(kind: Callable[[Any], ConvNet] = ConvNet) -> ConvNet:
    """A ConvNet with BatchNorm, always the same, whose statistics are not those of a new one."""
    torch.manual_seed(0)
    made = kind(nn.BatchNorm2d)
    with torch.no_grad():
        for name, buffer in made.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))
    return made


class RootTokens(nn.Module):
    """A transformer that keeps its class token and positions on the root module, as timm's ViTs do."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 8) * 0.1)
        self.blocks = nn.ModuleList(Attention() for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Attention(nn.Module):
    """Attention and MLP with a raw `gamma` beside the child modules; nn.MultiheadAttention reads its own raw weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.gamma = nn.Parameter(torch.rand(8))
        self.mlp = nn.Linear(8, 8)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.gamma * self.attn(y, y, y, need_weights=False)[0]
        return x + torch.tanh(self.mlp(x))


class Tied(nn.Module):
    """An embedding whose weight is also the head's; targets its own tensors by path."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mid = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.mid(self.embed(x))))


def clip() -> nn.Module:
    """transformers' CLIP image classifier: raw `class_embedding` beside the patch and position embeddings."""
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**tower, "vocab_size": 16}, vision_config={**tower, "image_size": 8, "patch_size": 4}, num_labels=5
    )
    return transformers.CLIPForImageClassification(config)


def vit(**kwargs: Any) -> nn.Module:
    """transformers' ViT image classifier without dropout."""
    config = transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_labels=5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **kwargs,
    )
    return transformers.ViTForImageClassification(config)


def llama(tie: bool = True) -> nn.Module:
    """transformers' Llama with tied embeddings."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=20,
            tie_word_embeddings=tie,
        )
    )


def images(n: int = 6) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Case:
    """A network, how to call it, and targets that together reach all kinds of its tensors."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    targets: tuple[Any, ...]
    moves: bool = False  # has statistics that a norm policy can move
    blocks: dict[str, Any] | None = None

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        network = self.make()
        with torch.no_grad():
            for name, buffer in network.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    buffer.add_(torch.rand_like(buffer))
        return network.eval()


CASES = {
    "conv+BN": Case(
        lambda: ConvNet(nn.BatchNorm2d), images, ("block1", "block2", "head", "all", "stem", "layer1.1"), moves=True
    ),
    "conv+GN": Case(lambda: ConvNet(lambda c: nn.GroupNorm(2, c)), images, ("block1", "head", "all")),
    "root tokens": Case(
        RootTokens,
        images,
        ("embedding", "block1", "cls_token", "all", "*.gamma", "re:.*in_proj.*"),
        blocks={
            "embedding": ["patch_embed", "cls_token", "pos_embed"],
            "block1": "blocks.0",
            "block2": ["blocks.1", "norm"],
            "head": "head",
        },
    ),
    "CLIP": Case(clip, lambda: {"pixel_values": images()}, ("embedding", "block1", "head", "all - head")),
    "tied": Case(
        Tied, lambda: torch.arange(6).view(2, 3), ("embed", "head", "mid"), blocks={"block1": ["embed"], "head": "mid"}
    ),
}


def outputs(model: nn.Module, inputs: Any) -> torch.Tensor:
    """The logits, without gradients."""
    with torch.no_grad():
        found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return found if isinstance(found, torch.Tensor) else found.logits


def train(model: nn.Module, inputs: Any, steps: int = 2, lr: float = 0.05) -> None:
    """A few steps of Adam with weight decay on everything that can be trained, in train mode, called twice."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.01)
    for _ in range(steps):
        model.train()
        model.train()
        found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        logits = found if isinstance(found, torch.Tensor) else found.logits
        optimizer.zero_grad()
        logits.float().pow(2).mean().backward()
        optimizer.step()
    model.eval()


def disturb(model: nn.Module, size: float = 0.05, seed: int = 3) -> None:
    """Move all deltas away from the identity, so that nothing passes vacuously."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".surgical_delta." in f".{name}":
            parameter.data += size * torch.randn(parameter.shape, generator=generator).to(parameter)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes: 0.0 and -0.0 differ here."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are equal, key by key and bit by bit."""
    return first.keys() == second.keys() and all(torch.equal(bits(first[key]), bits(second[key])) for key in first)
