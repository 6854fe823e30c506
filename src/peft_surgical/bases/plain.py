"""Whole networks as plain checkpoints: a folder that transformers or timm loads without this package."""

from __future__ import annotations

import json
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
        folder: Gets ``config.json`` and ``model.safetensors``. `load_base` and the network's own library open it; a
            network of timm opens in transformers' ``AutoModelForImageClassification`` as well.
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
