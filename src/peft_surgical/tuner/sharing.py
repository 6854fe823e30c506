"""What lies in front of the first tuned tensor, computed once for a batch whose rows go different ways behind it.

The network runs on the whole batch until a tuned tensor is read. The outputs of the modules that were done by then are
kept; when it runs again on the rows of one adapter, these modules answer with their rows. It is the network's own
forward that runs each time, so side inputs and skip connections are where they were. Whether kept rows are right is
tried, not assumed: a network that mixes its rows, or changes an output in place, is computed row by row.
"""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from .attach import walk
from .layer import SurgicalLayer

# Network -> for the kinds of batches that were tried, whether keeping rows gives what computing them anew does.
_TRIED: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, bool]] = weakref.WeakKeyDictionary()
_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the largest entry; other batch sizes round differently


class _TunedTensorRead(BaseException):
    """Ends the shared pass. Not an Exception, which a network might catch."""


class Prefix:
    """The outputs of the modules that a network calls before it reads a tuned tensor.

    Attributes:
        model: The network.
        rows: Size of the batch.
        calls: (module, its output for the whole batch) of the outermost calls, in their order.
        output: What the network returned, if it read no tuned tensor at all.
    """

    def __init__(self, model: nn.Module, rows: int) -> None:
        self.model = model
        self.rows = rows
        self.calls: list[tuple[nn.Module, Any]] = []
        self.output: Any = None

    def is_sound(self, index: torch.Tensor, anew: Callable[[], Any], again: Callable[[], Any]) -> bool:
        """Whether kept rows give what the network gives without; tried once for each kind of batch.

        Args:
            index: Rows of the batch.
            anew: Runs the network on these rows alone.
            again: The same while they are replayed.
        """
        tensors = [leaf for _, output in self.calls for leaf in tree_flatten(output)[0]]
        key = (len(index), *((id(module), len(tree_flatten(output)[0])) for module, output in self.calls))
        key += tuple(getattr(leaf, "shape", None) for leaf in tensors)
        known = _TRIED.setdefault(self.model, {})
        if key not in known:
            rows = all(isinstance(x, torch.Tensor) and x.shape[:1] == (self.rows,) for x in tensors)
            known[key] = rows and _close(again(), anew())
        return known[key]

    @contextmanager
    def replayed(self, index: torch.Tensor) -> Iterator[None]:
        """Within it the modules answer with the rows ``index`` of their outputs, each as often as it was called."""
        waiting: defaultdict[nn.Module, deque[Any]] = defaultdict(deque)
        for module, output in self.calls:
            waiting[module].append(output)
        whole = torch.equal(index, torch.arange(int(index[0]), int(index[0]) + len(index)))

        def rows(tensor: torch.Tensor) -> torch.Tensor:
            if whole:
                return tensor.narrow(0, int(index[0]), len(index))
            return tensor.index_select(0, index.to(tensor.device))

        def answering(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def answer(*args: Any, **kwargs: Any) -> Any:
                outputs = waiting[module]
                return tree_map(rows, outputs.popleft()) if outputs else forward(*args, **kwargs)

            return answer

        with _patched(list(waiting), answering):
            yield


def record(model: nn.Module, layers: Sequence[SurgicalLayer], rows: int, run: Callable[[], Any]) -> Prefix:
    """``run`` the network ``model`` on a batch of so many rows until one of ``layers`` is asked for a tensor."""
    prefix = Prefix(model, rows)

    def recording(module: nn.Module, inner: Callable[..., Any]) -> Callable[..., Any]:
        def keep(*args: Any, **kwargs: Any) -> Any:
            if isinstance(module, AuxiliaryTrainingWrapper):  # holds a whole module for each adapter
                raise _TunedTensorRead
            before = len(prefix.calls)
            output = inner(*args, **kwargs)
            prefix.calls[before:] = [(module, output)]  # in place of what it called itself
            return output

        return keep

    def stop(*args: Any) -> torch.Tensor:
        raise _TunedTensorRead

    modules = [
        m for _, m in walk(model) if m is not model and not isinstance(m, (SurgicalLayer, torch.jit.ScriptModule))
    ]
    try:
        for layer in layers:
            layer.__dict__["effective"] = stop
        with _patched(modules, recording):
            prefix.output = run()
    except _TunedTensorRead:
        pass
    finally:
        for layer in layers:
            layer.__dict__.pop("effective", None)
    return prefix


def may_share(model: nn.Module) -> bool:
    """Whether no batch has shown that rows of this network cannot be kept."""
    return all(_TRIED.get(model, {}).values())


def _close(one: Any, other: Any) -> bool:
    pairs = list(zip(tree_flatten(one)[0], tree_flatten(other)[0], strict=True))
    for a, b in pairs:
        if isinstance(a, torch.Tensor) and a.numel():
            if a.shape != b.shape:
                return False
            a, b, tolerance = a.double(), b.double(), _TOLERANCE.get(a.dtype, 1e-4)
            if not torch.allclose(a, b, rtol=0.0, atol=tolerance * float(b.abs().nan_to_num().max()), equal_nan=True):
                return False
    return True


@contextmanager
def _patched(
    modules: Sequence[nn.Module], wrap: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Within it the instances' ``forward`` are wrapped."""
    before = [(module, module.__dict__.get("forward")) for module in modules]
    try:
        for module in modules:
            module.__dict__["forward"] = wrap(module, module.forward)
        yield
    finally:
        for module, previous in before:
            if previous is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = previous
