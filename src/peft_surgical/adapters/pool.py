"""Many adapters on one base, within a budget of memory: loaded on demand, evicted when others need the room.

One network has one set of active adapters, so the threads that use it take turns (`Turns`): all who want the same
adapter at the same time, or one mixed batch. Files are fetched while others compute, and read in a turn.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..config import SurgicalConfig
from ..errors import AdapterError
from ..tuner.attach import bare, surgical_layers
from ..tuner.layer import SurgicalLayer
from ..tuner.mixed import BASE
from ..tuner.plan import make_plan
from .adapter import locate, read_config


@dataclass(frozen=True)
class PoolState:
    """What a pool holds and has done.

    Attributes:
        resident: Id -> bytes of the adapters on the model, the least recently used first.
        budget_bytes: What they may take together.
        requests: How often an adapter was asked for.
        loads: How often one was put on the model for it.
        evictions: How often one was taken off to make room.
    """

    resident: Mapping[str, int]
    budget_bytes: int
    requests: int
    loads: int
    evictions: int

    @property
    def bytes(self) -> int:
        """What the adapters take together."""
        return sum(self.resident.values())


class AdapterPool:
    """Adapters of one base on one model, by id, in a bounded memory; for inference, from any number of threads.

    ::

        pool = AdapterPool(network, budget_bytes=200_000_000)
        with pool.use("me/site-a") as model:
            logits = model(images)
        with pool.mixed(["me/site-a", "adapters/site-b", None]) as model:
            logits = model(three_images)

    Threads that use one adapter compute at the same time; others wait for their turn, in order of arrival. An id is
    resolved to a folder once: a repository of the Hub stays at the commit that was found first. A load that fails
    leaves pool and model as they were, and is tried again at the next request.

    Args:
        model: The base, or a model with adapters of its own, which stay and do not count. It belongs to the pool until
            `clear`, in ``eval()``.
        budget_bytes: What the adapters may take together, in the model's memory: deltas in at least float32,
            statistics, and modules that are saved whole. A new adapter is put on before others are taken off, so for a
            moment there is one more.
        loader: Id -> the folder in which the adapter lies, called outside of any turn and once at a time for an id. By
            default an id is a folder or a repository of the Hub.
    """

    def __init__(
        self, model: nn.Module, budget_bytes: int, loader: Callable[[str], str | os.PathLike[str]] | None = None
    ) -> None:
        if budget_bytes <= 0:
            raise AdapterError(f"budget_bytes={budget_bytes}: give the memory for adapters, in bytes, above 0.")
        self.budget_bytes = budget_bytes
        self._model = model if isinstance(model, PeftModel) else None
        self._given = model
        self._given_active = [] if self._model is None else list(self._model.active_adapters)
        self._network = model if self._model is None else self._model.get_base_model()
        self._find_layers()
        if any(layer.merged_adapters for layer in self._layers):
            raise AdapterError("An adapter is merged into this model: call model.unmerge_adapter() first.")
        self._loader = loader or (lambda source: locate(source)[0])
        self._folders: dict[str, Future[Path]] = {}
        self._lock = threading.Lock()  # of _folders
        self._turns = Turns()
        # Id -> name on the model, and bytes. Ids have dots and slashes, which PEFT's names must not have.
        self._resident: OrderedDict[str, tuple[str, int]] = OrderedDict()
        self._made = self._requests = self._loads = self._evictions = 0

    @contextmanager
    def use(self, adapter: str) -> Iterator[PeftModel]:
        """The model with the adapter of this id active, for as long as the block lasts.

        Raises:
            AdapterError: It is larger than the budget, or belongs to another base; or this thread is in a turn already.
            AdapterFileError: It cannot be read.
        """
        with self._turn(adapter, [adapter]) as model:
            yield model

    @contextmanager
    def mixed(self, adapters: Sequence[str | None]) -> Iterator[Callable[..., Any]]:
        """The model as a function of a mixed batch: for each row the id of its adapter, or None for the base.

        Raises:
            AdapterError: As `use`; or the adapters do not fit into the budget together.
            AdapterFileError: One of them cannot be read.
        """
        wanted = [adapter for adapter in dict.fromkeys(adapters) if adapter is not None]
        if not wanted:
            raise AdapterError("A mixed batch of the base alone: give one adapter or more.")
        with self._turn(object(), wanted) as model:  # an object of its own is shared with nobody
            names = [BASE if adapter is None else self._resident[adapter][0] for adapter in adapters]
            yield functools.partial(model, adapter_names=names)

    def state(self) -> PoolState:
        """What the pool holds now."""
        with self._turns.changed:
            resident = {adapter: size for adapter, (_, size) in self._resident.items()}
            return PoolState(resident, self.budget_bytes, self._requests, self._loads, self._evictions)

    def clear(self) -> nn.Module:
        """Take all adapters off, once nobody uses the model; the base as it was given."""
        with self._turns.turn(object()):
            self._take_off([name for name, _ in self._resident.values()], self._given_active)
            self._resident.clear()
        with self._lock:
            self._folders.clear()
        return self._given

    @contextmanager
    def _turn(self, shared: Hashable, adapters: Sequence[str]) -> Iterator[PeftModel]:
        for adapter in adapters:
            self._fetch(adapter)
        with self._turns.turn(shared, lambda: self._bring(adapters)):
            with self._turns.changed:
                self._requests += len(adapters)
            yield cast(PeftModel, self._model)

    def _fetch(self, adapter: str) -> None:
        """Find the folder of an adapter, outside of any turn."""
        with self._lock:
            mine = adapter not in self._folders
            future = self._folders.setdefault(adapter, Future())
        if mine:
            try:
                future.set_result(Path(self._loader(adapter)))
            except BaseException as error:
                with self._lock:
                    self._folders.pop(adapter, None)
                future.set_exception(error)
        future.result()  # whoever waited for it gets the same error

    def _bring(self, adapters: Sequence[str]) -> None:
        if missing := [adapter for adapter in adapters if adapter not in self._resident]:
            self._load(missing, adapters)
        for adapter in adapters:
            self._resident.move_to_end(adapter)
        self._activate([self._resident[adapters[0]][0]])
        while sum(size for _, size in self._resident.values()) > self.budget_bytes:
            _, (name, _) = self._resident.popitem(last=False)
            self._take_off([name])
            self._evictions += 1

    def _load(self, missing: Sequence[str], adapters: Sequence[str]) -> None:
        folders = {adapter: self._folders[adapter].result() for adapter in missing}
        sizes = {adapter: adapter_bytes(self._network, read_config(folder)) for adapter, folder in folders.items()}
        sizes |= {adapter: self._resident[adapter][1] for adapter in adapters if adapter in self._resident}
        if sum(sizes.values()) > self.budget_bytes:
            named = ", ".join(f"{adapter} ({size:,} bytes)" for adapter, size in sizes.items())
            raise AdapterError(
                f"{named} do{'es' * (len(sizes) == 1)} not fit into the pool's budget of {self.budget_bytes:,} bytes. "
                "Give the pool a larger budget_bytes, or split the batch."
            )
        self._made += len(missing)
        added = {adapter: (f"pooled{self._made - i}", sizes[adapter]) for i, adapter in enumerate(missing)}
        before = [] if self._model is None else list(self._model.active_adapters)
        try:
            for adapter, (name, _) in added.items():
                folder = folders[adapter]
                if self._model is None:
                    self._model = PeftModel.from_pretrained(self._network, folder, adapter_name=name).eval()
                else:
                    self._model.load_adapter(folder, name)
        except BaseException:
            self._take_off([name for name, _ in added.values()], before)
            raise
        self._resident.update(added)
        self._loads += len(added)
        self._find_layers()

    def _take_off(self, names: Sequence[str], active: list[str] | None = None) -> None:
        """Remove adapters, of which some may not be there, and make others active; with the last one the model."""
        if self._model is None:
            return
        names = [name for name in names if name in self._model.peft_config]
        if self._given is self._network and len(names) == len(self._model.peft_config):
            self._model.unload()
            self._model = None
            self._find_layers()
            return
        if active is not None:
            self._activate(active)  # first, as PEFT warns when an active one is deleted
        for name in names:
            self._model.delete_adapter(name)

    def _find_layers(self) -> None:
        self._layers = [layer for _, layer in surgical_layers(self._network)]
        self._caching = [layer for layer in self._layers if _has_cache(layer)]
        self._wrappers = [module for module in self._network.modules() if isinstance(module, AuxiliaryTrainingWrapper)]

    def _activate(self, names: list[str]) -> None:
        """Make adapters of the model the active ones, in microseconds: only the lists of active names change.

        PEFT's ``set_adapter`` walks all modules and sets ``requires_grad`` of all adapters' tensors.
        """
        assert self._model is not None
        for layer in self._layers:
            # Past nn.Module.__setattr__, which looks for parameters first and takes most of the time.
            layer.__dict__.update(_active_adapter=list(names), _movable=set())
        for layer in self._caching:
            layer.forget()
        for wrapper in self._wrappers:
            own = [name for name in names if name in wrapper._adapters]
            wrapper.set_adapter(own[0] if own else [], inference_mode=True)
        self._model.active_adapter = self._model.base_model.active_adapter = names[0] if len(names) == 1 else names


def _has_cache(layer: SurgicalLayer) -> bool:
    modules = (module for key in layer._sites for module, _ in layer.sites(key))
    return any(name.endswith("_cache") for module in modules for name in vars(module))


def adapter_bytes(network: nn.Module, config: SurgicalConfig) -> int:
    """The memory that a saved adapter takes on its base: deltas, statistics, and the modules that it holds whole."""
    plan = make_plan(network, config)
    live = torch.float64 if config.delta_dtype == "float64" else torch.float32
    total = sum(base.numel() * torch.promote_types(base.dtype, live).itemsize for base in plan.base().values())
    with bare(network):
        held = [getattr(entry.module, name) for entry in plan.modules for name in entry.statistics]
        saved = tuple(config.modules_to_save or ())
        for path, module in network.named_modules() if saved else ():
            if path.endswith(saved):
                held += [*module.parameters(), *module.buffers()]
        return total + sum(tensor.numel() * tensor.element_size() for tensor in held)


class Turns:
    """A queue of threads for a model that can be in one state at a time; ``changed`` is held while a turn is prepared.

    A thread that wants the state of the running turn joins it only if nobody waits, so that none waits for ever.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self._queue: deque[object] = deque()
        self._shared: Hashable = None
        self._users: set[int] = set()  # threads

    @contextmanager
    def turn(self, shared: Hashable, prepare: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Wait for a turn and take it, together with all who ask for an equal ``shared``.

        The first of them calls ``prepare``, before the turn begins. If it raises, there is no turn.
        """
        me, ticket = threading.get_ident(), object()
        with self.changed:
            if me in self._users:
                raise AdapterError("This thread uses the pool's model already: end that block before the next begins.")
            self._queue.append(ticket)
            try:
                self.changed.wait_for(lambda: self._queue[0] is ticket and (not self._users or self._shared == shared))
                if not self._users:
                    self._shared = None
                    prepare()
                    self._shared = shared
                self._users.add(me)
            finally:
                self._queue.remove(ticket)
                self.changed.notify_all()
        try:
            yield
        finally:
            with self.changed:
                self._users.discard(me)
                self.changed.notify_all()
