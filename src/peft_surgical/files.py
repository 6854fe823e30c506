"""Adapter files: fingerprint of the base, verification, and replacing them atomically.

An adapter is two files, its weights and its config, and a kill between writing the two would leave one adapter's
weights beside another's config. So `commit` renames files that are already complete, in three steps::

    1. the new config, with the old one inside as "superseded"     weights: old -> the old config applies
    2. the new weights                                             weights: new -> the new config applies
    3. the new config alone

Each step is atomic and leaves a whole adapter: a reader compares the SHA-256 of the weights with what the configs say.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError, safe_open

from .errors import AdapterFileError, BaseMismatchError
from .keys import CONFIG, PICKLE, WEIGHTS, neutral_key

MAX_BYTES = 16 * 2**20
"""The largest config file that is read: some hundred times what the tensors of a large network need."""
Held = Mapping[str, tuple[tuple[int, ...], bool]]
"""What an adapter file holds: key -> shape, and whether it is floating point."""
_HASH_DIGITS = 16  # 64 bits a tensor: a guard against the wrong base, not against an attacker who forges one
_SHOWN = 3  # how many tensors an error names before it counts the rest


def printable(value: Any) -> str:
    """A value for a message: of bounded length, and printable everywhere."""
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # too deep; too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}..."


def fingerprint(base: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Hash each base tensor's name, shape, dtype and bytes: name -> 16 hexadecimal digits of SHA-256.

    Adding a delta to the wrong base gives silent garbage: same shapes, other values. One hash a tensor (instead of one
    for all) lets the error name the tensors that differ.
    """
    return {name: _hash(name, tensor) for name, tensor in base.items()}


def _hash(name: str, tensor: torch.Tensor) -> str:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    flat = full.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(f"{name}|{tuple(full.shape)}|{full.dtype}|".encode())
    digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:_HASH_DIGITS]


def check_base(expected: Mapping[str, str], base: Mapping[str, torch.Tensor], base_name: str | None) -> None:
    """Raise `BaseMismatchError` unless ``base`` has the fingerprint ``expected``.

    Args:
        expected: `fingerprint` of the base that the adapter was trained on.
        base: The tensors of the model at hand, by the same names.
        base_name: What the adapter's config calls its base, for the message.
    """
    wrong = [name for name, tensor in base.items() if _hash(name, tensor) != expected.get(name)]
    if wrong:
        dtypes = sorted({str(base[name].dtype).removeprefix("torch.") for name in wrong})
        raise BaseMismatchError(
            f"This adapter was trained on another base ({base_name or 'unnamed'}): {len(wrong)} of {len(base)} tuned "
            f"tensors differ there, first {shown(wrong)}. Load that base, in the same dtype (here {', '.join(dtypes)}) "
            "and revision; or, if you know that the deltas fit this one, say strict_base=False."
        )


def shown(names: Iterable[str]) -> str:
    """The first few ``names`` and the number of the others, for a message."""
    names = list(names)
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


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


def _check_finite(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
            continue
        # In float32, where a float64 value may be too large, and which 8-bit formats have no check of their own for.
        # Least and largest are NaN where one entry is: one pass, without a second tensor.
        if not all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor.float())):
            raise AdapterFileError(
                f"{where}: {name} holds NaN or Inf. The run that made it diverged (try a smaller learning rate), or "
                "the file is damaged."
            )


def verify_file(path: str | Path, sha256: str | None, keys: Iterable[str], others: bool = False) -> Held:
    """Check an adapter file by itself, before any model is touched: whole, unaltered, complete, finite.

    Args:
        path: A safetensors file.
        sha256: The SHA-256 in its config; None skips that check.
        keys: The `file_key` of every tensor that it must hold.
        others: Whether it may hold other tensors too (those of ``modules_to_save``).

    Raises:
        AdapterFileError: Names the file and what is wrong with it.
    """
    where = str(path)
    try:
        with safe_open(where, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, OSError, ValueError, RuntimeError, struct.error) as error:
        raise AdapterFileError(
            f"{where} cannot be read as safetensors ({error}). It is truncated or damaged: save or download it again."
        ) from error
    _check_names({neutral_key(key) or key for key in tensors if not others or neutral_key(key)}, keys, where)
    for key, tensor in tensors.items():
        delta = not others or neutral_key(key) is not None
        if delta and not tensor.is_floating_point() and not key.endswith("num_batches_tracked"):
            raise AdapterFileError(f"{where}: {key} has dtype {tensor.dtype}; deltas are floating point.")
    _check_finite(tensors, where)
    if sha256 is not None and file_sha256(path) != sha256:
        raise AdapterFileError(
            f"{where} is not the file that its config was saved with (SHA-256 {file_sha256(path)[:12]}..., expected "
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


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, as written beside the weights."""
    return json.dumps(value, indent=2, sort_keys=True)


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` beside ``path`` and rename it into place: a reader sees the old file or the new one."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def commit(stage: Path, target: Path) -> None:
    """Move the adapters in ``stage`` (and in its folders, one per further adapter) to ``target``."""
    for source in sorted({path.parent for path in stage.rglob(CONFIG)}):
        goal = target / source.relative_to(stage)
        goal.mkdir(parents=True, exist_ok=True)
        _replace(source, goal)
    for path in sorted(path for path in stage.rglob("*") if path.is_file()):
        os.replace(path, target / path.relative_to(stage))


def _replace(source: Path, goal: Path) -> None:
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    old = _whole(goal)
    if old is not None:
        write_atomically(goal / CONFIG, canonical_json({**config, "superseded": old}))
    os.replace(source / WEIGHTS, goal / WEIGHTS)
    os.replace(source / CONFIG, goal / CONFIG)


def _whole(folder: Path) -> dict[str, Any] | None:
    """The config that belongs to the weights in ``folder`` now; None where there is no adapter."""
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        return None
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    previous = config.pop("superseded", None)
    # An earlier save was killed before its weights were in place.
    if previous is not None and previous.get("weights_sha256") == file_sha256(folder / WEIGHTS):
        return previous
    return config
