"""An adapter's two files in memory, taken apart and put together."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass
class Files:
    """An adapter's two files, as they will be written."""

    weights: bytes
    config: bytes
    layout: str = "files"

    def write(self, folder: Path) -> None:
        """Write them to a folder, in the place of what is there."""
        for name, content in ((WEIGHTS, self.weights), (CONFIG, self.config)):
            place = folder / name
            if place.is_dir() and not place.is_symlink():
                place.rmdir()
            else:
                place.unlink(missing_ok=True)
            if self.layout == f"no {name}":
                continue
            if self.layout == f"{name} is a folder":
                place.mkdir()
            elif self.layout == f"{name} leads nowhere":
                place.symlink_to(folder / "nothing")
            else:
                place.write_bytes(content)


def split(weights: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a whole file."""
    (length,) = struct.unpack("<Q", weights[:8])
    return json.loads(weights[8 : 8 + length]), weights[8 + length :]


def join(header: Mapping[str, Any] | bytes, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def relaid(header: Mapping[str, Any], tensors: Mapping[str, bytes]) -> bytes:
    """A whole file of these entries and bytes."""
    place, laid = 0, {}
    for key, raw in tensors.items():
        laid[key] = {**header[key], "data_offsets": [place, place + len(raw)]}
        place += len(raw)
    return join(laid, b"".join(tensors.values()))


def parts_of(files: Files) -> tuple[dict[str, Any], dict[str, bytes]]:
    header, data = split(files.weights)
    header.pop("__metadata__", None)
    return header, {key: data[slice(*entry["data_offsets"])] for key, entry in header.items()}


def dump(config: Any) -> bytes:
    return json.dumps(config).encode()


Mutation = Callable[[random.Random, Files], None]
"""Changes the files, by a generator of its own."""
