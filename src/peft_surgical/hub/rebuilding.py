"""Building the base of an adapter: from its record, at the recorded commit, checked tensor by tensor.

`record_of` says how a live network would be built again, `rebuild` does it. Weights come from safetensors only, and no
code is downloaded.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..adapters.remote import explained
from ..bases.load import Base, load_base
from ..blocks import anatomy_of
from ..config import SurgicalConfig
from ..errors import AdapterError, AdapterFileError, AnatomyError, BaseMismatchError, ConfigError, DataError
from ..evaluation import Report
from ..extras import require
from ..files import fingerprint, shown
from .records import MOST_PIXELS, BaseRecord, is_count, read_record

BaseName = str | Mapping[str, Any]
"""A base as users name it: an id, or the arguments of `load_base` with ``name``, and ``revision``."""

_ASKED = ("name", "revision", "label_names", "num_classes", "head", "image_size")
_FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
)


def record_of(network: nn.Module, config: SurgicalConfig) -> BaseRecord | None:
    """What a live network tells about itself; None for one of neither library, or one that names no origin.

    Args:
        network: The base, without an adapter.
        config: The adapter's: which modules it holds whole, and how it calls its base.
    """
    name = config.base_model_name_or_path or getattr(network, "name_or_path", None)
    labels: tuple[str, ...] | None = None
    described: dict[str, Any] = getattr(network, "pretrained_cfg", None) or {}
    count: Any
    if isinstance(network, PreTrainedModel):
        count = network.config.num_labels
        named = tuple(str(network.config.id2label[i]) for i in sorted(network.config.id2label))
        labels = None if all(re.fullmatch(r"LABEL_\d+", label) for label in named) else named
    elif "architecture" in described:
        name = name or described.get("hf_hub_id")
        count = network.num_classes
    else:
        return None
    if not name:
        return None
    place, revision = split_name(str(name))
    return BaseRecord(
        place,
        revision or config.revision,
        dtype=_dtype_of(network),
        num_classes=count,
        label_names=labels,
        head=_head_of(network, config),
    )


def recorded(folder: Path, config: SurgicalConfig) -> BaseRecord | None:
    """The record in an adapter's folder, or else what its config tells; None where that leads nowhere.

    Raises:
        AdapterFileError: The record is none, or another adapter's.
    """
    record = read_record(folder, config.weights_sha256)
    if record is None and config.base_model_name_or_path:
        with contextlib.suppress(DataError):  # no error yet: the user may say which base it is
            place, revision = split_name(config.base_model_name_or_path)
            record = BaseRecord(place, revision or config.revision)
    return record


def completed(record: BaseRecord | None, asked: BaseName | None, report: Report | None) -> BaseRecord:
    """A record with what the user and the report tell about the base.

    Args:
        record: From the network or the folder.
        asked: The base as the user names it: an id, or the arguments of `load_base` (``name``, ``label_names``,
            ``num_classes``, ``head``, ``image_size``) and ``revision``.
        report: That of ``peft-surgical tune``, whose settings tell how the base was opened.

    Raises:
        ConfigError: Nothing says which base it is, it has random weights, or the image size is none.
    """
    opened = report.settings.get("open") if report is not None else None
    # Only a record that was read from base.json has a hash of the weights: it was proven before, and is not changed.
    if report is not None and isinstance(opened, Mapping) and (record is None or record.weights_sha256 is None):
        if opened.get("weights") == "random":
            raise ConfigError("the base of this adapter is random (--random), and nobody can open it: tune a real one")
        labels = tuple(map(str, opened["label_names"])) if opened.get("label_names") else None
        record = replace(record or BaseRecord(*split_name(report.model)), image_size=opened.get("image_size"))
        if record.fingerprint is None:
            record = replace(record, label_names=labels, num_classes=None, head=opened.get("head", "keep"))
        elif record.label_names is None:
            record = replace(record, label_names=labels)
    if asked is not None:
        given: dict[str, Any] = {"name": asked} if isinstance(asked, str) else dict(asked)
        if "name" not in given or set(given) - set(_ASKED):
            raise ConfigError(
                f"base={asked}: give name=, and revision=, label_names=, num_classes=, head=, image_size= as needed"
            )
        place, revision = split_name(str(given.pop("name")))
        if given.get("label_names"):
            given["label_names"] = tuple(given["label_names"])
        record = replace(record or BaseRecord(place), id=place, **{"revision": revision, **given})
    if record is None:
        raise ConfigError(
            "nothing says which base the adapter was made on: say base=, a repository of the Hub or a folder. "
            "A network of your own takes the adapter by PeftModel.from_pretrained, and is pushed with loading="
        )
    if not is_count(record.image_size, MOST_PIXELS):
        raise ConfigError(
            f"the base is to be opened with image_size={record.image_size!r}, not a number from 1 to {MOST_PIXELS:,}"
        )
    return record


def split_name(name: str) -> tuple[str, str | None]:
    """A base by any of the names that `load_base` takes -> (repository or absolute folder, revision).

    Raises:
        DataError: The name is neither one of the Hub's nor a folder.
    """
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    if folder.is_dir() or name.startswith("local-dir:") or folder.is_absolute():
        return str(folder.absolute()), None
    name, _, revision = re.sub(r"^hf[-_]hub:", "", name).partition("@")
    if "/" not in name:
        timm = require("timm", "finding a base by timm's name for it", "timm")
        found = timm.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
        if found is None or not found.hf_hub_id:
            raise DataError(
                f"the base {name!r} is no repository of the Hub (owner/name), no folder ({folder.absolute()}), and "
                "none of timm's networks with weights on the Hub: say base= with one of these"
            )
        name = found.hf_hub_id
    return name, revision or None


def is_whole(name: str, config: SurgicalConfig) -> bool:
    """Whether the adapter holds this tensor whole, by PEFT's rule for ``modules_to_save``."""
    ends = tuple(config.modules_to_save or ())
    parts = name.split(".")
    return bool(ends) and any(".".join(parts[:n]).endswith(ends) for n in range(1, len(parts)))


