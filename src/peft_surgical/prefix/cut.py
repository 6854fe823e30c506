"""Cutting a network in two where its first tuned tensor is used, by watching one forward pass.

The *prefix* is every module call that has ended when the first module that owns a tuned tensor is called, and that is
not part of another such call. Of these calls some are *kept*: those whose outputs are used behind the cut, which a
backward pass tells. To replay, the kept calls return what was recorded for the samples of the batch, the others return
zeros of the right shape that cost nothing, and all that lies between and behind runs as it is::

    conv1  bn1  layer1  layer2 | layer3  fc          tuned: layer3
    zeros  zeros zeros  kept   | run     run

A skip connection over the cut is one more kept call. Nothing is known of any architecture. What cannot be cut in this
way (a network that reads its images again, or hands over something that is not a tensor of the batch) raises
`UncutError`, which says why; whether a cut replays the network to the last bit is for `CachedPrefix` to prove.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


class UncutError(Exception):
    """The network cannot be cut; the message says why, in one line."""


class _ReachedCutError(BaseException):
    # No Exception: a forward that catches exceptions is not to catch this one.
    pass


@dataclass(eq=False)
class PrefixCall:
    """A call of the prefix: how its output is made when it is not computed.

    Attributes:
        name: The module's.
        spec: The output's structure.
        leaves: Parts of the output: for a tensor a function from the batch size to its shape, and its dtype; anything
            else as it is.
        kept: Numbers of the leaves that are recorded.
    """

    module: nn.Module
    name: str
    spec: TreeSpec
    leaves: list[Any]
    kept: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Blank:
    """A tensor whose values nobody needs: per dimension a number, and whether it is multiplied by the batch size."""

    shape: tuple[tuple[int, bool], ...]
    dtype: torch.dtype

    def make(self, n: int, device: torch.device) -> Tensor:
        """Zeros for ``n`` samples, which take no memory."""
        return torch.zeros((), dtype=self.dtype, device=device).expand([k * n if per else k for k, per in self.shape])


class NetworkCut:
    """A network that was cut; a context in which it can be recorded and replayed.

    Args:
        sites: The calls of the prefix, in their order.
        first: The module before whose call the prefix ends.
        name: Its name.
        share: Work of the prefix as a share of that of a forward pass.
        tensors: Those that the prefix may use, by name.
    """

    def __init__(
        self, sites: Sequence[PrefixCall], first: nn.Module, name: str, share: float, tensors: dict[str, Tensor]
    ) -> None:
        self.sites, self.first, self.name, self.share, self.tensors = sites, first, name, share, tensors
        self.of_module: dict[nn.Module, list[PrefixCall]] = defaultdict(list)
        for site in sites:
            self.of_module[site.module].append(site)
        self._mode: str | None = None
        self._given: list[Tensor] = []
        self._found: list[Tensor] = []
        self._done: Counter[nn.Module] = Counter()
        self._inside = False
        self._size = 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Put this between the modules and their callers; afterwards they are as they were."""
        before: list[tuple[nn.Module, Any]] = []
        try:
            for module in self.of_module:
                before.append((module, module.__dict__.get("forward")))
                module.forward = self._forward(module, module.forward)
            yield
        finally:
            for module, own in before:
                if own is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.forward = own

    def _forward(self, module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._mode is None or self._inside:
                return original(*args, **kwargs)
            own, done = self.of_module[module], self._done[module]
            if done == len(own):  # behind the cut
                return original(*args, **kwargs)
            self._done[module] += 1
            if self._mode == "replay":
                return self._replayed(own[done])
            self._inside = True
            try:
                output = original(*args, **kwargs)
            finally:
                self._inside = False
            return self._looked_at(own[done], output)

        return forward

    @contextmanager
    def _as(self, mode: str) -> Iterator[None]:
        before = self._mode
        self._mode, self._inside = mode, False
        self._done.clear()
        try:
            yield
        finally:
            self._mode = before

    # --- recording ---

    def record(self, run: Callable[[], Any]) -> list[Tensor]:
        """What the kept calls return in a forward pass, which ends at the cut."""
        self._found = []
        hook = self.first.register_forward_pre_hook(self._stop, prepend=True)
        try:
            with self._as("record"):
                run()
        except _ReachedCutError:
            found, self._found = self._found, []
            return found
        finally:
            hook.remove()
        raise UncutError(f"a forward pass has not come to {self.name}")

    def _stop(self, module: nn.Module, args: Any) -> None:
        if not self._inside and self._done[module] == len(self.of_module.get(module, ())):
            raise _ReachedCutError

    def _looked_at(self, site: PrefixCall, output: Any) -> Any:
        leaves, spec = tree_flatten(output)
        if spec != site.spec:
            raise UncutError(f"{site.name} returns another structure from one batch to the next")
        if self._mode == "tag":
            return tree_unflatten([self._tagged(site, number, leaf) for number, leaf in enumerate(leaves)], spec)
        # A copy: what follows may write into it.
        self._found += [leaves[number].detach().clone() for number in site.kept]
        return output

    # --- which outputs are used behind the cut ---

    def find_kept(self, run: Callable[[], Tensor], n: int) -> None:
        """Mark the outputs that a scalar behind the cut depends on; ``run`` computes it from ``n`` samples.

        Raises:
            UncutError: An output that is used is no tensor of the batch, or none is used.
        """
        self._tags: list[tuple[PrefixCall, int, Tensor]] = []
        with self._as("tag"), torch.enable_grad():
            scalar = run()
        tags, self._tags = self._tags, []
        leaves = [leaf for _, _, leaf in tags]
        grads = torch.autograd.grad(scalar, leaves, allow_unused=True) if scalar.requires_grad and leaves else []
        for (site, number, leaf), grad in zip(tags, grads, strict=bool(grads)):
            if grad is not None:
                if not leaf.dim() or len(leaf) != n:
                    raise UncutError(f"{site.name} returns {tuple(leaf.shape)} for {n} images, not one part for each")
                site.kept.append(number)
        if not any(site.kept for site in self.sites):
            raise UncutError("the network reads its images again behind the cut, or nothing of what comes before")

    def _tagged(self, site: PrefixCall, number: int, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        tag = leaf.detach().requires_grad_()
        self._tags.append((site, number, tag))
        return tag.clone()  # what follows may write into it

    # --- replaying ---

    def begin(self, features: Sequence[Tensor], n: int) -> None:
        """Replay the next forward pass, of ``n`` samples, until `end`."""
        self._mode, self._given, self._size = "replay", list(features), n
        self._done.clear()

    def end(self) -> None:
        """Run forward passes as they are."""
        self._mode, self._given = None, []

    def _replayed(self, site: PrefixCall) -> Any:
        device = self._given[0].device
        made: list[Any] = [leaf.make(self._size, device) if isinstance(leaf, Blank) else leaf for leaf in site.leaves]
        before = sum(len(other.kept) for other in self.sites[: self.sites.index(site)])
        for place, number in enumerate(site.kept):
            made[number] = self._given[before + place]
        return tree_unflatten(made, site.spec)
