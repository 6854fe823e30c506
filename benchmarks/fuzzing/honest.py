"""Another reading of the same files, by other code: numpy and the format's description."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .files import Files, split

NUMBERS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}
EIGHT_BITS = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def tensors_in(weights: bytes) -> dict[str, Tensor]:
    """What a safetensors file holds, by its description: 8 bytes of length, JSON, values."""
    header, data = split(weights)
    found = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        raw = data[begin:end]
        if entry["dtype"] == "BF16":
            wide = np.frombuffer(raw, "<u2").astype("<u4") << 16
            tensor = torch.from_numpy(wide.view("<f4").copy()).to(torch.bfloat16)
        elif entry["dtype"] in EIGHT_BITS:
            tensor = torch.tensor(list(raw), dtype=torch.uint8).view(EIGHT_BITS[entry["dtype"]]).float()
        elif entry["dtype"] == "BOOL":
            tensor = torch.from_numpy(np.frombuffer(raw, "?").copy())
        else:
            tensor = torch.from_numpy(np.frombuffer(raw, NUMBERS[entry["dtype"]]).copy())
        found[key] = tensor.reshape(entry["shape"])
    return found


def honest(files: Files, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name -> value of every tensor of the base with this adapter on it."""
    config = json.loads(files.config)
    journal = config.get("superseded")
    if isinstance(journal, dict) and journal.get("weights_sha256") == hashlib.sha256(files.weights).hexdigest():
        config = journal
    scale = float(config.get("scale", 1.0))
    found = {name: value.clone() for name, value in base.items()}
    for key, tensor in tensors_in(files.weights).items():
        path, mark, rest = key.removeprefix("base_model.model.").rpartition("surgery.surgical_")
        if not mark:
            name = key.removeprefix("base_model.model.")
            found[name] = tensor.to(base[name].dtype)
            continue
        what, _, leaf = rest.partition(".")
        name = path + leaf
        own = base[name]
        if what == "delta":
            wide = torch.float64 if config.get("delta_dtype") == "float64" else own.dtype
            found[name] = torch.add(own, tensor.to(wide), alpha=scale).to(own.dtype) if scale else own
        elif scale == 1 or not own.is_floating_point():
            found[name] = tensor.to(own.dtype) if scale else own
        elif scale:
            found[name] = torch.lerp(own, tensor.to(own.dtype), scale)
    return found


def read_through(network: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Name -> value of every tensor, as a forward reads it now."""
    found = {}
    for name in names:
        owner: Any = network
        *path, leaf = name.split(".")
        for part in path:
            owner = owner._modules[part]
            # PEFT's wrapper of a module that is saved whole.
            owner = getattr(owner, "modules_to_save", {"default": owner})["default"]
        found[name] = getattr(owner, leaf).detach()
    return found


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts are equal, name by name and bit by bit."""

    def bits(tensor: Tensor) -> bytes:
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    def equal(a: Tensor, b: Tensor) -> bool:
        return a.shape == b.shape and a.dtype == b.dtype and bits(a) == bits(b)

    return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
