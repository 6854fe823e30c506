"""From the names of adapters to files for another engine: the base is opened as the adapters' record says."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ..adapters.adapter import new_folder, read_adapter
from ..adapters.export import FORMATS, OnnxExport, export_onnx
from ..errors import AdapterError, ConfigError
from .pulling import open_adapted
from .records import BaseName


def export_to(
    adapters: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    format: str = "onnx",
    merged: bool = False,
    revision: str | None = None,
    base: BaseName | None = None,
) -> OnnxExport:
    """Open the base of some adapters and write all for another engine; see `export_onnx`.

    A site is called as the last part of its folder or id.

    Args:
        adapters: Folders, or ids on the Hub.
        output: A new folder.
        format: ``"onnx"``.
        merged: As for `export_onnx`.
        revision: A branch, a tag or a commit of the Hub's ids.
        base: As for `open_adapted`.

    Raises:
        ConfigError: For another format.
        AdapterError: Two adapters have one name; or as `export_onnx` and `open_adapted`, with their other errors.
    """
    if format not in FORMATS:
        raise ConfigError(f"format={format!r}: choose one of {', '.join(FORMATS)}")
    new_folder(output)  # before a base is fetched
    names = [Path(adapter).resolve().name if Path(adapter).is_dir() else Path(adapter).name for adapter in adapters]
    if twice := [name for name in names if names.count(name) > 1]:
        raise AdapterError(f"two adapters are called {twice[0]}: copy one to a folder of another name")
    opened = open_adapted(adapters[0], revision=revision, base=base)
    images = [Image.effect_noise((256, 256), 80).convert("RGB") for _ in range(2)]
    pixel_values = torch.stack([opened.transform(image) for image in images])
    network = opened.model.unload()
    found = {name: read_adapter(one, revision=revision) for name, one in zip(names, adapters, strict=True)}
    return export_onnx(network, found, pixel_values, output, merged=merged, label_names=opened.label_names)
