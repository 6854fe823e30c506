"""From the Hub or a folder to a network: `pull`, `rebuild`, `open_adapted`, `load_adapted` and `merge_to`.

A base is built at the recorded commit and checked tensor by tensor. Only safetensors are read; no code is downloaded.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, snapshot_download
from peft import PeftModel

from ..adapters.adapter import Adapter, fetch, locate, new_folder, read_adapter, read_config
from ..adapters.remote import FILES, explained
from ..bases.libraries import save_checkpoint
from ..bases.load import Base, load_base
from ..bases.transforms import Transform
from ..config import SurgicalConfig
from ..errors import AdapterError, AdapterFileError, BaseMismatchError, DataError
from ..evaluation import Report
from ..files import file_sha256, shown
from ..folders import staging
from ..keys import CARD, REPORT, WEIGHTS
from ..results import claim, published, withdraw
from .cards import SHA256
from .records import BaseName, BaseRecord, completed, dtype_of, fingerprint_without_whole, recorded

LOADING_MERGED = {
    "timm": 'timm.create_model("local-dir:{folder}", pretrained=True)',
    "transformers": 'AutoModelForImageClassification.from_pretrained("{folder}")',
}
"""What loads a merged checkpoint, by library."""
_BASE_FILES = [
    *("config.json", "preprocessor_config.json", "processor_config.json"),
    *("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
]


def pull(
    repo: str,
    output: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    verify: bool = False,
    force: bool = False,
    token: str | bool | None = None,
) -> Adapter:
    """Fetch an adapter at one commit, and verify it: whole, unaltered, complete, finite.

    Offline, or while the Hub cannot be reached, it comes from huggingface_hub's cache, if it is whole there.

    Args:
        repo: ``owner/name``.
        output: A folder to put it into: new, empty, or one into which this repository was pulled before, whose adapter
            is replaced as a whole. None leaves it in the cache.
        revision: A branch, a tag or a commit.
        verify: Also compare the file with the SHA-256 in the card.
        force: Fetch again what is in the cache.
        token: By default the one that was logged in with.

    Returns:
        The adapter, with its ``folder`` and ``commit``.

    Raises:
        ConfigError: ``repo`` is not the name of a repository, or ``output`` holds other things.
        AdapterFileError: There is no whole surgical adapter, or the card has another SHA-256.
        AdapterError: The repository cannot be reached.
    """
    folder = fetch(repo, revision, token, force)
    if verify:
        _check_card(repo, folder)
    target = folder
    if output is not None:
        _put(folder, target := claim(output, FILES, repo))
    return replace(read_adapter(target), name=repo, commit=folder.name)


def _check_card(repo: str, folder: Path) -> None:
    """Raise `AdapterFileError` unless the card in a folder has the SHA-256 of the adapter file beside it."""
    expected = None
    if (folder / CARD).is_file():
        expected = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data.get(SHA256)
    if expected is None:
        raise AdapterFileError(
            f"the card of {repo} has no {SHA256}, so nothing ties its numbers to this file: push_adapter writes it"
        )
    found = file_sha256(folder / WEIGHTS)
    if expected != found:
        raise AdapterFileError(
            f"the card of {repo} is of another file (SHA-256 {str(expected)[:12]}...) than {WEIGHTS} "
            f"({found[:12]}...): its numbers are not this adapter's. Ask its author, or take an earlier revision"
        )


def _put(folder: Path, target: Path) -> None:
    """Copy an adapter to a claimed folder, in which there is a whole one at every moment."""
    with published(target, page=True) as stage:
        for name in FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, stage / name)
    withdraw(target, [name for name in FILES if not (folder / name).is_file()])  # an older adapter's


def rebuild(record: BaseRecord, config: SurgicalConfig, *, token: str | bool | None = None) -> tuple[Base, BaseRecord]:
    """Build the base at the recorded commit, and check it tensor by tensor where the record has a fingerprint.

    Args:
        record: How.
        config: The adapter's: which tensors it brings itself.
        token: For a private or gated base.

    Returns:
        The base, and the record with what was None in it, apart from ``weights_sha256`` and ``image_size``.

    Raises:
        DataError: There is no such base.
        BaseMismatchError: What is there now is not what was recorded; names the first tensors that differ.
        AdapterError: Its repository cannot be reached.
    """
    folder, revision = _fetched(record, token)
    how: dict[str, Any] = {"label_names": record.label_names, "head": record.head, "image_size": record.image_size}
    base = load_base(folder, None if record.label_names else record.num_classes, **how)
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
        dtype=dtype_of(network),
        num_classes=base.classes,
        label_names=base.label_names,
        fingerprint=fingerprint_without_whole(network, config),
    )
    for name in ("library", "architecture"):
        if getattr(record, name) not in (None, getattr(found, name)):
            raise BaseMismatchError(
                f"{record.id} is {getattr(found, name)} now, where the adapter's record says {getattr(record, name)}"
            )
    expected, there = record.fingerprint, found.fingerprint or {}
    names = {} if expected is None else {**expected, **there}
    if expected is not None and (wrong := [name for name in names if expected.get(name) != there.get(name)]):
        place = f"{record.id} at {revision[:12]}" if revision else record.id
        raise BaseMismatchError(
            f"The base {place} is not the one that this adapter was made on: {len(wrong)} of {len(names)} tensors "
            f"differ, first {shown(wrong)}. Ask the adapter's author which base it is, and say base= with that one."
        )
    return replace(base, name=record.id), found


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
        folder = snapshot_download(record.id, revision=record.revision, allow_patterns=_BASE_FILES, token=token)
    return folder, Path(folder).name


def attached(base: Base, folder: Path, strict_base: bool = True) -> PeftModel:
    """The adapter in a folder on its base, in ``eval()``; an error where that is another base or has another head."""
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


@dataclass(frozen=True)
class AdaptedNetwork:
    """A base with an adapter on it, ready to be used.

    Attributes:
        model: In ``eval()``.
        transform: PIL image in RGB -> float tensor (3, h, w), as the base wants it.
        label_names: What the outputs mean, where it is known.
        record: What the base is.
        folder: Where the adapter lies.
    """

    model: PeftModel
    transform: Transform
    label_names: tuple[str, ...] | None
    record: BaseRecord
    folder: Path

    @torch.no_grad()
    def logits(self, *images: Any) -> torch.Tensor:
        """Logits of PIL images, on the CPU: (classes,) for one image, (n, classes) for several."""
        parameter = next(self.model.parameters())
        inputs = torch.stack([self.transform(image.convert("RGB")) for image in images])
        outputs = self.model(inputs.to(parameter.device, parameter.dtype))
        found = getattr(outputs, "logits", outputs).cpu()
        return found[0] if len(images) == 1 else found


def open_adapted(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    base: BaseName | None = None,
    strict_base: bool = True,
    device: str | torch.device | None = None,
    token: str | bool | None = None,
) -> AdaptedNetwork:
    """Build the base that an adapter names, and put the adapter on it, for bases of timm and transformers.

    ::

        adapted = open_adapted("me/frost-adapter")
        logits = adapted.logits(Image.open("photo.jpg"))

    The adapter is read at one commit and verified. The base is opened at the commit that the adapter's record
    (``base.json``) names, and every tensor of it compared with the record. Nothing that is read is executed.

    Args:
        source: A repository of the Hub, or a folder.
        revision: A branch, a tag or a commit of the repository.
        base: The base, where the adapter does not tell it or it is elsewhere here: a repository or a folder, or the
            arguments of `load_base` as a mapping with ``name``.
        strict_base: False takes a base that differs, with a warning if tuned tensors do.
        device: For the model; None leaves it on the CPU.
        token: For private and gated repositories; by default the one that was logged in with.

    Raises:
        AdapterFileError: There is no whole surgical adapter, or ``base.json`` is not a record.
        BaseMismatchError: The base is not the one that it was made on. Names the first tensors that differ.
        ConfigError: Nothing says which base it is.
        DataError: There is no such base here, or `load_base` does not open it.
        AdapterError: A repository cannot be reached, or the adapter does not fit.
    """
    folder, oid = locate(source, revision=revision, token=token)
    config = read_config(folder, strict_base)
    record = recorded(folder, config)
    if oid is not None and base is None and record is not None and record.is_folder:
        raise AdapterFileError(
            f"the base of {os.fspath(source)} is the folder {record.id} of the machine that it was made on: say base= "
            "with the place of that base here"
        )
    report = Report.load(folder / REPORT) if (folder / REPORT).is_file() else None
    record = completed(record, base, report)
    if not strict_base:
        record = replace(record, fingerprint=None, library=None, architecture=None)
    opened, record = rebuild(record, config, token=token)
    model = attached(opened, folder, strict_base)
    placed = model.to(device) if device else model
    return AdaptedNetwork(placed, opened.transform_eval, opened.label_names, record, folder)


def load_adapted(source: str | os.PathLike[str], **how: Any) -> PeftModel:
    """The model of `open_adapted` alone, with its arguments and errors."""
    return open_adapted(source, **how).model


def merge_to(source: str | os.PathLike[str], output: str | os.PathLike[str], **how: Any) -> AdaptedNetwork:
    """Merge an adapter into its base and write the result as its library writes checkpoints, safetensors only.

    Args:
        source: A repository of the Hub, or a folder.
        output: A folder that is empty or does not exist; its ``config.json`` appears last, when all the rest is there.
        **how: As for `open_adapted`.

    Raises:
        AdapterError: There is something at ``output`` already, or the merged tensors are not finite; or as
            `open_adapted`, with its other errors.
    """
    target = new_folder(output)
    adapted = open_adapted(source, **how)
    network: Any = adapted.model.merge_and_unload(safe_merge=True)
    with staging(target) as stage:
        place, library = stage / "merged", adapted.record.library or "timm"
        save_checkpoint(library, network, place, label_names=adapted.label_names, transform=adapted.transform)
        for path in sorted(place.iterdir(), key=lambda path: path.name == "config.json"):  # which names the rest
            os.replace(path, target / path.name)
    return adapted
