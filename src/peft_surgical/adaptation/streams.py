"""What every test-time adaptation needs around its loss: `Stream`.

It moves exactly the active adapter's deltas along a stream of images, can put them back bit for bit, counts what
happens, and notices when all predictions become one class.
"""

from __future__ import annotations

import copy
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError, ConfigError, DataError
from ..keys import join
from ..tuner.attach import surgical_layers

COLLAPSE_WINDOW = 100
STREAM_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
"""SGD has no momentum, as in MEMO's code: one image's gradient says little about the next one's."""


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


class Stream:
    """A model at a place in a stream of images: what moves along it, what has happened, and a watch for a collapse.

    Only trainable deltas of active adapters move, and the statistics that they own: not the base, not other adapters,
    not ``modules_to_save``. The arguments are described in `Memo`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        steps: int = 1,
        optimizer: str = "adam",
        weight_decay: float = 0.0,
        episodic: bool = False,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        collapse_window: int = COLLAPSE_WINDOW,
        reset_on_collapse: bool = False,
    ) -> None:
        if optimizer not in STREAM_OPTIMIZERS:
            raise ConfigError(f"optimizer={optimizer!r}: choose one of {', '.join(STREAM_OPTIMIZERS)}")
        if not 0 < lr < float("inf") or not 0 <= weight_decay < float("inf"):
            raise ConfigError(f"lr={lr}, weight_decay={weight_decay}: the rate must be positive, the decay 0 or more")
        if steps < 1:
            raise ConfigError(f"steps={steps}: give 1 or more")
        if collapse_window < 0 or collapse_window == 1:
            raise ConfigError(f"collapse_window={collapse_window}: give 2 predictions or more, or 0 not to look")
        self.model: Any = model
        self.steps, self.episodic = steps, episodic
        self.preprocess = preprocess or nn.Identity()
        self.reset_on_collapse = reset_on_collapse
        self.position = 0
        self.record = Record()
        self._recent: deque[int] = deque(maxlen=collapse_window)
        self._deltas = list(moving_deltas(model).values())
        self._optimizer = STREAM_OPTIMIZERS[optimizer](self._deltas, lr=lr, weight_decay=weight_decay)
        self._moving = [*self._deltas, *moving_buffers(model)]
        self._start = [tensor.detach().clone() for tensor in self._moving]

    def reset(self) -> None:
        """Deltas as at construction, statistics as they were, a fresh optimizer, bit for bit, and position 0."""
        self.restore()
        self._recent.clear()
        self.position, self.record = 0, Record()

    def restore(self) -> None:
        """Put deltas, statistics and optimizer back, bit for bit, and stay at this place in the stream."""
        _copy(self._start, self._moving)
        self._optimizer.state.clear()

    def received(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) on the device of the deltas.

        Raises:
            DataError: They are no floats in [0, 1]; NaN is let through, for the step to be skipped.
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
        return images.to(self._deltas[0].device)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, what moved and the optimizer's state, as tensors and plain values."""
        return {
            "tensors": [tensor.detach().clone() for tensor in self._moving],
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
            "position": self.position,
            "recent": list(self._recent),
            "record": vars(self.record),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken: the results are those of a stream that was never interrupted.

        Raises:
            DataError: If the state is of other tensors.
        """
        if [tensor.shape for tensor in state["tensors"]] != [tensor.shape for tensor in self._moving]:
            raise DataError("this state is of an adapter with other tensors: use the one that it was taken from")
        _copy(state["tensors"], self._moving)
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.position, self.record = state["position"], Record(**state["record"])
        self._recent.clear()
        self._recent.extend(state["recent"])

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
        taken = bool(torch.isfinite(loss)) and self._move(loss)
        count = "steps" if taken else "skipped"
        self.record = replace(self.record, **{count: getattr(self.record, count) + 1})
        return taken

    def _move(self, loss: Tensor) -> bool:
        # Asked for by name, so that nothing else that requires a gradient (modules_to_save) accumulates one.
        gradients = torch.autograd.grad(loss, self._deltas, allow_unused=True)
        if not _are_finite([gradient for gradient in gradients if gradient is not None]):
            return False
        before = [delta.detach().clone() for delta in self._deltas]
        for delta, gradient in zip(self._deltas, gradients, strict=True):
            delta.grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        finite = _are_finite([delta.detach() for delta in self._deltas])
        if not finite:  # a finite gradient times a rate that is far too large
            _copy(before, self._deltas)
        return finite

    def predicted(self, logits: Tensor) -> None:
        """Go on by the n images of these logits (n, classes).

        Warns:
            CollapseWarning: If all predictions of a window have become one class.
        """
        self.position += len(logits)
        self.record = replace(self.record, images=self.record.images + len(logits))
        if not self._collapsed(logits):
            return
        self.record = replace(self.record, collapses=(*self.record.collapses, self.position - 1))
        then = "back to the start" if self.reset_on_collapse else "lower the rate, or pass reset_on_collapse=True"
        warnings.warn(
            f"the last {self._recent.maxlen} predictions up to image {self.position - 1} are all class "
            f"{self._recent[-1]}: {then}",
            CollapseWarning,
            stacklevel=3,
        )
        if self.reset_on_collapse:
            self.restore()
            self._recent.clear()

    def _collapsed(self, logits: Tensor) -> bool:
        """Whether a window of predictions has become one class with one of these (n, classes).

        Rows with NaN are no predictions. What has collapsed counts once, until there is another class again.
        """
        if not self._recent.maxlen or logits.shape[-1] < 2:
            return False
        found = False
        for prediction in logits[torch.isfinite(logits).all(1)].argmax(1).tolist():
            before = self._is_one_class()
            self._recent.append(prediction)
            found |= self._is_one_class() and not before
        return found

    def _is_one_class(self) -> bool:
        return len(self._recent) == self._recent.maxlen and len(set(self._recent)) == 1


def _are_finite(tensors: list[Tensor]) -> bool:
    return bool(torch.isfinite(torch.nn.utils.get_total_norm(tensors)))


@torch.no_grad()
def _copy(values: list[Tensor], tensors: list[Any]) -> None:
    torch._foreach_copy_(tensors, values)  # one call for hundreds of small tensors, as torch's optimizers do


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
