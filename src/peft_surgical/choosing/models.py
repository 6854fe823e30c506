"""What is read of a model: the loss of a batch, and which tensors are trained, by their names in the base network.

Batches and outputs have whatever form loaders and networks give them. Criteria and schedules use the network's own
names (``layer1.0.conv1.weight``), while an optimizer holds a delta, a copy inside ``modules_to_save``, or, without an
adapter, the tensor itself; `trained_tensors` is the one place that knows how these correspond.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..blocks import Anatomy, anatomy_of
from ..errors import AdapterError, DataError, UnsupportedModelError
from ..keys import DELTA, HOLDER, join
from ..tuner.attach import bare, surgical_layers

LABEL_KEYS = ("labels", "label", "targets", "target", "y")
LossFunction = Callable[[Any, Any], Tensor]
"""(what the model returned, labels or None) -> a scalar, the mean over the batch."""


def forward_loss(model: nn.Module, batch: Any, loss_fn: LossFunction | None = None) -> Tensor:
    """The loss of one batch: by default the model's own ``loss`` where it returns one, else the mean cross entropy.

    Args:
        model: Returns logits (n, classes), a tuple that begins with them, or a transformers output.
        batch: (inputs, labels, ...), or a dict. Entries that ``forward`` names are passed by name; a network that
            names none of them gets the only tensor that is not a label.
        loss_fn: See `LossFunction`.

    Raises:
        DataError: The batch has another form, or it holds no labels and no ``loss_fn`` is given.
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
    """The entries that the network's own forward names; none if it names none of the inputs."""
    network: Any = unwrapped(model)  # the forward of DDP, and that of PEFT, takes any keyword
    while hasattr(network, "base_model") and hasattr(network.base_model, "model"):
        network = network.base_model.model
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


_DELTA = f"{HOLDER}.{DELTA}."


@dataclass(frozen=True, eq=False)
class TrainedTensor:
    """One tensor of the base as it is trained.

    Attributes:
        parameter: What the optimizer updates.
        path: The parameter's name in the model's own ``named_parameters()``.
        owner: The module that uses the tensor.
        attribute: The tensor's name in that module.
        is_delta: Whether ``parameter`` is a difference from the base.
    """

    parameter: nn.Parameter
    path: str
    owner: nn.Module
    attribute: str
    is_delta: bool

    @property
    def value(self) -> torch.Tensor:
        """The tensor as the network reads it (base + deltas), detached."""
        return getattr(self.owner, self.attribute).detach()


def unwrapped(model: nn.Module) -> nn.Module:
    """``model`` without the wrappers of DDP, torch.compile and the like."""
    return extract_model_from_parallel(model, keep_fp32_wrapper=True)


def _network_of(model: nn.Module) -> nn.Module:
    return model.base_model.model if isinstance(model, PeftModel) else model


