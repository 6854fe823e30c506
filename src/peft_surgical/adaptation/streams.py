"""What every test-time adaptation needs around its loss: the tensors that move, their start, and a watch over them.

`Moving` moves exactly the active adapter's deltas and can put them back bit for bit; `CollapseWatch` notices when all
predictions become one class; `Stream` is both with a place in the stream of images.
"""

from __future__ import annotations

import copy
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError, ConfigError, DataError
from ..keys import join
from ..tuner.attach import surgical_layers

STREAM_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
"""Without momentum for SGD, as in MEMO's code: one image's gradient says little about the next one's."""


class CollapseWarning(UserWarning):
    """All predictions of a window are one class: entropy can be as low as it gets when every image is called the same.

    Also raised by a stream that is sorted by class.
    """


@dataclass(frozen=True)
class Record:
    """What has happened in a stream so far.

    Attributes:
        images: Images that were predicted.
        steps: Optimizer steps that were taken.
        skipped: Steps that were not taken because loss, gradient or result held NaN or Inf.
        collapses: Number of the image, from 0, after which the predictions of a whole window were one class.
    """

    images: int = 0
    steps: int = 0
    skipped: int = 0
    collapses: tuple[int, ...] = ()


def moving_deltas(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name of each tuned tensor, with its adapter -> the trainable delta of an active adapter.

    Raises:
        AdapterError: If there is none, or it is merged or disabled, so that moving it would change nothing.
    """
    found: dict[str, nn.Parameter] = {}
    layers = list(surgical_layers(model))
    for path, layer in layers:
        if layer.merged_adapters or layer.disable_adapters:
            state = "merged" if layer.merged_adapters else "disabled"
            raise AdapterError(f"the model's adapter is {state}: undo that before adapting it")
        for adapter in layer._active_adapter:
            if adapter in layer.surgical_delta:
                for key, delta in layer.surgical_delta[adapter].named_parameters():
                    if delta.requires_grad:
                        found[f"{join(path, key)} ({adapter})"] = delta
    if not found:
        what = "its adapters are frozen" if layers else "it has no adapter"
        raise AdapterError(
            f"nothing of this model can be adapted: {what}. Make one with get_peft_model(network, "
            'SurgicalConfig(target="stem")), or load one with PeftModel.from_pretrained(..., is_trainable=True)'
        )
    return found


def moving_buffers(model: nn.Module) -> list[Tensor]:
    """The running statistics that active adapters own and may move (``norm_stats="target"`` or ``"all"``)."""
    return [
        value
        for _, layer in surgical_layers(model)
        if layer.statistics_move()
        for adapter in layer._active_adapter
        if adapter in layer.surgical_stats
        for value in layer.surgical_stats[adapter].buffers()
    ]


class Moving:
    """The active adapter's deltas, their values at the start, and the optimizer that moves them.

    Nothing else of the model is moved: not the base, not other adapters, not ``modules_to_save``.

    Args:
        model: A model with a trainable surgical adapter.
        optimizer: One of `STREAM_OPTIMIZERS`.
        lr: Learning rate, absolute.
        weight_decay: Pulls the deltas to zero, that is, towards the pretrained weights.

    Raises:
        ConfigError: For an unknown optimizer or a rate that is not positive.
        AdapterError: As `moving_deltas`.
    """

    def __init__(self, model: nn.Module, optimizer: str, lr: float, weight_decay: float = 0.0) -> None:
        if optimizer not in STREAM_OPTIMIZERS:
            raise ConfigError(f"optimizer={optimizer!r}: choose one of {', '.join(STREAM_OPTIMIZERS)}")
        if not 0 < lr < float("inf") or not 0 <= weight_decay < float("inf"):
            raise ConfigError(f"lr={lr}, weight_decay={weight_decay}: the rate must be positive, the decay 0 or more")
        self.parameters = moving_deltas(model)
        self.optimizer = STREAM_OPTIMIZERS[optimizer](self.parameters.values(), lr=lr, weight_decay=weight_decay)
        self._moving = [*self.parameters.values(), *moving_buffers(model)]
        self._start = [tensor.detach().clone() for tensor in self._moving]

    @property
    def device(self) -> torch.device:
        """Where the first delta lies."""
        return next(iter(self.parameters.values())).device

    def step(self, loss: Tensor) -> bool:
        """One optimizer step down the gradient of ``loss``, unless NaN or Inf would get into the deltas.

        Returns:
            Whether the step was taken. If not, every delta is as it was.

        Raises:
            AdapterError: If the loss does not depend on the deltas, as under ``torch.no_grad()``.
        """
        if not loss.requires_grad:
            raise AdapterError(
                "the loss has no gradient: adapt outside of torch.inference_mode(), with the adapter active and enabled"
            )
        parameters = list(self.parameters.values())
        if not bool(torch.isfinite(loss)):
            return False
        # Asked for by name, so that nothing else that requires a gradient (modules_to_save) accumulates one.
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
        if not bool(torch.isfinite(norm)):
            return False
        before = [parameter.detach().clone() for parameter in parameters]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        finite = bool(torch.isfinite(torch.nn.utils.get_total_norm([p.detach() for p in parameters])))
        if not finite:  # a finite gradient times a rate that is far too large
            _copy(before, parameters)
        return finite

    def restore(self) -> None:
        """Put deltas, the statistics that move with them, and the optimizer back to the start, bit for bit."""
        _copy(self._start, self._moving)
        self.optimizer.state.clear()

    def state_dict(self) -> dict[str, Any]:
        """Deltas, statistics and the optimizer's state: copies."""
        return {
            "tensors": [tensor.detach().clone() for tensor in self._moving],
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; the start stays what it was.

        Raises:
            DataError: If it is of other tensors.
        """
        shapes = [tuple(tensor.shape) for tensor in self._moving]
        if [tuple(tensor.shape) for tensor in state["tensors"]] != shapes:
            raise DataError("this state is of an adapter with other tensors: use the one that it was taken from")
        _copy(state["tensors"], self._moving)
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))


@torch.no_grad()
def _copy(values: list[Tensor], tensors: list[Any]) -> None:
    torch._foreach_copy_(tensors, values)  # one call for hundreds of small tensors, as torch's optimizers do


class CollapseWatch:
    """Notices the collapse to one class.

    Args:
        window: Number of predictions that must be one class; 0 for no watch.

    Raises:
        ConfigError: For a window of 1 or less than 0.
    """

    def __init__(self, window: int) -> None:
        if window < 0 or window == 1:
            raise ConfigError(f"collapse_window={window}: give 2 predictions or more, or 0 not to look")
        self.recent: deque[int] = deque(maxlen=window)

    def collapsed(self, logits: Tensor) -> bool:
        """Take note of predictions (n, classes); whether a window has just become one class with one of them.

        Rows with NaN are no predictions. What has collapsed counts once, until there is another class again.
        """
        if not self.recent.maxlen or logits.shape[-1] < 2:
            return False
        found = False
        for prediction in logits[torch.isfinite(logits).all(1)].argmax(1).tolist():
            was = self._is_one_class()
            self.recent.append(prediction)
            found |= self._is_one_class() and not was
        return found

    def _is_one_class(self) -> bool:
        return len(self.recent) == self.recent.maxlen and len(set(self.recent)) == 1


class Stream:
    """A place in a stream of images, with the deltas that move along it and the watch over them.

    Args:
        deltas: What moves.
        watch: What looks for a collapse.
        reset_on_collapse: Whether a collapse puts the deltas back to the start.
    """

    def __init__(self, deltas: Moving, watch: CollapseWatch, reset_on_collapse: bool) -> None:
        self.deltas = deltas
        self.watch = watch
        self.reset_on_collapse = reset_on_collapse
        self.position = 0
        self.record = Record()

    def step(self, loss: Tensor) -> None:
        """As `Moving.step`, on the record."""
        taken = self.deltas.step(loss)
        counts = {"steps": self.record.steps + taken, "skipped": self.record.skipped + (not taken)}
        self.record = Record(**{**vars(self.record), **counts})

    def predicted(self, logits: Tensor) -> None:
        """Go on by the n images of these logits (n, classes).

        Warns:
            CollapseWarning: If all predictions of a window have become one class.
        """
        self.position += len(logits)
        collapses = self.record.collapses
        if self.watch.collapsed(logits):
            collapses += (self.position - 1,)
            then = "back to the start" if self.reset_on_collapse else "lower the rate, or pass reset_on_collapse=True"
            warnings.warn(
                f"the last {self.watch.recent.maxlen} predictions up to image {self.position - 1} are all class "
                f"{self.watch.recent[-1]}: {then}",
                CollapseWarning,
                stacklevel=4,
            )
            if self.reset_on_collapse:
                self.deltas.restore()
                self.watch.recent.clear()
        images = self.record.images + len(logits)
        self.record = Record(**{**vars(self.record), "images": images, "collapses": collapses})

    def reset(self) -> None:
        """Back to the beginning: deltas, statistics and optimizer bit for bit, position 0, nothing on the record."""
        self.deltas.restore()
        self.watch.recent.clear()
        self.position, self.record = 0, Record()

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on as if nothing had been interrupted."""
        return {
            "deltas": self.deltas.state_dict(),
            "position": self.position,
            "recent": list(self.watch.recent),
            "record": vars(self.record),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.deltas.load_state_dict(state["deltas"])
        self.position = state["position"]
        self.watch.recent.clear()
        self.watch.recent.extend(state["recent"])
        self.record = Record(**state["record"])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it the model is in ``eval()``; the modes are restored after, module by module."""
    # Past the property of a norm that holds its statistics, which hides the mode that was set.
    modes = {module: vars(module).get("training", module.training) for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def checked_images(images: Tensor) -> Tensor:
    """Images (n, c, h, w) as they are, if they are floats in [0, 1].

    Raises:
        DataError: They are not; NaN is let through, for the step to be skipped.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        what = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise DataError(
            f"images must be floats (n, channels, height, width) in [0, 1], got {what}: divide bytes by 255"
        )
    if images.numel() and (images.min() < 0 or images.max() > 1):
        raise DataError(
            f"images lie in [{images.min():.3g}, {images.max():.3g}], not in [0, 1]: pass them before they are "
            "normalised, and the normalisation as preprocess="
        )
    return images
