"""The ordered blocks of a network (interface; filled in next)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Block:
    """One block: a named, contiguous part of a network in the order in which data flows."""

    name: str
    tensors: tuple[str, ...]
    num_parameters: int
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Anatomy:
    """The blocks of a network, total and disjoint over its parameters and persistent buffers."""

    blocks: tuple[Block, ...]
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    source: str = "spec"

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)
