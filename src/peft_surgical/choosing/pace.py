"""`Pace` applies a schedule and a penalty to any torch optimizer, in Trainer or in a training loop of your own."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from ..blocks import Anatomy
from ..errors import AdapterError, ConfigError
from .gradients import is_looking
from .methods import Progress, Schedule
from .models import LossFunction, TrainedTensor, anatomy_under, trained_tensors
from .penalties import Penalty, SelectiveDecay
from .resolve import score_blocks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Parameter -> the `Pace` that scales its rate. Compared by identity, since tensors compare entry by entry; the
# references are weak, since a `Pace` holds its parameters.
_RUNNING: MutableMapping[nn.Parameter, weakref.ref[Pace]] = WeakIdKeyDictionary()


class Pace:
    """Gives each trained tensor its own factor of the learning rate, step by step.

    The optimizer's parameter groups, and whatever a learning-rate scheduler does to them, stay as they are: only while
    ``optimizer.step()`` runs does the optimizer see groups with the scaled rates, without the tensors whose factor is
    0. Those tensors get no update, no weight decay and no change of moments, and their gradient is zero before it
    reaches gradient clipping or other processes (``requires_grad`` stays as it is, as DDP demands).

    With Accelerate::

        pace = Pace(model, optimizer, AutoRGN(), total_steps=epochs * len(loader))
        accelerator.register_for_checkpointing(pace)
        for epoch in range(epochs):
            pace.start_epoch(epoch, scoring_loader)
            for batch in loader: ...  # as usual: backward, optimizer.step()

    Args:
        model: The model, prepared or not.
        optimizer: A torch optimizer, or Accelerate's wrapper of one.
        schedule: See `methods`.
        penalty: A `Penalty` is added to the gradients right before each step, after unscaling and clipping; a
            `SelectiveDecay` acts right after it.
        total_steps: Optimizer steps of the whole run.
        reset_moments: Forget the optimizer's state at the start of every epoch, as the paper's reference code does.
        num_batches: Batches to score on, at the start of each epoch.
        blocks: A block specification, as for `anatomy_of`.
        loss_fn: As for `score_blocks`.
        autocast: As for `score_blocks`.

    Raises:
        ConfigError: ``total_steps`` is below 1.
        AdapterError: The optimizer is not torch's (DeepSpeed's own), or does not hold the trained parameters.

    Attributes:
        step: Optimizer steps done; counted here, and may be set.
        record: Epoch -> tensor -> factor, for schedules that need scores.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        schedule: Schedule | None = None,
        penalty: Penalty | SelectiveDecay | None = None,
        *,
        total_steps: int,
        reset_moments: bool = False,
        num_batches: int = 5,
        blocks: Mapping[str, Any] | Anatomy | None = None,
        loss_fn: LossFunction | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        if total_steps < 1:
            raise ConfigError(f"total_steps={total_steps}: give the number of optimizer steps of the whole run, from 1")
        self.model, self.schedule, self.penalty = model, schedule, penalty
        self.total_steps, self.reset_moments, self.num_batches = total_steps, reset_moments, num_batches
        self.anatomy = anatomy_under(model, blocks)
        self.loss_fn, self.autocast = loss_fn, autocast
        self.optimizer = _torch_optimizer(optimizer)
        self.tensors = trained_tensors(model)
        self._name_of = {tensor.parameter: name for name, tensor in self.tensors.items()}
        held = {parameter for group in self.optimizer.param_groups for parameter in group["params"]}
        if not held & set(self._name_of):
            raise AdapterError(
                "the optimizer holds none of the model's trained parameters: make it from the parameters with "
                "requires_grad, after get_peft_model"
            )
        self._penalised = [] if penalty is None else penalty.applies_to(self.tensors.values())
        self.step, self.epoch = 0, 0
        self._known: tuple[int, int, dict[str, float]] | None = None  # step, epoch, factors
        self._begun: int | None = None  # the epoch that has begun, with its moments reset
        self.record: dict[int, dict[str, float]] = {}
        self._groups: list[dict[str, Any]] | None = None
        self._with_penalty: dict[nn.Parameter, tuple[int, int]] = {}  # gradients that hold the penalty: id, version
        self._limits: list[tuple[TrainedTensor, torch.Tensor]] = []  # of a `SelectiveDecay`, during a step
        self._parts: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for parameter in self._name_of:
            other = _RUNNING.get(parameter)
            if other is not None and (left := other()) is not None:
                left.close()  # left by an interrupted run: its factors would be applied as well
            _RUNNING[parameter] = weakref.ref(self)
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before),
            self.optimizer.register_step_post_hook(self._after),
        ]
        for name, tensor in self.tensors.items():
            if tensor.parameter.requires_grad:
                self._handles.append(tensor.parameter.register_hook(functools.partial(self._gate, name)))

    @property
    def factors(self) -> dict[str, float]:
        """Tensor -> its factor in the next step, for all trained tensors.

        Raises:
            ConfigError: The schedule needs scores and `start_epoch` was not called.
        """
        found: Mapping[str, float] = {}
        if self.schedule is not None and self.schedule.criterion is not None:
            if self.epoch not in self.record:
                raise ConfigError(f"{self.schedule} needs data: call pace.start_epoch(epoch, dataloader) first")
            found = self.record[self.epoch]
        elif self.schedule is not None:
            found = self.schedule.factors(Progress(self.step, self.total_steps, self.epoch), None)
        return {name: found.get(name, 1.0) for name in self.tensors}

    def _current(self) -> dict[str, float]:
        """`factors`, computed once per step."""
        if self._known is None or self._known[:2] != (self.step, self.epoch):
            self._known = self.step, self.epoch, self.factors
        return self._known[2]

    def start_epoch(self, epoch: int, dataloader: Iterable[Any] | None = None) -> None:
        """Begin an epoch: take new scores, unless a resumed run has begun this epoch before.

        Args:
            epoch: From 0.
            dataloader: Tuning data, as for `score_blocks`; its random generators are left as they were.

        Raises:
            ConfigError: The schedule needs data and none is given.
        """
        self.epoch, self._known = epoch, None
        if epoch in self.record:
            return
        if self.reset_moments and epoch != self._begun:
            for tensor in self.tensors.values():
                self.optimizer.state.pop(tensor.parameter, None)
        self._begun = epoch
        if self.schedule is None or self.schedule.criterion is None:
            return
        if dataloader is None:
            raise ConfigError(f"{self.schedule} needs data at the start of an epoch: start_epoch(epoch, dataloader)")
        criterion, batches = self.schedule.criterion, self.num_batches
        scores = score_blocks(
            self.model, dataloader, criterion, batches, self.loss_fn, blocks=self.anatomy, autocast=self.autocast
        )
        self.record[epoch] = dict(self.schedule.factors(Progress(self.step, self.total_steps, epoch), scores))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain numbers; for ``accelerator.register_for_checkpointing``."""
        record = {str(epoch): factors for epoch, factors in self.record.items()}
        return {"step": self.step, "epoch": self.epoch, "begun": self._begun, "record": record}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.step, self.epoch, self._known = int(state["step"]), int(state["epoch"]), None
        self._begun = state.get("begun")
        self.record = {int(epoch): dict(factors) for epoch, factors in state["record"].items()}

    def close(self) -> None:
        """Remove all hooks from the optimizer and the parameters."""
        self._restore()  # in case a step raised
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for parameter in self._name_of:
            if (running := _RUNNING.get(parameter)) is not None and running() is self:
                del _RUNNING[parameter]

    def _gate(self, name: str, gradient: torch.Tensor) -> torch.Tensor | None:
        return torch.zeros_like(gradient) if not is_looking() and self._current()[name] == 0.0 else None

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._restore()  # in case a step raised
        factors = self._current()
        penalty = self.penalty
        if isinstance(penalty, SelectiveDecay):
            pulled = [tensor for tensor in self._penalised if tensor.parameter.grad is not None]
            self._limits = [(tensor, penalty.before(tensor)) for tensor in pulled]
        elif penalty is not None:
            for tensor in self._penalised:
                grad = tensor.parameter.grad
                # Torch calls this twice where a subclass's step calls its parent's, and a step that raised may be
                # repeated.
                if grad is not None and self._with_penalty.get(tensor.parameter) != (id(grad), grad._version):
                    grad += penalty.gradient(tensor).to(grad)
                    self._with_penalty[tensor.parameter] = id(grad), grad._version
        self._groups = optimizer.param_groups
        self._parts = []
        for group in self._groups:
            by_factor: dict[float, list[Any]] = {}
            for parameter in group["params"]:
                name = self._name_of.get(parameter)
                by_factor.setdefault(1.0 if name is None else factors[name], []).append(parameter)
            for factor, members in by_factor.items():
                if factor > 0:
                    self._parts.append((group, {**group, "params": members, "lr": group["lr"] * factor}))
        optimizer.param_groups = [part for _, part in self._parts]

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._groups is None:
            return  # a subclass's step, after its parent's has called this
        self._restore()
        self._with_penalty.clear()
        if isinstance(self.penalty, SelectiveDecay):
            for tensor, limit in self._limits:
                self.penalty.pull(tensor, limit)
        self.step += 1
        for group in optimizer.param_groups:
            self._keep(group, [part for whole, part in self._parts if whole is group])

    def _keep(self, group: dict[str, Any], parts: Sequence[dict[str, Any]]) -> None:
        """Keep what an optimizer has written into its groups during a step, as schedule-free optimizers do."""
        for key in {key for part in parts for key in part} - {"params", "lr"}:
            values = [part.get(key) for part in parts]
            if all(value is group.get(key) for value in values):
                continue
            if any(bool(value != values[0]) for value in values):
                raise ConfigError(
                    f"{type(self.optimizer).__name__} keeps {key!r} in its parameter groups, and it comes out "
                    "differently for tensors with different rates: use an optimizer whose state is the tensors' own"
                )
            group[key] = values[0]

    def _restore(self) -> None:
        if self._groups is not None:
            self.optimizer.param_groups = self._groups
            self._groups = None

    def plot(self, axes: Axes | None = None) -> Axes:
        """Mean factor of each block over the epochs, as the paper's Figure 6; needs matplotlib."""
        if axes is None:
            from matplotlib.figure import Figure

            axes = Figure(figsize=(6, 3.5), layout="constrained").add_subplot()
        means = {epoch: block_means(factors, self.anatomy) for epoch, factors in sorted(self.record.items())}
        for block in self.anatomy.names:
            if all(block in values for values in means.values()):
                axes.plot([e + 1 for e in means], [values[block] for values in means.values()], marker=".", label=block)
        axes.set(xlabel="epoch", ylabel="factor of the learning rate", ylim=(0, None))
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return axes


def _torch_optimizer(optimizer: Any) -> Optimizer:
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, Optimizer):
        raise AdapterError(
            f"{type(optimizer).__name__} is no torch optimizer: schedules and penalties work with torch's interface "
            "(also under Accelerate, DDP and FSDP2), not with DeepSpeed's own optimizer"
        )
    if isinstance(inner, torch.optim.LBFGS):
        raise ConfigError(
            "LBFGS takes one parameter group, so tensors cannot have rates of their own: use another optimizer"
        )
    return inner


def block_means(factors: Mapping[str, float], anatomy: Anatomy) -> dict[str, float]:
    """Block -> mean factor of its tensors, as in the paper's Figure 6."""
    members: dict[str, list[float]] = {block.name: [] for block in anatomy}
    for name, factor in factors.items():
        members[anatomy.block_of(name).name].append(factor)
    return {block: sum(values) / len(values) for block, values in members.items() if values}
