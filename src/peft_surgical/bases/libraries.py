"""What timm and transformers each need: opening a base from a registry, the Hub or a folder, and saving one plainly."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from ..blocks import anatomy_of
from ..errors import AnatomyError, DataError
from ..extras import require
from ..files import shown
from .classes import FitHead
from .transforms import Transform, of_processor, of_timm

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


# --- transformers: any network with an image classification head ---

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


# --- plain checkpoints, which either library loads without this package ---


def save_checkpoint(
    library: str,
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    label_names: Sequence[str] | None = None,
    transform: Callable[[Any], Tensor] | None = None,
) -> Path:
    """Write a network with its config, the names of its classes and what its library needs to prepare images.

    Args:
        library: ``timm`` or ``transformers``: whose network it is.
        model: The network itself, with plain parameters: of a tuned one, what ``merge_and_unload()`` returns.
        folder: Gets ``config.json`` and ``model.safetensors``. `load_base` and the network's own library open it; a
            network of timm opens in transformers' ``AutoModelForImageClassification`` as well.
        label_names: Names of the classes, in their order; transformers' networks have them in their config.
        transform: What prepares images for evaluation, as in `Base`; of transformers its processor is saved.

    Raises:
        DataError: The library is neither timm nor transformers.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    if library == "timm":
        config = {"label_names": list(label_names)} if label_names else None
        require("timm.models", "saving a timm model", "timm").save_for_hf(
            model, place, model_config=config, safe_serialization=True
        )
        _without_repetition(place / "config.json")
    elif library == "transformers":
        model.save_pretrained(place)  # type: ignore[operator]
        processor = getattr(transform, "processor", None)  # timm's networks have none in transformers, either
        if processor is not None:
            processor.save_pretrained(place)
    else:
        raise DataError(
            f"a network of {library!r} has no plain checkpoint: timm and transformers have. Save its state_dict with "
            "safetensors, or keep the adapter beside the base"
        )
    return place


def _without_repetition(file: Path) -> None:
    """Leave the number of classes to its own entry in the config of a timm network.

    timm repeats it among ``model_args``. transformers passes both on, and then fails with "got multiple values for
    keyword argument 'num_classes'".
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    arguments = config.pop("model_args", {})
    arguments.pop("num_classes", None)
    if arguments:
        config["model_args"] = arguments
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")
