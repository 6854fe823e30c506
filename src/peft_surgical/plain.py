"""Whole networks as plain checkpoints: a folder that transformers or timm loads without this package."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from .bases import Base
from .errors import DataError
from .extras import require


def save_checkpoint(base: Base, model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write a network with its config, the names of its classes and what its library needs to prepare images.

    Args:
        base: What the network was made from, by `load_base`: says which library it belongs to.
        model: The network itself, with plain parameters: of a tuned one, what ``merge_and_unload()`` returns.
        folder: Gets ``config.json`` and ``model.safetensors``; `load_base` opens it.

    Raises:
        DataError: The library is neither timm nor transformers.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    if base.library == "timm":
        config = {"label_names": list(base.label_names)} if base.label_names else None
        require("timm.models", "saving a timm model", "timm").save_for_hf(
            model, str(place), model_config=config, safe_serialization=True
        )
    elif base.library == "transformers":
        model.save_pretrained(place)  # type: ignore[operator]
        processor = getattr(base.transform_eval, "processor", None)  # timm's networks have none in transformers, either
        if processor is not None:
            processor.save_pretrained(place)
    else:
        raise DataError(f"a network of {base.library!r} has no plain checkpoint: timm and transformers have")
    return place
