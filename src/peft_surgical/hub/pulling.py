"""From the Hub or a folder to a network: `pull`, `open_adapted`, `load_adapted` and `merge_to`."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from peft import PeftModel

from ..adapters.adapter import Adapter, fetch, locate, read_adapter, read_config
from ..adapters.remote import FILES
from ..bases.plain import save_checkpoint
from ..bases.transforms import Transform
from ..errors import AdapterFileError, ConfigError
from ..evaluation import Report
from ..files import commit, file_sha256
from ..keys import CARD, REPORT, WEIGHTS
from .cards import SHA256
from .rebuilding import BaseName, attached, completed, rebuild, recorded
from .records import BaseRecord

LOADING_MERGED = {
    "timm": 'timm.create_model("local-dir:{folder}", pretrained=True)',
    "transformers": 'AutoModelForImageClassification.from_pretrained("{folder}")',
}
"""What loads a merged checkpoint, by library."""


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
        output: A folder to put it into; an adapter there is replaced, as a whole. None leaves it in the cache.
        revision: A branch, a tag or a commit.
        verify: Also compare the file with the SHA-256 in the card.
        force: Fetch again what is in the cache.
        token: By default the one that was logged in with.

    Returns:
        The adapter, with its ``folder`` and ``commit``.

    Raises:
        ConfigError: ``repo`` is not the name of a repository.
        AdapterFileError: There is no whole surgical adapter, or the card has another SHA-256.
        AdapterError: The repository cannot be reached.
    """
    folder = fetch(repo, revision, token, force)
    if verify:
        _check_card(repo, folder)
    target = folder if output is None else _put(folder, Path(output))
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


def _put(folder: Path, target: Path) -> Path:
    """Copy an adapter to a folder, in whose place there is a whole one at every moment."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        for name in FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, Path(scratch, name))
        commit(Path(scratch), target)
    for name in FILES:  # of an older adapter
        if not (folder / name).is_file():
            (target / name).unlink(missing_ok=True)
    return target


@dataclass(frozen=True)
class Adapted:
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
) -> Adapted:
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
    return Adapted(model.to(device) if device else model, opened.transform_eval, opened.label_names, record, folder)


def load_adapted(source: str | os.PathLike[str], **how: Any) -> PeftModel:
    """The model of `open_adapted` alone, which has its arguments and errors."""
    return open_adapted(source, **how).model


def merge_to(source: str | os.PathLike[str], output: str | os.PathLike[str], **how: Any) -> Adapted:
    """Merge an adapter into its base and write the result as its library writes checkpoints, safetensors only.

    Args:
        source: A repository of the Hub, or a folder.
        output: A folder that is empty or does not exist; it appears as a whole or not at all.
        **how: As for `open_adapted`.

    Returns:
        What was merged; its ``model`` cannot be used any more.

    Raises:
        ConfigError: There is something at ``output`` already.
        AdapterError: The merged tensors are not finite; or as `open_adapted`, with its other errors.
    """
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty: name a new folder for the checkpoint")
    adapted = open_adapted(source, **how)
    network: Any = adapted.model.merge_and_unload(safe_merge=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        place, library = Path(scratch, "merged"), adapted.record.library or "timm"
        save_checkpoint(library, network, place, label_names=adapted.label_names, transform=adapted.transform)
        if target.is_dir():
            target.rmdir()
        shutil.move(place, target)
    return adapted
