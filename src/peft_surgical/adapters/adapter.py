"""An adapter as plain data: its config and tensors by name, from a folder, the Hub or a live model, and back to disk.

Reading needs no base. What is read has been verified as `PeftModel.from_pretrained` verifies it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from ..config import SurgicalConfig
from ..errors import AdapterError
from ..files import commit
from ..hub.pulling import locate
from ..keys import HOLDER, PEFT_PREFIX, WEIGHTS
from .contents import read_config

_OWN = f"{HOLDER}.surgical_"


@dataclass(frozen=True)
class Adapter:
    """An adapter as it is on disk, or would be if it were saved now.

    Attributes:
        name: Where it is from: a folder, a Hub id, or its name on a live model.
        config: Its config, with the resolved names of its tensors and the fingerprint of their base values.
        deltas: Tensor name -> delta, before scaling, in the dtype of the file.
        statistics: Buffer name -> value of the normalisation statistics that it owns.
        whole: Tensor name -> value of everything in its ``modules_to_save``.
    """

    name: str
    config: SurgicalConfig
    deltas: Mapping[str, torch.Tensor]
    statistics: Mapping[str, torch.Tensor]
    whole: Mapping[str, torch.Tensor]

    @property
    def label(self) -> str:
        """Its name as others may see it: of a folder the last part, without the path on this machine."""
        return Path(self.name).resolve().name if Path(self.name).is_dir() else self.name

    def scaled(self) -> dict[str, torch.Tensor]:
        """Tensor name -> scale * delta, which is what is added to the base; at least float32."""
        scale = self.config.scale
        wide = {name: delta.to(torch.promote_types(delta.dtype, torch.float32)) for name, delta in self.deltas.items()}
        return wide if scale == 1 else {name: delta * scale for name, delta in wide.items()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Its tensors by the keys of an adapter file."""
        found = {_key(name, "delta"): delta for name, delta in self.deltas.items()}
        found |= {_key(name, "stats"): value for name, value in self.statistics.items()}
        found |= {PEFT_PREFIX + name: value for name, value in self.whole.items()}
        return {key: value.detach().cpu().contiguous() for key, value in found.items()}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write it to a new folder, from which ``PeftModel.from_pretrained`` loads it.

        Raises:
            AdapterError: If there is something at that place already.
        """
        target = new_folder(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            save_file(self.state_dict(), Path(scratch, WEIGHTS), metadata={"format": "pt"})
            self.config.save_pretrained(scratch)
            commit(Path(scratch), target)


AdapterSource: TypeAlias = str | os.PathLike[str] | Adapter | PeftModel | tuple[PeftModel, str]
"""What is read as an adapter: a folder, a Hub id, an `Adapter`, a model (its active adapter), or (model, name)."""


def read_adapter(source: AdapterSource, *, revision: str | None = None, token: str | bool | None = None) -> Adapter:
    """Read an adapter, verified: whole, unaltered, complete, finite.

    Args:
        source: A folder that ``save_pretrained`` wrote, a Hub id, or an adapter of a live model.
        revision: Of a Hub id: a branch, a tag or a commit.
        token: For a Hub id.

    Raises:
        AdapterFileError: Names the file and what is wrong with it.
        AdapterError: A repository cannot be reached; or the model does not have this adapter, or has several active
            ones and no name was given.
        ConfigError: The source is neither a folder nor an id.
    """
    if isinstance(source, Adapter):
        return source
    if isinstance(source, PeftModel):
        return _live(source, None)
    if isinstance(source, tuple):
        return _live(*source)
    folder, _ = locate(source, revision=revision, token=token)
    return _adapter(os.fspath(source), read_config(folder), load_file(folder / WEIGHTS))


def new_folder(folder: str | os.PathLike[str]) -> Path:
    """The path of a folder to write an adapter to.

    Raises:
        AdapterError: There is something at that place already.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise AdapterError(f"{target} exists and is not empty: choose a new folder for the adapter.")
    return target


def _live(model: PeftModel, name: str | None) -> Adapter:
    if name is None:
        if len(model.active_adapters) != 1:
            raise AdapterError(f"{len(model.active_adapters)} adapters are active: pass (model, name) of one.")
        name = model.active_adapters[0]
    config = model.peft_config.get(name)
    if not isinstance(config, SurgicalConfig):
        there = ", ".join(key for key, other in model.peft_config.items() if isinstance(other, SurgicalConfig))
        raise AdapterError(f"The model has no surgical adapter {name!r}; it has {there or 'none'}.")
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    # After the tensors, with which the base's fingerprint is taken. A hash of a file says nothing about what is live.
    plain = {key: value for key, value in config.to_dict().items() if key not in ("peft_type", "weights_sha256")}
    copied = {key: value.detach().cpu().clone() for key, value in tensors.items()}
    return _adapter(name, SurgicalConfig(**plain), copied)


def _adapter(name: str, config: SurgicalConfig, tensors: Mapping[str, torch.Tensor]) -> Adapter:
    parts: dict[str, dict[str, torch.Tensor]] = {"delta": {}, "stats": {}, "whole": {}}
    for key, tensor in tensors.items():
        plain = key.removeprefix(PEFT_PREFIX)
        path, own, rest = plain.rpartition(_OWN)
        kind, _, leaf = rest.partition(".")
        parts[kind if own else "whole"][path + leaf if own else plain] = tensor
    place = {tensor: i for i, tensor in enumerate(config.tensor_names or ())}  # the file sorts them by dtype and key
    ordered = {
        kind: dict(sorted(found.items(), key=lambda item: place.get(item[0], 0))) for kind, found in parts.items()
    }
    return Adapter(name, config, ordered["delta"], ordered["stats"], ordered["whole"])


def _key(name: str, kind: str) -> str:
    path, dot, leaf = name.rpartition(".")
    return f"{PEFT_PREFIX}{path}{dot}{_OWN}{kind}.{leaf}"
