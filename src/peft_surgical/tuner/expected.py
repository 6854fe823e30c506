"""What an adapter file has to hold for a base: names, shapes and kinds, compared before anything is attached.

PEFT looks for them one after the other while the adapter is on the model already, and a miss there is a KeyError.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from ..config import SurgicalConfig
from ..errors import AdapterError, AdapterFileError, BaseMismatchError
from ..files import shown
from ..keys import HOLDER, PEFT_PREFIX
from .attach import join
from .support import ModulePlan

_HOLDERS = (HOLDER, "surgical_delta", "surgical_stats", "default")  # the last: PEFT's name of an adapter without one
_NO_FORWARD = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)  # PEFT's own list
_GENERATES = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def check_held(modules: Mapping[str, nn.Module], entries: Sequence[ModulePlan], config: SurgicalConfig) -> None:
    """Raise unless the file that was read with ``config`` holds what the base needs; a no-op for other configs.

    Args:
        modules: Path -> module of the base without adapters.
        entries: What the adapter touches.
        config: Read from disk, with what was found in its file.

    Raises:
        AdapterFileError: Names are missing or surplus, shapes or kinds differ, or ``modules_to_save`` cannot be saved.
        AdapterError: Shapes or kinds differ in a module that the adapter holds whole.
        BaseMismatchError: The config's task is one that this base has no methods for.
    """
    if (held := config.held) is None:
        return
    root = modules[""]
    if config.task_type in _GENERATES and not hasattr(root, "prepare_inputs_for_generation"):
        raise BaseMismatchError(
            f"The adapter is for {config.task_type}, and {type(root).__name__} generates nothing: load the base "
            f"{config.base_model_name_or_path or 'that it was made for'}."
        )
    expected: dict[str, torch.Tensor] = {}
    for entry in entries:
        place = f"{PEFT_PREFIX}{join(entry.path, HOLDER)}"
        expected |= {f"{place}.surgical_delta.{name}": getattr(entry.module, name) for name in entry.parameters}
        expected |= {f"{place}.surgical_stats.{name}": getattr(entry.module, name) for name in entry.statistics}
    whole: dict[str, torch.Tensor] = {}
    for path in _saved_whole(modules, entries, config.modules_to_save or ()):
        whole |= {f"{PEFT_PREFIX}{path}.{key}": value for key, value in modules[path].state_dict().items()}
    _check_names(held, {**expected, **whole})
    _check_kinds(held, expected, AdapterFileError, "The adapter belongs to another architecture or head")
    # The file is right and so is the base, but for a module that the adapter brings.
    _check_kinds(held, whole, AdapterError, "The adapter holds that module whole; open the base with one like it")


def _check_names(held: Iterable[str], expected: Iterable[str]) -> None:
    missing, surplus = sorted(set(expected) - set(held)), sorted(set(held) - set(expected))
    if missing or surplus:
        parts = [f"misses {shown(missing)}"] * bool(missing) + [f"has besides {shown(surplus)}"] * bool(surplus)
        raise AdapterFileError(
            f"For this base the adapter file {' and '.join(parts)}. Load the base that is named in its config."
        )


def _check_kinds(
    held: Mapping[str, tuple[tuple[int, ...], bool]],
    expected: Mapping[str, torch.Tensor],
    error: type[AdapterError],
    why: str,
) -> None:
    for key, tensor in expected.items():
        shape, floating = held[key]
        if shape != tuple(tensor.shape):
            raise error(f"{key} has shape {shape}, the base's tensor has {tuple(tensor.shape)}. {why}.")
        if floating != tensor.is_floating_point():
            kinds = ("integer", "floating point")
            raise error(f"{key} is {kinds[floating]} in the file, and {kinds[not floating]} in the base. {why}.")


def _saved_whole(
    modules: Mapping[str, nn.Module], entries: Sequence[ModulePlan], saved: Sequence[str]
) -> Sequence[str]:
    """The paths of the modules that PEFT will put wrappers around: those that end in one of the texts."""
    if bad := [text for text in saved if not text or any(name.endswith(text) for name in _HOLDERS)]:
        raise AdapterFileError(f"modules_to_save={bad[0]!a} names parts of every adapter, not a module of a base.")
    found = [path for path in modules if saved and path.endswith(tuple(saved))]
    for path in found:
        if isinstance(modules[path], _NO_FORWARD):
            kind = type(modules[path]).__name__
            raise AdapterFileError(f"modules_to_save names {path}, a {kind}, which has no forward of its own.")
        inner = [other for other in found if other.startswith(f"{path}.")]
        tuned = [entry.path for entry in entries if entry.path == path or entry.path.startswith(f"{path}.")]
        if inner or tuned:
            raise AdapterFileError(
                f"modules_to_save names {path}, and the config also {'tunes' if tuned else 'names'} "
                f"{shown(tuned or inner)}: no adapter that was saved does."
            )
    return found
