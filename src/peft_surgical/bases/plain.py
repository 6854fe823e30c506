"""Whole networks as plain checkpoints: a folder that transformers or timm loads without this package."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import DataError
from ..extras import require


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
        folder: Gets ``config.json`` and ``model.safetensors``; `load_base` opens it.
        label_names: Of the classes, in their order; transformers' networks have them in their config.
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
