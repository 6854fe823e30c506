"""From a batch, in whatever form loaders give it, to a loss: the one reading of batches and outputs in this package."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DataError
from .tensors import unwrapped

LABEL_KEYS = ("labels", "label", "targets", "target", "y")
LossFunction = Callable[[Any, Any], Tensor]
"""(what the model returned, labels or None) -> a scalar, the mean over the batch."""


def forward_loss(model: nn.Module, batch: Any, loss_fn: LossFunction | None = None) -> Tensor:
    """The loss of one batch.

    Args:
        model: A network that returns logits (n, classes), a tuple that begins with them, or a transformers output.
        batch: (inputs, labels, ...), or a dict as a Hugging Face data collator makes it. Of a dict, what ``forward``
            names is passed by name; a network that takes one plain argument gets the one tensor that is no label.
        loss_fn: (what the model returned, labels) -> scalar. Without it the model's own ``loss`` where it gives one,
            else cross entropy, mean over the batch.

    Raises:
        DataError: The batch is neither, or no label can be found and no ``loss_fn`` is given.
    """
    labels = labels_in(batch)
    if isinstance(batch, Mapping):
        outputs = model(**keywords) if (keywords := _keywords(model, batch)) else model(_only_input(batch))
    elif isinstance(batch, (tuple, list)) and batch:
        outputs = model(batch[0])
    else:
        raise DataError(
            f"a batch is a {type(batch).__name__}: give (inputs, labels) or a dict with pixel_values, labels"
        )
    if loss_fn is not None:
        return loss_fn(outputs, labels)
    if isinstance(loss := getattr(outputs, "loss", None), Tensor):
        return loss
    if labels is None:
        raise DataError(f"no labels in the batch (one of {', '.join(LABEL_KEYS)}): pass loss_fn=, or add them")
    return F.cross_entropy(logits_of(outputs).float(), labels)


def logits_of(outputs: Any) -> Tensor:
    """The logits in what a model returned: a tensor, ``.logits``, or the first of a tuple."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(logits := getattr(outputs, "logits", None), Tensor):
        return logits
    return outputs[0]


def labels_in(batch: Any) -> Any:
    """The labels of a batch, or None."""
    if isinstance(batch, Mapping):
        return next((batch[key] for key in LABEL_KEYS if key in batch), None)
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None


def _keywords(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a dict the network's own forward names; nothing, if it names none of the inputs."""
    network: Any = unwrapped(model)  # DDP's forward takes anything, too
    while hasattr(network, "base_model") and hasattr(network.base_model, "model"):
        network = network.base_model.model  # PEFT's forward takes anything and passes it on
    parameters = inspect.signature(network.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and len(parameters) == 1:
        return dict(batch)
    named = {key: value for key, value in batch.items() if key in parameters}
    return named if set(named) - set(LABEL_KEYS) else {}


def _only_input(batch: Mapping[str, Any]) -> Tensor:
    inputs = {key: value for key, value in batch.items() if key not in LABEL_KEYS and isinstance(value, Tensor)}
    if len(inputs) != 1:
        raise DataError(
            f"the network's forward names none of the batch's {', '.join(batch)}, and {len(inputs)} of them could be "
            "its input: keep one tensor beside the labels"
        )
    return next(iter(inputs.values()))
