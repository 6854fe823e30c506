"""What `tune` and `compare` are asked for beside network and data, and what opens the network."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from ..bases.classes import fit_head
from ..bases.load import Base, load_base
from ..blocks import anatomy_of
from ..errors import ConfigError

SCHEDULERS, ENGINES = ("constant", "cosine"), ("local", "ray")


@dataclass(frozen=True)
class RunSettings:
    """Keyword arguments that `tune` and `compare` have in common.

    Attributes:
        lr: Learning rate, or several to choose from; None for 1e-3 and 1e-4. ``auto`` looks further by itself.
        head_lr: The same where the head alone is tuned; None for ``lr``, or else 1e-2 and 1e-3.
        epochs: Length of each run; the epoch with the best validation accuracy counts.
        batch_size: Images per training step; None for the largest of `BATCH_SIZES` that makes 16 steps an epoch.
        optimizer: ``adam``, ``adamw`` or ``sgd``.
        weight_decay: Pulls towards the pretrained weights.
        scheduler: Schedule of the learning rate: ``constant`` or ``cosine``.
        precision: ``bf16`` or ``fp16``; None for float32.
        norm_stats: Whose normalisation statistics move: ``frozen``, ``target``, ``all``, or ``estimated`` once from the
            tuning images. None lets ``auto`` choose between ``frozen`` and ``estimated``, and is ``frozen`` elsewhere.
        effort: For ``auto``: how many fifths of a run each candidate trains, 1 to 5.
        delta_dtype: Dtype of the saved deltas: ``bfloat16`` or ``float16`` halve the file.
        tuning: Images to tune on, as a number or a share below 1; None for all.
        validation: The same of the images to choose with, which are drawn where the data brings none.
        test: The same of the images to report on.
        image_column: Column of the images in a table, as for `read_data`.
        label_column: Column of the labels.
        on_broken: What happens to images that cannot be decoded: ``raise``, ``skip`` or ``later``.
        head: ``auto``, ``keep`` or ``new``, as for `load_base`.
        augment: ``none``, ``flip`` or ``crop``.
        image_size: Height and width of the network's input, in pixels; None for the network's own.
        workers: Processes that load images.
        cache: Whether what is frozen before the target is computed once for each image; changes no result.
        cached_views: With ``augment``: so many fixed random views of each tuning image, used in turn, epoch by epoch,
            so that they can be computed once. None draws new ones in every epoch.
        weights: ``pretrained``, or ``random`` to try things out.
        cpu: Whether to leave an accelerator alone.
        engine: ``local``, or ``ray`` for a Ray cluster, whose machines need the network, the data and the output folder
            under the same names.
        report_to: What follows each run, such as ``tensorboard``, ``wandb`` or ``trackio``: as for Trainer, which names
            runs by method, rate and seed. TensorBoard's files go to the folder ``logs`` in the output folder.
        transform: With a network itself: PIL image in RGB -> float tensor (3, h, w).
        label_names: With a network itself: the classes of its outputs, in order.
    """

    lr: float | Sequence[float] | None = None
    head_lr: float | Sequence[float] | None = None
    epochs: int = 15
    batch_size: int | None = None
    optimizer: str = "adam"
    weight_decay: float = 1e-4
    scheduler: str = "constant"
    precision: str | None = None
    norm_stats: str | None = None
    effort: int = 1
    delta_dtype: str | None = None
    tuning: int | float | None = None
    validation: int | float | None = None
    test: int | float | None = None
    image_column: str | None = None
    label_column: str | None = None
    on_broken: str = "raise"
    head: str = "auto"
    augment: str = "none"
    image_size: int | None = None
    workers: int = 0
    cache: bool = True
    cached_views: int | None = None
    weights: str = "pretrained"
    cpu: bool = False
    engine: str = "local"
    report_to: str | None = None
    transform: Callable[[Any], Tensor] | None = None
    label_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.cached_views is not None and (self.cached_views < 1 or self.augment == "none" or not self.cache):
            raise ConfigError(
                f"cached_views={self.cached_views}: give 1 or more, with augment= and the cache, or leave it out"
            )
        for name, choices in (("scheduler", SCHEDULERS), ("engine", ENGINES)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}")

        known = sorted(INTEGRATION_TO_CALLBACK)
        if self.report_to not in (None, *known):
            raise ConfigError(f"report_to={self.report_to!r}: choose one of {', '.join(known)}")
        if self.report_to and self.report_to not in get_available_reporting_integrations():
            raise ConfigError(f"report_to={self.report_to!r} needs its package: pip install {self.report_to}")

    @property
    def columns(self) -> dict[str, Any]:
        """How data is read, whatever is drawn from it; for `read_data`."""
        return {"image_column": self.image_column, "label_column": self.label_column, "on_broken": self.on_broken}


def opened(network: Any, given: RunSettings) -> tuple[str, Callable[..., Base]]:
    """The name of a network, and what opens it as `load_base` does.

    Args:
        network: As for `tune`.
        given: The settings; ``transform``, ``label_names`` and how a network is opened are read.

    Raises:
        ConfigError: What is given does not go with this kind of network.
    """
    if isinstance(network, (str, os.PathLike)):
        if given.transform is not None or given.label_names is not None:
            raise ConfigError("transform= and label_names= are for a network itself: leave them out with a name")
        return os.fspath(network), load_base
    base = network
    if isinstance(network, nn.Module):
        if given.transform is None or given.label_names is None:
            raise ConfigError("with a network itself give transform= (PIL image -> tensor) and label_names=, too")
        names = tuple(given.label_names)
        base = Base(network, type(network).__name__, "", len(names), names, given.transform, given.transform, False)
    if not isinstance(base, Base):
        raise ConfigError(f"a network is a name, a folder, a Base or an nn.Module, not a {type(network).__name__}")
    if (given.augment, given.image_size, given.weights) != ("none", None, "pretrained"):
        raise ConfigError("augment=, image_size= and weights= say how a network is opened by name: leave them out")
    if given.head == "new" and not base.head_is_new:
        raise ConfigError('head="new" is for a network that is opened by name: give its name or folder')

    def opener(
        name: str, *, label_names: Sequence[str], head: str, weights: str, seed: int, augment: str = "none"
    ) -> Base:
        fit = fit_head(base.classes, base.label_names, label_names, None, head == "keep", name)
        if fit.outputs is None:
            raise ConfigError(f"{fit.note}. For a new head give the network by its name or folder")
        model = copy.deepcopy(base.model).cpu().eval()
        if head == "zero":
            tensors = set(anatomy_of(model)["head"].tensors)
            with torch.no_grad():
                for parameter in (value for key, value in model.named_parameters() if key in tensors):
                    parameter.zero_()
        outputs = None if fit.outputs == tuple(range(base.classes)) else fit.outputs
        return replace(base, model=model, outputs=outputs, head_note=base.head_note if base.head_is_new else fit.note)

    return base.name, opener
