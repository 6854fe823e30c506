"""How the base of an adapter is built again: the record ``base.json`` that lies beside an adapter.

PEFT's config names a base and no more. What else it takes (the commit, the library, the number of classes, what became
of the head, the size of its images) is recorded in a file of its own, written when an adapter is pushed and proven
then: the record is opened, the adapter is loaded onto the result, and every tensor of the base is fingerprinted, also
those that the adapter does not tune. A field of the config would be carried from one base to another with the config
object, which people reuse; a file that holds the SHA-256 of its weights cannot lie beside other weights unnoticed.

Nothing that is read is executed: a record holds strings, numbers and hashes. Weights come from safetensors only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..blocks import anatomy_of
from ..config import SurgicalConfig
from ..errors import AdapterFileError, AnatomyError, ConfigError, DataError
from ..evaluation import Report
from ..extras import require
from ..fingerprints import fingerprint
from ..folders import canonical_json, write_atomically
from ..keys import RECORD_FILE
from ..tuner.base import is_whole

BaseName = str | Mapping[str, Any]
"""A base as users name it: an id, or the arguments of `load_base` with ``name``, and ``revision``."""
LIBRARIES = ("timm", "transformers")
RECORDED_HEADS = ("keep", "new", "zero")
DTYPES = ("float64", "float32", "bfloat16", "float16")
FORMAT = 1
_LARGEST = 2**24  # bytes of a record; one of a network with 1,000 tensors has 0.1 MB
_MOST_CLASSES = 10**6
_MOST_PIXELS = 4096
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ASKED = ("name", "revision", "label_names", "num_classes", "head", "image_size")


@dataclass(frozen=True)
class BaseRecord:
    """How to build a base, and what its tensors must be. What is None is found out by `pulling.rebuild`.

    Attributes:
        id: A repository of the Hub (``owner/name``), or a folder as an absolute path.
        revision: Commit of the repository; None for a folder.
        library: One of `LIBRARIES`.
        architecture: timm's name of the architecture, or transformers' class.
        dtype: The dtype of its floating-point tensors, such as ``"float32"``.
        num_classes: Number of outputs.
        label_names: What the outputs mean.
        head: ``"keep"`` the checkpoint's; ``"zero"``, a new one of zeros, which the adapter's deltas add to; ``"new"``,
            of any values, because the adapter holds the head whole.
        fingerprint: Tensor -> hash (see `files.fingerprint`), of all tensors that the adapter does not hold whole.
        weights_sha256: SHA-256 of the adapter file that the record belongs to.
        image_size: Height and width of its inputs in pixels, where the adapter was tuned on another size than the
            checkpoint's.
    """

    id: str
    revision: str | None = None
    library: str | None = None
    architecture: str | None = None
    dtype: str | None = None
    num_classes: int | None = None
    label_names: tuple[str, ...] | None = None
    head: str = "keep"
    fingerprint: Mapping[str, str] | None = None
    weights_sha256: str | None = None
    image_size: int | None = None

    @property
    def is_folder(self) -> bool:
        """Whether the base is a folder of this machine."""
        return os.path.isabs(self.id)


def write_record(folder: str | os.PathLike[str], record: BaseRecord) -> None:
    """Write ``base.json`` in one step."""
    write_atomically(Path(folder, RECORD_FILE), canonical_json({"format": FORMAT, **asdict(record)}))


def read_record(folder: str | os.PathLike[str], weights_sha256: str | None = None) -> BaseRecord | None:
    """The record in an adapter's folder, whose weights have this SHA-256; None where there is none.

    Raises:
        AdapterFileError: It is no record, was written by a later version, or belongs to another adapter.
    """
    file = Path(folder, RECORD_FILE)
    if not file.is_file():
        return None
    if file.stat().st_size > _LARGEST:
        raise AdapterFileError(f"{file} has {file.stat().st_size:,} bytes: no record of a base is that large")
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        if plain.pop("format") != FORMAT:
            raise AdapterFileError(f"{file} was written by a later version: pip install -U peft-surgical")
        names = plain.pop("label_names")
        record = BaseRecord(label_names=None if names is None else tuple(names), **plain)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        expected = ", ".join(entry.name for entry in fields(BaseRecord))
        raise AdapterFileError(f"{file} is no record of a base ({error}): expected {expected}") from error
    _check(record, file)
    if weights_sha256 is not None and record.weights_sha256 not in (None, weights_sha256):
        raise AdapterFileError(
            f"{file} belongs to another adapter file (SHA-256 {record.weights_sha256[:12]}...) than the one beside it "
            f"({weights_sha256[:12]}...): remove it, and say base= or push again"
        )
    return record


def _is_count(value: Any, most: int) -> bool:
    return value is None or (type(value) is int and 1 <= value <= most)


def _check(record: BaseRecord, file: Path) -> None:
    """Raise `AdapterFileError` unless all fields have their types and the values that this version knows."""

    def text(value: Any) -> bool:
        return isinstance(value, str | None)

    revision, names, prints = record.revision, record.label_names, record.fingerprint
    named = names is None or (all(map(text, names)) and record.num_classes in (None, len(names)))
    hashes = prints is None or (isinstance(prints, dict) and all(isinstance(v, str) for v in prints.values()))
    for name, valid, expected in (
        ("id", isinstance(record.id, str) and record.id, "a repository of the Hub or a folder"),
        ("revision", text(revision) and (revision is None or _COMMIT.fullmatch(revision)), "a commit of 40 hex digits"),
        ("library", record.library in (None, *LIBRARIES), f"one of {', '.join(LIBRARIES)}, which this version builds"),
        ("architecture", text(record.architecture), "a string"),
        ("dtype", record.dtype in (None, *DTYPES), f"one of {', '.join(DTYPES)}"),
        ("num_classes", _is_count(record.num_classes, _MOST_CLASSES), f"a number from 1 to {_MOST_CLASSES:,}"),
        ("label_names", named, "a name for each class"),
        ("head", record.head in RECORDED_HEADS, f"one of {', '.join(RECORDED_HEADS)}"),
        ("fingerprint", hashes, "tensor -> hash"),
        ("weights_sha256", text(record.weights_sha256), "a string"),
        ("image_size", _is_count(record.image_size, _MOST_PIXELS), f"a number from 1 to {_MOST_PIXELS:,}"),
    ):
        if not valid:
            raise AdapterFileError(f"{file}: {name} is {getattr(record, name)!r}, not {expected}")


def record_of(network: nn.Module, config: SurgicalConfig) -> BaseRecord | None:
    """What a live base tells about itself; None for one of neither library, or one that names no origin."""
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
        dtype=dtype_of(network),
        num_classes=count,
        label_names=labels,
        head=_head_of(network, config),
    )


def recorded(folder: Path, config: SurgicalConfig) -> BaseRecord | None:
    """`read_record`, or else what the adapter's config tells; None where that leads nowhere."""
    record = read_record(folder, config.weights_sha256)
    if record is None and config.base_model_name_or_path:
        with contextlib.suppress(DataError):  # no error yet: the user may say which base it is
            place, revision = split_name(config.base_model_name_or_path)
            record = BaseRecord(place, revision or config.revision)
    return record


def completed(record: BaseRecord | None, asked: BaseName | None, report: Report | None) -> BaseRecord:
    """A record with what the user (``asked``) and the settings of a report of ``tune`` tell about the base.

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
    if not _is_count(record.image_size, _MOST_PIXELS):
        raise ConfigError(
            f"the base is to be opened with image_size={record.image_size!r}, not a number from 1 to {_MOST_PIXELS:,}"
        )
    return record


def split_name(name: str) -> tuple[str, str | None]:
    """A base by any of the names that `load_base` takes -> (repository or absolute folder, revision).

    Raises:
        DataError: The name is neither one of the Hub's nor a folder.
    """
    folder = Path(os.path.expanduser(name.removeprefix("local-dir:")))
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


def fingerprint_without_whole(network: nn.Module, config: SurgicalConfig) -> dict[str, str]:
    """The fingerprint of all of a base's tensors that an adapter does not hold whole."""
    tensors = network.state_dict()
    return fingerprint({name: value for name, value in tensors.items() if not is_whole(name, config)})


def dtype_of(network: nn.Module) -> str | None:
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
