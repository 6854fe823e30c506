"""Bases of transformers: any network with an image classification head, from the Hub or from a folder."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from ..blocks import anatomy_of
from ..errors import AnatomyError, DataError
from ..files import shown
from .classes import FitHead
from .timm_bases import transforms_of
from .transforms import Transform, of_processor

_PLACEHOLDER = re.compile(r"LABEL_\d+")


class TransformersBase:
    """A transformers network with what its library knows about it.

    Args:
        name: ``owner/name`` on the Hub, or a folder.
        pretrained: Whether to read its weights.
        fit: Called with the number of the checkpoint's classes and their names, or None; says what becomes of its head.

    Raises:
        DataError: If the checkpoint misses tensors of anything but the head.
    """

    library = "transformers"

    def __init__(self, name: str, pretrained: bool, fit: FitHead) -> None:
        self._name = name
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        self.fit = fit(config.num_labels, _names(config))
        if self.fit.classes != config.num_labels:
            config.num_labels = self.fit.classes
        if not pretrained:
            self.model: nn.Module = AutoModelForImageClassification.from_config(config, trust_remote_code=False)
            self.head_is_new = True
        else:
            self.model, report = AutoModelForImageClassification.from_pretrained(
                name,
                config=config,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
            drawn = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
            # What does not fit is drawn at random by transformers, which is right for the head and for nothing else.
            if wrong := sorted(drawn - set(self._head())):
                raise DataError(f"{name} does not hold {shown(wrong)} in the shapes that its own config says")
            self.head_is_new = bool(drawn)

    @property
    def classes(self) -> int:
        """Number of outputs."""
        return int(self.model.config.num_labels)  # type: ignore[union-attr,arg-type]

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """What the outputs mean; None for transformers' placeholders, and for those of a head that is gone."""
        return _names(self.model.config)

    def _head(self) -> Iterable[str]:
        try:
            anatomy = anatomy_of(self.model)
            return anatomy["head"].tensors if "head" in anatomy else ()
        except AnatomyError:
            return [name for name in self.model.state_dict() if name.startswith(("classifier.", "head.", "fc."))]

    def new_head(self, classes: int) -> None:
        """Draw the classifier again: its values are those that an untrained network of this kind would have."""
        self.model.config.num_labels = classes  # type: ignore[union-attr]
        untrained = AutoModelForImageClassification.from_config(self.model.config, trust_remote_code=False).state_dict()
        tensors = self.model.state_dict()
        with torch.no_grad():
            for name in self._head():
                tensors[name].copy_(untrained[name])
        self.head_is_new = True

    def name_classes(self, names: tuple[str, ...]) -> None:
        """Say what the outputs mean, in the config."""
        self.model.config.id2label = dict(enumerate(names))  # type: ignore[union-attr]
        self.model.config.label2id = {name: i for i, name in enumerate(names)}  # type: ignore[union-attr]

    def transforms(self, augment: str, size: int | None = None) -> tuple[Transform, Transform]:
        """For training and for evaluation, giving images of ``size`` x ``size``, by default those of the checkpoint.

        Raises:
            DataError: If no image processor was saved with the network.
        """
        if (inner := getattr(self.model, "timm_model", None)) is not None:
            # What transformers writes for a network of timm's does not name a processor; the network knows its own.
            return transforms_of(inner, augment, size)
        try:
            processor = AutoImageProcessor.from_pretrained(self._name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self._name} has no preprocessor_config.json, which says how images become its input ({error}): save "
                "that of the model it was made from beside it, by "
                "AutoImageProcessor.from_pretrained(...).save_pretrained(...)"
            ) from error
        if size is not None:
            square = {"height": size, "width": size}
            edge = getattr(processor.size, "shortest_edge", None) is not None
            given = {"size": {"shortest_edge": size} if edge else square}
            if getattr(processor, "crop_size", None) is not None:
                given["crop_size"] = square
            processor = AutoImageProcessor.from_pretrained(self._name, trust_remote_code=False, **given)
        return of_processor(processor, augment)


def _names(config: Any) -> tuple[str, ...] | None:
    """The names of a config's classes: of ``id2label``, or of ``label2id`` where only that was given."""
    for names in (config.id2label, {i: name for name, i in (config.label2id or {}).items()}):
        named = tuple(str(names[i]) for i in sorted(names))
        if sorted(names) == list(range(config.num_labels)) and not all(map(_PLACEHOLDER.fullmatch, named)):
            return named
    return None