def trained_tensors(model: nn.Module) -> dict[str, TrainedTensor]:
    """Name of each trained tensor of the base -> how it is trained, in the model's order.

    In a network without an adapter, where nothing says yet what will be tuned, frozen parameters count as well.

    Args:
        model: A network or a PeftModel, also in the wrappers of Accelerate or torch.compile.

    Raises:
        AdapterError: Nothing is trainable.
        UnsupportedModelError: Two active adapters train the same tensor.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> list(trained_tensors(net))
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    model = unwrapped(model)
    network = _network_of(model)
    has_adapter = any(True for _ in surgical_layers(network))
    prefix = next((f"{path}." for path, module in model.named_modules() if module is network and path), "")
    found: dict[str, TrainedTensor] = {}
    for path, parameter in model.named_parameters():
        if not parameter.is_floating_point() or (has_adapter and not parameter.requires_grad):
            continue
        name, tensor = _named(network, path.removeprefix(prefix).replace("_orig_mod.", ""), path, parameter)
        if name in found and not (found[name].is_delta and tensor.is_delta):
            found[name] = tensor if tensor.is_delta else found[name]  # a delta stands for the tensor below it
            continue
        if name in found:
            raise UnsupportedModelError(
                f"{name} is trained twice, as {found[name].path} and as {path}: criteria and schedules give a tensor "
                "one rate. Activate one adapter at a time for training (model.set_adapter)."
            )
        found[name] = tensor
    if not found:
        raise AdapterError(
            f"{type(model).__name__} has no trainable parameter: the adapter was loaded for inference, or everything "
            "is frozen. Load it with is_trainable=True."
        )
    return found


def _named(network: nn.Module, name: str, path: str, parameter: nn.Parameter) -> tuple[str, TrainedTensor]:
    if _DELTA in f".{name}":
        owner, _, rest = name.rpartition(_DELTA)
        owner, attribute = owner.removesuffix("."), rest.split(".", 1)[1]
        tensor = TrainedTensor(parameter, path, network.get_submodule(owner), attribute, True)
        return join(owner, attribute), tensor
    owner, _, attribute = name.rpartition(".")
    module = network.get_submodule(owner)
    parts = owner.split(".")
    if "modules_to_save" in parts:  # head.modules_to_save.default -> head
        at = parts.index("modules_to_save")
        if isinstance(network.get_submodule(".".join(parts[:at])), ModulesToSaveWrapper):
            owner = ".".join(parts[:at] + parts[at + 2 :])
    return join(owner, attribute), TrainedTensor(parameter, path, module, attribute, False)


class _ByBaseNames(nn.Module):
    """A network as it was before any adapter, by the names of its parameters; what is trained stands for the rest."""

    def __init__(self, network: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.__dict__.update(network=network, shown=dict(parameters))  # not as a child, whose names would come back

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self.__dict__["shown"].items())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["network"], name)


def with_base_names(model: nn.Module) -> nn.Module:
    """The model as functions read it that make parameter groups by name, such as timm's optimizers with layer decay.

    ::

        create_optimizer_v2(with_base_names(model), opt="adamw", lr=1e-4, weight_decay=0.05, layer_decay=0.75)

    An adapter's parameters have names of their own, which timm's patterns do not know: the delta of ``cls_token`` would
    get the head's rate, and weight decay. Here each is called like the tensor that it changes, beside the frozen
    parameters that the network's layers are counted by, and the groups are those of the network tuned by hand.

    Args:
        model: A PeftModel with a surgical adapter, also in the wrappers of Accelerate or torch.compile.

    Returns:
        A view for optimizers: it lists parameters and has the network's attributes, and is neither called nor saved.

    Raises:
        AdapterError: Nothing is trainable.
        UnsupportedModelError: Two active adapters train the same tensor.
    """
    network = _network_of(unwrapped(model))
    trained = trained_tensors(model)
    with bare(network):
        parameters = dict(network.named_parameters())
    return _ByBaseNames(network, {n: trained[n].parameter if n in trained else p for n, p in parameters.items()})


def anatomy_under(model: nn.Module, blocks: Mapping[str, str | Sequence[str]] | Anatomy | None = None) -> Anatomy:
    """The blocks of the network below the adapters, by default as the active adapter's config divides it."""
    if isinstance(blocks, Anatomy):
        return blocks
    model = unwrapped(model)
    network = _network_of(model)
    if blocks is None:
        configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
        blocks = next((config.blocks for config in configs.values() if getattr(config, "blocks", None)), None)
    with bare(network):
        return anatomy_of(network, blocks)


@contextmanager
def block_outputs(model: nn.Module, anatomy: Anatomy) -> Iterator[dict[str, Tensor]]:
    """Block -> what it puts out, of the blocks before the head: a dict into which every forward pass writes.

    Clear it before a pass whose outputs are not to be mixed with those of the one before. Tensors have the shape that
    the block gives them, (n, ...). Where several modules of a block have an output, the last one that ran counts.
    Blocks without a module of their own, such as embeddings that the network adds itself, are left out.
    """
    owners = {path: block.name for block in anatomy if block.name != "head" for path in block.modules}
    seen: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, given: Any, output: Any) -> None:
        first = output[0] if isinstance(output, (tuple, list)) else getattr(output, "last_hidden_state", output)
        if isinstance(first, Tensor) and first.is_floating_point():
            seen[name] = first

    network = _network_of(unwrapped(model))
    hooks = [network.get_submodule(p).register_forward_hook(partial(keep, name)) for p, name in owners.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def refuse_sharded(tensors: Mapping[str, TrainedTensor]) -> None:
    """Raise for parameters that FSDP has sharded: their gradients exist only inside its own backward."""
    sharded = [name for name, tensor in tensors.items() if isinstance(tensor.parameter, DTensor)]
    if sharded:
        raise UnsupportedModelError(
            f"{sharded[0]} is sharded (FSDP): score the network before accelerator.prepare, or on one process."
        )
