"""Adapter files: reading and verification. What writes them is in `folders`.

A file may be replaced by another process between two looks at it. So it is read once, as `Content`: the bytes that are
hashed and checked are the bytes that are used.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError
from safetensors.torch import load

from .errors import AdapterFileError
from .keys import PICKLE, WEIGHTS, neutral_key

MAX_BYTES = 16 * 2**20
"""The largest config file that is read: some hundred times what the tensors of a large network need."""
Held = Mapping[str, tuple[tuple[int, ...], bool]]
"""What an adapter file holds: key -> shape, and whether it is floating point."""
_SHOWN = 3  # how many tensors an error names before it counts the rest


def printable(value: Any) -> str:
    """A value for a message: of bounded length, and printable everywhere."""
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # too deep; too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}..."


def shown(names: Iterable[str], most: int = _SHOWN) -> str:
    """The first few ``names``, ``most`` of them, and the number of the others, for a message."""
    names = list(names)
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def check_tensors(found: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise `AdapterFileError` unless ``found`` has the expected names and shapes and finite values.

    Args:
        found: Name -> tensor of a file or state dict.
        expected: Name -> shape.
        where: What is being read, for the message.
    """
    _check_names(found, expected, where)
    for name, shape in expected.items():
        if tuple(found[name].shape) != tuple(shape):
            raise AdapterFileError(
                f"{where}: {name} has shape {tuple(found[name].shape)}, the base's tensor has {tuple(shape)}. The "
                "adapter belongs to another architecture or head; load it onto the base named in its config."
            )
    _check_finite(found, where)


def differences(found: Iterable[str], expected: Iterable[str]) -> str:
    """Which of the expected names are missing and which are surplus, for a message; "" where none is."""
    present, needed = {*found}, {*expected}
    missing, surplus = sorted(needed - present), sorted(present - needed)
    return " and ".join(
        [f"misses {shown(missing)}"] * bool(missing) + [f"has besides {shown(surplus)}"] * bool(surplus)
    )


def _check_names(found: Iterable[str], expected: Iterable[str], where: str) -> None:
    if wrong := differences(found, expected):
        raise AdapterFileError(
            f"{where}: the file {wrong}. It is not the file that was saved with this config: save or download both "
            "again."
        )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds no NaN and no Inf; always true of integers and on the meta device."""
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return True
    # In float32, where a float64 value may be too large, and which 8-bit formats have no check of their own for.
    # Least and largest are NaN where one entry is: one pass, without a second tensor.
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor.float()))


def _check_finite(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise AdapterFileError(
                f"{where}: {name} holds NaN or Inf. The run that made it diverged (try a smaller learning rate), or "
                "the file is damaged."
            )


class Content:
    """An adapter file as it was when it was read.

    Attributes:
        path: The file.
        sha256: SHA-256 of its bytes.
        tensors: Key -> tensor, on the CPU.
        stamp: What tells this file from another one that took its place.
        again: Finds the file that whoever looks for it now will find; None if there is none.
    """

    again: Callable[[], Path | None] = staticmethod(lambda: None)

    def __init__(self, path: str | Path) -> None:
        """Read a safetensors file; an `AdapterFileError` where it is none."""
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self.stamp = stamp_of(os.fstat(file.fileno()))
                content = file.read()
            self.sha256 = hashlib.sha256(content).hexdigest()
            self.tensors: dict[str, torch.Tensor] = load(content)
        except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, OverflowError, struct.error) as error:
            raise AdapterFileError(
                f"{path} cannot be read as safetensors ({error}). It is truncated or damaged: save or download it "
                "again."
            ) from error

    def __deepcopy__(self, memo: Any) -> Content:
        return self  # a config that carries it is copied often, and nobody changes it

    def is_replaced(self) -> bool:
        """Whether who looks for the file now will find another one, or none."""
        try:
            path = self.again()
            return path is None or not path.samefile(self.path) or stamp_of(path.stat()) != self.stamp
        except OSError:
            return True

    def settle(self, loaded: dict[str, torch.Tensor], key_of: Callable[[str], str]) -> None:
        """Put the tensors that were verified in place of others that somebody has read from another file meanwhile.

        Args:
            loaded: Key -> tensor, as they are about to be loaded: read from the file once more, or a user's own.
            key_of: The key in the file, for a key of ``loaded``.

        Raises:
            AdapterFileError: The file has been replaced more than once, so that nothing tells what was read.
        """
        if not self.is_replaced():
            return
        try:
            path = self.again()
            others = None if path is None else Content(path).tensors
        except (OSError, AdapterFileError):
            others = None
        pairs = {key: key_of(key) for key in loaded if key_of(key) in self.tensors}

        def holds(tensors: Mapping[str, torch.Tensor]) -> bool:
            same = (name in tensors and torch.equal(loaded[key].cpu(), tensors[name]) for key, name in pairs.items())
            return {*pairs.values()} == {*self.tensors} and all(same)

        if holds(self.tensors):
            return
        if others is None or not holds(others):
            raise AdapterFileError(
                f"{self.path} was replaced while it was being loaded: load it again. Or, if these tensors are your "
                "own, load them once more: now they are taken as they are."
            )
        loaded.update({key: self.tensors[name].to(loaded[key].device) for key, name in pairs.items()})
        for key in [key for key in loaded if key not in pairs and key_of(key) in others]:
            del loaded[key]  # the other file holds more tensors


def stamp_of(found: os.stat_result) -> tuple[int, ...]:
    """What two files, and one file before and after it was written, differ in."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def verify_file(file: str | Path | Content, sha256: str | None, keys: Iterable[str], others: bool = False) -> Held:
    """Check an adapter file by itself, before any model is touched: whole, unaltered, complete, finite.

    Args:
        file: A safetensors file, or what was read from one.
        sha256: The SHA-256 in its config; None skips that check.
        keys: The `file_key` of every tensor that it must hold.
        others: Whether it may hold other tensors too (those of ``modules_to_save``).

    Raises:
        AdapterFileError: Names the file and what is wrong with it.
    """
    content = file if isinstance(file, Content) else Content(file)
    where, tensors = str(content.path), content.tensors
    _check_names({neutral_key(key) or key for key in tensors if not others or neutral_key(key)}, keys, where)
    for key, tensor in tensors.items():
        delta = not others or neutral_key(key) is not None
        if delta and not tensor.is_floating_point() and not key.endswith("num_batches_tracked"):
            raise AdapterFileError(f"{where}: {key} has dtype {tensor.dtype}; deltas are floating point.")
    _check_finite(tensors, where)
    if sha256 is not None and content.sha256 != sha256:
        raise AdapterFileError(
            f"{where} is not the file that its config was saved with (SHA-256 {content.sha256[:12]}..., expected "
            f"{sha256[:12]}...). It was altered or replaced: save or download both again."
        )
    return {key: (tuple(tensor.shape), tensor.is_floating_point()) for key, tensor in tensors.items()}


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):  # hashlib.file_digest is new in Python 3.11
            digest.update(chunk)
    return digest.hexdigest()


