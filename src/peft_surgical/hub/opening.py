"""A base with its adapter in one call: `open_adapted` and `load_adapted`."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..adapters.contents import read_config
from ..bases.transforms import Transform
from ..errors import AdapterFileError
from ..evaluation import Report
from ..keys import REPORT
from .pulling import locate
from .rebuilding import BaseName, attached, completed, rebuild, recorded
from .records import BaseRecord


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
        """Logits of PIL images: (classes,) of one, (n, classes) of several, on the CPU."""
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
        revision: Of the repository: a branch, a tag or a commit.
        base: The base, where the adapter does not tell it or it is elsewhere here: a repository or a folder, or the
            arguments of `load_base` as a mapping with ``name``.
        strict_base: False takes a base that differs, with a warning if tuned tensors do.
        device: For the model; None leaves it on the CPU.
        token: For private and gated repositories; by default the one that was logged in with.

    Raises:
        AdapterFileError: There is no whole surgical adapter, or its record is none.
        BaseMismatchError: The base is not the one that it was made on. Names the first tensors that differ.
        ConfigError: Nothing says which base it is.
        DataError: There is no such base here, or it is none that `load_base` opens.
        AdapterError: A repository cannot be reached, or the adapter does not fit.
    """
    folder, is_remote = locate(source, revision=revision, token=token)
    config = read_config(folder, strict_base)
    record = recorded(folder, config)
    if is_remote and base is None and record is not None and record.is_folder:
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
