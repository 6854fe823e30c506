"""What an adapter's folder holds, read without its base: what was tuned, how far it moved, and how large it is."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..blocks import Name, parse
from ..blocks.parsing import NUMBERED
from ..config import SurgicalConfig
from ..errors import AdapterFileError
from ..files import file_sha256
from ..keys import CONFIG, HOLDER, PEFT_PREFIX, PICKLE, WEIGHTS, file_key

_DELTA = f"{HOLDER}.surgical_delta."


@dataclass(frozen=True)
class DeltaSize:
    """One tuned tensor: its name in the base, its delta's number of values and L2 norm, before scaling."""

    name: str
    parameters: int
    norm: float


@dataclass(frozen=True)
class Part:
    """The deltas of one block, or of one module where the file does not say which blocks there are."""

    name: str
    deltas: tuple[DeltaSize, ...]

    @property
    def parameters(self) -> int:
        """Number of values."""
        return sum(delta.parameters for delta in self.deltas)

    @property
    def norm(self) -> float:
        """L2 norm of all deltas together."""
        return sum(delta.norm**2 for delta in self.deltas) ** 0.5


@dataclass(frozen=True)
class Contents:
    """An adapter on disk.

    Attributes:
        folder: Where it lies.
        base: What its config calls its base, or None.
        target: The target as it was written; None for PEFT's ``target_modules``.
        norm_stats: The norm policy.
        scale: Factor of the deltas.
        dtypes: The dtypes of the deltas in the file.
        bytes: Size of the weights and the config together.
        file_bytes: Size of the weights.
        sha256: Of the weights' file.
        parts: The deltas, by block or module.
        parts_are: ``"block"`` or ``"module"``.
        statistics: Number of normalisation statistics that it holds.
        modules_to_save: Modules that it holds whole.
    """

    folder: str
    base: str | None
    target: str | list[str] | None
    norm_stats: str
    scale: float
    dtypes: tuple[str, ...]
    bytes: int
    file_bytes: int
    sha256: str
    parts: tuple[Part, ...]
    parts_are: str
    statistics: int
    modules_to_save: tuple[str, ...]

    @property
    def deltas(self) -> tuple[DeltaSize, ...]:
        """All deltas, those with the largest norm first."""
        return tuple(sorted((d for part in self.parts for d in part.deltas), key=lambda d: -d.norm))

    def to_dict(self, top: int | None = None) -> dict[str, Any]:
        """Plain JSON values; ``top`` limits the number of single tensors."""
        plain = {name: getattr(self, name) for name in ("folder", "base", "target", "norm_stats", "scale", "bytes")}
        plain["sha256"] = self.sha256
        rows = [
            {"name": p.name, "tensors": len(p.deltas), "parameters": p.parameters, "norm": p.norm} for p in self.parts
        ]
        return plain | {
            "dtypes": list(self.dtypes),
            f"{self.parts_are}s": rows,
            "largest": [vars(delta) for delta in self.deltas[:top]],
            "statistics": self.statistics,
            "modules_to_save": list(self.modules_to_save),
        }


def read_config(folder: str | os.PathLike[str], strict_base: bool = True) -> SurgicalConfig:
    """The config of the adapter in a folder, whose file has been verified: whole, unaltered, complete, finite.

    Args:
        folder: That ``save_pretrained`` wrote.
        strict_base: As in `SurgicalConfig`.

    Raises:
        AdapterFileError: If there is no adapter, it is another method's or a pickle, or its file is not whole.
    """
    place = Path(folder)
    if missing := [name for name in (CONFIG, WEIGHTS) if not (place / name).is_file()]:
        what = f"has no {missing[0]}" if place.is_dir() else "is no folder"
        if (place / PICKLE).is_file():
            what += f", only {PICKLE}, a pickle, which can run code when it is read and is not read here"
        raise AdapterFileError(
            f"{place} {what}: pass a folder that save_pretrained wrote (peft-surgical pull fetches one from the Hub)"
        )
    try:
        config = SurgicalConfig.from_pretrained(place, strict_base=strict_base)
    except AdapterFileError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterFileError(f"{place / CONFIG} cannot be read ({error}): save or download it again") from error
    if not isinstance(config, SurgicalConfig):
        method = getattr(config.peft_type, "value", config.peft_type)
        raise AdapterFileError(f"{place} is a {method} adapter: only surgical ones are read here")
    return config


def contents_of(folder: str | os.PathLike[str]) -> Contents:
    """Read and verify the adapter in a folder.

    Raises:
        AdapterFileError: If there is none, it is another method's, or its file is not whole.
    """
    place = Path(folder)
    config = read_config(place)
    names = config.tensor_names or []
    deltas, dtypes, statistics = [], set(), 0
    with safe_open(place / WEIGHTS, framework="pt") as file:
        by_key = {file_key(name): name for name in names}
        for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            plain = key.removeprefix(PEFT_PREFIX)
            name = by_key.get(plain.replace(_DELTA, f"{HOLDER}.", 1)) if _DELTA in plain else None
            if name is not None:
                tensor = file.get_tensor(key)
                deltas.append(DeltaSize(name, tensor.numel(), tensor.double().norm().item()))
                dtypes.add(str(tensor.dtype).removeprefix("torch."))
            elif f"{HOLDER}.surgical_stats." in plain:
                statistics += 1
    order = {name: i for i, name in enumerate(names)}
    deltas.sort(key=lambda delta: order[delta.name])
    grouping, kind = _grouping([delta.name for delta in deltas], config)
    grouped: dict[str, list[DeltaSize]] = {}
    for delta in deltas:
        grouped.setdefault(grouping[delta.name], []).append(delta)
    return Contents(
        folder=str(place),
        base=config.base_model_name_or_path,
        target=config.target,
        norm_stats=config.norm_stats,
        scale=config.scale,
        dtypes=tuple(sorted(dtypes)),
        bytes=sum((place / name).stat().st_size for name in (CONFIG, WEIGHTS)),
        file_bytes=(place / WEIGHTS).stat().st_size,
        sha256=file_sha256(place / WEIGHTS),
        parts=tuple(Part(name, tuple(members)) for name, members in grouped.items()),
        parts_are=kind,
        statistics=statistics,
        modules_to_save=tuple(config.modules_to_save or ()),
    )


def _grouping(names: Iterable[str], config: SurgicalConfig) -> tuple[Mapping[str, str], str]:
    """Tensor -> the block that holds it, where the config alone tells; else the module."""
    names = list(names)
    if config.blocks is not None:
        holders = {path: block for block, paths in config.blocks.items() for path in paths}
        found = {name: _longest(name, holders) for name in names}
        if all(found.values()):
            return {name: str(block) for name, block in found.items()}, "block"
    if config.target is not None:
        steps = parse(config.target).steps
        # One block as the whole target holds all tensors; of a sum, only the base tells which is whose.
        if len(steps) == 1 and isinstance(steps[0].term, Name) and _is_block(steps[0].term.text):
            return dict.fromkeys(names, steps[0].term.text), "block"
    depth = 1
    paths = [name.rpartition(".")[0].split(".") for name in names]
    while len({tuple(path[:depth]) for path in paths}) == 1 and depth < max(map(len, paths), default=0):
        depth += 1
    return {n: ".".join(path[:depth]) or n for n, path in zip(names, paths, strict=True)}, "module"


def _longest(name: str, holders: Mapping[str, str]) -> str | None:
    parts = name.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((holders[prefix] for prefix in prefixes if prefix in holders), None)


def _is_block(text: str) -> bool:
    return text in ("embedding", "stem", "stage1", "head", "first", "last") or NUMBERED.fullmatch(text) is not None
