"""What an adapter's config may hold, checked field by field: it may come from anybody.

A value of the wrong type would fail later and elsewhere, as an AttributeError deep inside, or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import TaskType

from .errors import AdapterFileError, ConfigError

MAX_BYTES = 16 * 2**20
"""Of a config file: some hundred times what the names and hashes of a large network's tensors take."""


# --- fields ---


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike))


def _is_names(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(name, str) for name in value)


def _is_terms(value: Any) -> bool:
    return _is_text(value) or _is_names(value)


def _is_unique(value: Any) -> bool:
    return _is_names(value) and len(set(value)) == len(value)


def _is_hashes(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(text, str) for pair in value.items() for text in pair)


def _is_scale(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= torch.finfo(torch.float32).max  # in which deltas are scaled; False for NaN


_OPTIONAL: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "target": (_is_terms, "a target, or a list of them"),
    "delta_dtype": (_is_text, "the name of a dtype"),
    "blocks": (lambda value: isinstance(value, Mapping), "a mapping of blocks to paths"),
    "target_modules": (_is_terms, "a regex, or a list of names"),
    "exclude_modules": (_is_terms, "a regex, or a list of names"),
    "modules_to_save": (_is_names, "a list of names"),
    "selection": (lambda value: isinstance(value, Mapping), "a mapping"),
    "tensor_names": (_is_unique, "a list of names, each of them once"),
    "base_fingerprint": (_is_hashes, "a mapping of names to hashes"),
    "weights_sha256": (_is_text, "a hash"),
    "auto_mapping": (lambda value: isinstance(value, Mapping), "a mapping"),
    "base_model_name_or_path": (_is_path, "a name or a path"),
    "revision": (_is_text, "a name"),
    "peft_version": (_is_text, "a version"),
}
_REQUIRED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "norm_stats": (_is_text, "the name of a policy"),
    "scale": (_is_scale, "a number, finite in float32: 0 is the base, 1 the tuned model"),
    "inference_mode": (lambda value: isinstance(value, bool), "True or False"),
}


def check_fields(fields: Mapping[str, Any]) -> None:
    """Raise `ConfigError` unless every field has a value of its type.

    Args:
        fields: Name -> value; what is not known here is not looked at.
    """
    for name, value in fields.items():
        required, optional = _REQUIRED.get(name), _OPTIONAL.get(name)
        fits, what = required or optional or (None, "")
        if fits is not None and not (fits(value) or (value is None and required is None)):
            raise ConfigError(f"{name}={_short(value)} is not {what}.")
    task = fields.get("task_type")
    if task is not None and task not in list(TaskType):
        # PEFT's words, which its callers match.
        choices = ", ".join(TaskType)
        raise ConfigError(f"Invalid task type: {_short(task)}. Must be one of the following task types: {choices}.")


def _short(value: Any) -> str:
    """A value for a message: of bounded length, and printable everywhere."""
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # too deep; too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}..."


# --- files ---


def read_object(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a config file.

    Raises:
        AdapterFileError: The file is too large, is no JSON object, or is of no known method.
    """
    place = Path(file)
    if (size := place.stat().st_size) > MAX_BYTES:
        raise AdapterFileError(f"{place} has {size:,} bytes, where a config has at most {MAX_BYTES:,}.")
    try:
        plain = json.loads(place.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number too long to convert, nested too deeply
        raise AdapterFileError(
            f"{place} cannot be read as JSON ({_reason(error)}). It is truncated or damaged: save or download it again."
        ) from error
    if not isinstance(plain, dict):
        raise AdapterFileError(f"{place} holds {_short(plain)}, not the fields of an adapter's config.")
    if "self" in plain:  # a name that no field can have, and that every method has an argument of
        raise AdapterFileError(f"{place} has a field 'self', which no config has.")
    found = plain.get("peft_type")
    if not isinstance(found, str) or found not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise AdapterFileError(
            f"{place}: peft_type={_short(found)} is no method that PEFT knows here; a surgical adapter's is "
            "'SURGICAL'. Save or download it again, or install what it was made with."
        )
    return plain


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]
