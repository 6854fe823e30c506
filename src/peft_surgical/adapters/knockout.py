"""Which blocks an adapter needs: accuracy with the deltas of one block after another taken away."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..blocks import anatomy_of
from ..evaluation import Interval, paired_difference, wilson_interval
from ..tuner.attach import bare
from .adapter import Adapter


@dataclass(frozen=True)
class KnockOut:
    """Accuracy without one block's delta.

    Attributes:
        without: The block, ``""`` for the whole adapter and ``"all"`` for the base alone.
        accuracy: A fraction, with Wilson's 95% interval.
        n: Number of images.
        change: Accuracy minus that of the whole adapter, on the same images, with the 95% interval for pairs.
    """

    without: str
    accuracy: Interval
    n: int
    change: Interval


def knock_out(base: nn.Module, adapter: Adapter, correct: Callable[[nn.Module], Tensor]) -> tuple[KnockOut, ...]:
    """Accuracy with all deltas of an adapter, with each block's taken away, and with none.

    A block whose removal changes nothing was not needed for what ``correct`` measures. Effects of blocks do not add up:
    one may stand in for another.

    Args:
        base: Its base, which is left as it is.
        adapter: The adapter.
        correct: Called with a network in ``eval()``; returns which images it classifies correctly, bool (n,).

    Raises:
        AnatomyError: The blocks of the base cannot be told.
    """
    with bare(base):
        network = copy.deepcopy(base).eval()
    anatomy = anatomy_of(network, adapter.config.blocks)
    values = network.state_dict()
    before = {name: values[name].clone() for name in adapter.names}

    def without(names: Iterable[str]) -> Tensor:
        gone = set(names)
        tensors = network.state_dict()  # anew: ``correct`` may have moved the network to a device
        with torch.no_grad():
            for name, value in before.items():
                tensors[name].copy_(value if name in gone else adapter.tuned(name, value))
        return correct(network)

    whole = without(())
    rows = [("", whole)]
    for block in anatomy:
        if not before.keys().isdisjoint(block.tensors):
            rows.append((block.name, without(block.tensors)))
    rows.append(("all", without(before)))
    return tuple(
        KnockOut(name, wilson_interval(int(right.sum()), len(right)), len(right), paired_difference(right, whole))
        for name, right in rows
    )
