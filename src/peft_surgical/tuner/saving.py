"""Saving so that a folder always holds one whole adapter: the old one or the new one.

PEFT writes the weights and then the config, each in place. A kill between the two leaves one adapter's weights beside
another's config, with nothing to tell. Here PEFT writes into a folder beside the target, and the files are renamed in
three steps, each atomic and each leaving a whole adapter::

    1. the new config, with the old one inside as "superseded"     weights: old -> the old config applies
    2. the new weights                                             weights: new -> the new config applies
    3. the new config alone

`SurgicalConfig.from_pretrained` tells the two apart by the SHA-256 of the weights.
"""

from __future__ import annotations

import functools
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import SurgicalConfig
from ..errors import AdapterError
from ..files import commit
from ..keys import CARD, CONFIG
from .card import write_card


def saving_atomically(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``PeftModel.save_pretrained``: surgical adapters are staged and renamed, all others are none of ours."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        surgical = any(isinstance(config, SurgicalConfig) for config in self.peft_config.values())
        if not surgical or os.path.isfile(save_directory):
            original(self, save_directory, *args, **kwargs)
            return
        given = signature.bind(self, save_directory, *args, **kwargs).arguments
        if not given.get("safe_serialization", True):
            raise AdapterError(
                "safe_serialization=False asks for a pickle, which can run code when it is read. Surgical adapters "
                "are saved as safetensors only: leave the argument out."
            )
        if given.get("save_embedding_layers") is True:
            raise AdapterError(
                "save_embedding_layers=True would put base tensors beside the deltas. Target the embedding "
                "(target='embedding + ...') to keep what it learns; leave the argument out."
            )
        rest = {**given.pop("kwargs", {}), **given, "save_embedding_layers": False}
        del rest["self"], rest["save_directory"]
        target = Path(save_directory)
        if rest.get("is_main_process") is False:
            # Other ranks take part in gathering the tensors; they write nothing.
            original(self, save_directory, **rest)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            stage = Path(scratch)
            for place in (".", *self.peft_config):
                if (target / place / CARD).is_file():  # it may be somebody's own, which stays
                    (stage / place).mkdir(exist_ok=True)
                    shutil.copy2(target / place / CARD, stage / place / CARD)
            original(self, stage, **rest)
            for config in list(stage.rglob(CONFIG)):
                write_card(config.parent)
            commit(stage, target)

    return save_pretrained