def fingerprint_without_whole(network: nn.Module, config: SurgicalConfig) -> dict[str, str]:
    """The fingerprint of all of a base's tensors that an adapter does not hold whole."""
    tensors = network.state_dict()
    return fingerprint({name: value for name, value in tensors.items() if not is_whole(name, config)})


def _dtype_of(network: nn.Module) -> str | None:
    """That of all floating-point parameters; None where they have several."""
    dtypes = {str(p.dtype).removeprefix("torch.") for p in network.parameters() if p.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 else None


def _head_of(network: nn.Module, config: SurgicalConfig) -> str:
    try:
        names = anatomy_of(network, config.blocks)["head"].tensors
    except (AnatomyError, KeyError):
        return "keep"
    if all(is_whole(name, config) for name in names):
        return "new"
    values = network.state_dict()
    return "keep" if any(bool(values[name].any()) for name in names) else "zero"


def rebuild(record: BaseRecord, config: SurgicalConfig, *, token: str | bool | None = None) -> tuple[Base, BaseRecord]:
    """Build the base at the recorded commit, and check it tensor by tensor where the record has a fingerprint.

    Args:
        record: How.
        config: The adapter's: which tensors it brings itself.
        token: For a private or gated base; by default the one that was logged in with.

    Returns:
        The base, and the record with all that was None in it, apart from ``weights_sha256`` and ``image_size``.

    Raises:
        DataError: There is no such base.
        BaseMismatchError: What is there now is not what was recorded; names the first tensors that differ.
        AdapterError: Its repository cannot be reached.
    """
    folder, revision = _fetched(record, token)
    classes = None if record.label_names else record.num_classes
    how: dict[str, Any] = {"label_names": record.label_names, "head": record.head, "image_size": record.image_size}
    base = load_base(folder, classes, **how)
    network: Any = base.model
    if base.library == "timm":
        architecture = str(network.pretrained_cfg["architecture"])
    else:
        architecture = type(network).__name__
        network.config._name_or_path = record.id
    network.name_or_path = record.id  # not the folder of the cache: PEFT copies it into further adapters
    if record.dtype is not None:
        network.to(getattr(torch, record.dtype))
    found = replace(
        record,
        revision=revision,
        library=base.library,
        architecture=architecture,
        dtype=_dtype_of(network),
        num_classes=base.classes,
        label_names=base.label_names,
        fingerprint=fingerprint_without_whole(network, config),
    )
    for name in ("library", "architecture"):
        if getattr(record, name) not in (None, getattr(found, name)):
            raise BaseMismatchError(
                f"{record.id} is {getattr(found, name)} now, where the adapter's record says {getattr(record, name)}"
            )
    if record.fingerprint is not None:
        place = f"{record.id} at {revision[:12]}" if revision else record.id
        check_fingerprints(record.fingerprint, found.fingerprint or {}, place)
    return replace(base, name=record.id), found


def check_fingerprints(expected: Mapping[str, str], found: Mapping[str, str], name: str) -> None:
    """Raise `BaseMismatchError` unless two fingerprints of whole bases are equal."""
    names = {**expected, **found}
    wrong = [key for key in names if expected.get(key) != found.get(key)]
    if wrong:
        raise BaseMismatchError(
            f"The base {name} is not the one that this adapter was made on: {len(wrong)} of {len(names)} tensors "
            f"differ, first {shown(wrong)}. Ask the adapter's author which base it is, and say base= with that one."
        )


def _fetched(record: BaseRecord, token: str | bool | None) -> tuple[str, str | None]:
    """The folder of a base, downloaded if need be, and its commit."""
    if record.is_folder:
        if not Path(record.id).is_dir():
            raise DataError(
                f"the adapter's base is the folder {record.id}, which is not on this machine: say base= with the "
                "place where it is here, or with its repository on the Hub"
            )
        return record.id, None
    with explained("open the base", record.id, record.revision, f"there is no folder {Path(record.id).absolute()}"):
        folder = snapshot_download(record.id, revision=record.revision, allow_patterns=list(_FILES), token=token)
    return folder, Path(folder).name


def attached(base: Base, folder: Path, strict_base: bool = True) -> PeftModel:
    """The adapter in a folder on its base, in ``eval()``.

    Raises:
        BaseMismatchError: It is another base.
        AdapterError: It is the base, but opened in another way, with another head.
    """
    try:
        model = PeftModel.from_pretrained(base.model, folder, torch_device="cpu", strict_base=strict_base)
    except (BaseMismatchError, AdapterFileError):
        raise
    except (RuntimeError, ValueError) as error:
        raise AdapterError(
            f"the adapter does not fit {base.name} with {base.classes} classes ({error}): say base= with the arguments "
            "of load_base that open its base"
        ) from error
    return model.eval()
