"""Bases of timm: from its registry, from the Hub, or from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import nn

from ..errors import DataError
from ..extras import require
from .classes import FitHead
from .transforms import Transform, of_timm

SAFETENSORS = "model.safetensors"


class TimmBase:
    """A timm network with what its library knows about it.

    Args:
        name: A name of the registry, ``hf-hub:owner/name``, or ``local-dir:folder``.
        pretrained: Whether to read its weights.
        fit: Called with the number of the checkpoint's classes and their names, or None; says what becomes of its head.
    """

    library = "timm"

    def __init__(self, name: str, pretrained: bool, fit: FitHead) -> None:
        timm = require("timm", "loading a timm model", "timm")
        source = _source(timm, name) if pretrained else None
        self.model: nn.Module = timm.create_model(name, pretrained=pretrained)
        if source is not None:
            # PEFT copies this into an adapter's config.
            self.model.name_or_path = source
        config: dict[str, Any] = getattr(self.model, "pretrained_cfg", {})
        names = config.get("label_names")
        self.label_names = tuple(map(str, names)) if names and len(names) == self.classes else None
        self.head_is_new = not pretrained
        self.fit = fit(self.classes, self.label_names)
        if self.fit.classes != self.classes:
            self.new_head(self.fit.classes)

    @property
    def classes(self) -> int:
        """Number of outputs; 0 where the checkpoint has no head."""
        return int(self.model.num_classes)  # type: ignore[arg-type]

    def new_head(self, classes: int) -> None:
        """Replace the classifier by one that is drawn at random."""
        self.model.reset_classifier(classes)  # type: ignore[operator]
        self.label_names, self.head_is_new = None, True

    def name_classes(self, names: tuple[str, ...]) -> None:
        """Say what the outputs mean; timm has no place for it in a network."""
        self.label_names = names

    def transforms(self, augment: str, size: int | None = None) -> tuple[Transform, Transform]:
        """For training and for evaluation, giving images of ``size`` x ``size``, by default those of the checkpoint."""
        return transforms_of(self.model, augment, size)


def transforms_of(model: nn.Module, augment: str, size: int | None) -> tuple[Transform, Transform]:
    """The transforms of a timm network, giving images of ``size`` x ``size``, by default those of the checkpoint."""
    config = require("timm.data", "loading a timm model", "timm").resolve_model_data_config(model)
    if size is not None:
        config = {**config, "input_size": (config["input_size"][0], size, size)}
    return of_timm(config, augment)


def _source(timm: Any, name: str) -> str:
    """Make sure that timm will find safetensors, where it else would read a pickle; the name to find the base by."""
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        if not (folder / SAFETENSORS).is_file():
            raise DataError(
                f"{folder} has no {SAFETENSORS}, and nothing else is read: put the weights there under that "
                "name, or save the network from Python with peft_surgical.bases.save_checkpoint"
            )
        return str(folder)
    if name.startswith("hf-hub:"):
        repository, file = name.removeprefix("hf-hub:"), None
    else:
        config = timm.get_pretrained_cfg(name)
        if config is None or not config.has_weights:
            raise DataError(
                f"timm has no pretrained weights for {name!r}: name one that has, with its tag{_tags(name)}"
            )
        repository, file = config.hf_hub_id, config.hf_hub_filename
        if repository is None:
            raise DataError(
                f"the weights of {name!r} are published as a pickle only ({config.url}), and only safetensors are "
                f"read: take another tag{_tags(name)}"
            )
    try:
        hf_hub_download(
            repository.partition("@")[0], file or SAFETENSORS, revision=repository.partition("@")[2] or None
        )
    except LocalEntryNotFoundError:
        raise  # not in the cache, and offline: that says nothing about what the repository has
    except EntryNotFoundError as error:
        raise DataError(f"{repository} on the Hub has no {SAFETENSORS}, and nothing else is read") from error
    return str(repository)


def _tags(name: str) -> str:
    timm = require("timm", "loading a timm model", "timm")
    tagged = timm.list_pretrained(f"{name.split('.')[0]}.*")
    return f", such as {', '.join(tagged[:5])}" if tagged else ""