def find_weights(source: str, subfolder: str | None, options: Mapping[str, Any]) -> Path | None:
    """The adapter file in a folder (None where there is none) or, fetched, of a Hub repository.

    Args:
        source: The folder, or the repository's id.
        subfolder: Folder inside it.
        options: Those of `hf_hub_download` among them are used.

    Raises:
        AdapterFileError: There is only a pickle, or nothing to fetch.
    """
    folder = Path(source, subfolder or "")
    if folder.is_dir():
        if (folder / WEIGHTS).is_file():
            return folder / WEIGHTS
        if (folder / PICKLE).exists():
            raise AdapterFileError(
                f"{folder} holds only {PICKLE}, a pickle, which can run code when it is read. Ask its author for "
                f"{WEIGHTS}; this package reads and writes nothing else."
            )
        return None
    download = {
        key: value
        for key, value in options.items()
        if key in ("revision", "token", "cache_dir", "local_files_only", "force_download") and value is not None
    }
    try:
        return Path(hf_hub_download(source, WEIGHTS, subfolder=subfolder, **download))
    except LocalEntryNotFoundError as error:  # it says nothing about what the repository has
        raise AdapterFileError(
            f"{WEIGHTS} of {source} could not be fetched from the Hub, and is not in the cache: go online (without "
            "HF_HUB_OFFLINE) and try again."
        ) from error
    except EntryNotFoundError as error:
        raise AdapterFileError(f"{source} on the Hub has no {WEIGHTS}; nothing else is loaded.") from error


def read_object(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a config file; raises `AdapterFileError` where there is none of a method that PEFT knows."""
    place = Path(file)
    if (size := place.stat().st_size) > MAX_BYTES:
        raise AdapterFileError(f"{place} has {size:,} bytes, where a config has at most {MAX_BYTES:,}.")
    try:
        plain = json.loads(place.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number too long to convert, nested too deeply
        deep = isinstance(error, RecursionError)
        reason = "nested too deeply" if deep else " ".join(str(error).split())[:200]
        raise AdapterFileError(
            f"{place} cannot be read as JSON ({reason}). It is truncated or damaged: save or download it again."
        ) from error
    if not isinstance(plain, dict):
        raise AdapterFileError(f"{place} holds {printable(plain)}, not the fields of an adapter's config.")
    if "self" in plain:  # no field can have this name: it is an argument of every method
        raise AdapterFileError(f"{place} has a field 'self', which no config has.")
    found = plain.get("peft_type")
    if not isinstance(found, str) or found not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise AdapterFileError(
            f"{place}: peft_type={printable(found)} is no method that PEFT knows here; a surgical adapter's is "
            "'SURGICAL'. Save or download it again, or install what it was made with."
        )
    return plain
