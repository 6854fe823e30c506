"""Base and adapter as one plain checkpoint, which timm or transformers loads without this package."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..bases.libraries import save_checkpoint
from ..errors import ConfigError
from .opening import Adapted, open_adapted

LOADING_MERGED = {
    "timm": 'timm.create_model("local-dir:{folder}", pretrained=True)',
    "transformers": 'AutoModelForImageClassification.from_pretrained("{folder}")',
}
"""What loads a merged checkpoint, by library."""


def merge_to(source: str | os.PathLike[str], output: str | os.PathLike[str], **how: Any) -> Adapted:
    """Merge an adapter into its base and write the result as its library writes checkpoints, safetensors only.

    Args:
        source: A repository of the Hub, or a folder.
        output: A folder that is empty or does not exist; it appears as a whole or not at all.
        **how: As for `open_adapted`.

    Returns:
        What was merged; its ``model`` is spent.

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
        place = Path(scratch, "merged")
        save_checkpoint(
            adapted.record.library or "timm",
            network,
            place,
            label_names=adapted.label_names,
            transform=adapted.transform,
        )
        if target.is_dir():
            target.rmdir()
        shutil.move(place, target)
    return adapted
