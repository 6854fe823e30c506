"""An adapter as plain data: its config and tensors by name, from a folder, the Hub or a live model, and back to disk.

Reading needs no base. What is read has been verified as `PeftModel.from_pretrained` verifies it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file

from ..blocks import Name, parse
from ..blocks.parsing import NUMBERED
from ..config import SurgicalConfig
from ..errors import AdapterError, AdapterFileError
from ..files import file_sha256
from ..folders import commit, staging
from ..keys import CONFIG, DELTA, PEFT_PREFIX, PICKLE, STATISTIC, WEIGHTS, saved_key, split_key
from .remote import download

_BLOCKS = ("embedding", "stem", "stage1", "head", "first", "last")


@dataclass(frozen=True)
class Adapter:
    """An adapter as it is on disk, or would be if it were saved now.

    Attributes:
        name: Where it is from: a folder, a Hub id, or its name on a live model.
        config: Its config, with the resolved names of its tensors and the fingerprint of their base values.
        deltas: Tensor name -> delta, before scaling, in the dtype of the file.
        statistics: Buffer name -> value of the normalisation statistics that it owns.
        whole: Tensor name -> value of everything in its ``modules_to_save``.
        folder: Where its files are on this machine; None unless it was read from there.
        commit: Hash of the Hub's commit that it was fetched from; None unless it was.
    """

    name: str
    config: SurgicalConfig
    deltas: Mapping[str, torch.Tensor]
    statistics: Mapping[str, torch.Tensor]
    whole: Mapping[str, torch.Tensor]
    folder: Path | None = None
    commit: str | None = None

    @property
    def label(self) -> str:
        """Its name as others may see it: the last part of a folder's path, without the rest."""
        return Path(self.name).resolve().name if Path(self.name).is_dir() else self.name

    def scaled(self) -> dict[str, torch.Tensor]:
        """Tensor name -> scale * delta, which is what is added to the base; at least float32."""
        wide = {name: delta.to(torch.promote_types(delta.dtype, torch.float32)) for name, delta in self.deltas.items()}
        return wide if (scale := self.config.scale) == 1 else {name: delta * scale for name, delta in wide.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors that it brings."""
        return (*self.deltas, *self.statistics, *self.whole)

    def tuned(self, name: str, base: torch.Tensor) -> torch.Tensor:
        """What a forward with this adapter reads for a tensor whose base value this is, perhaps in a wider dtype."""
        scale, delta = self.config.scale, self.deltas.get(name)
        if delta is not None:
            return torch.add(base, delta.to(base.device, torch.promote_types(delta.dtype, torch.float32)), alpha=scale)
        own = self.whole.get(name, self.statistics.get(name, base)).to(base.device)
        partly = name in self.statistics and scale != 1 and own.is_floating_point()
        return torch.lerp(base, own.to(base.dtype), scale) if partly else own

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Its tensors by the keys of an adapter file."""
        found = {saved_key(name, DELTA): delta for name, delta in self.deltas.items()}
        found |= {saved_key(name, STATISTIC): value for name, value in self.statistics.items()}
        found |= {PEFT_PREFIX + name: value for name, value in self.whole.items()}
        return {key: value.detach().cpu().contiguous() for key, value in found.items()}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write it to a new folder, from which ``PeftModel.from_pretrained`` loads it.

        Raises:
            AdapterError: If there is something at that place already.
        """
        target = new_folder(folder)
        with staging(target) as stage:
            save_file(self.state_dict(), stage / WEIGHTS, metadata={"format": "pt"})
            self.config.save_pretrained(stage)
            commit(stage, target)

    @property
    def sha256(self) -> str | None:
        """SHA-256 of the file of weights that it was read from; None for what was not read from one."""
        if self.folder is None:
            return None
        return self.config.weights_sha256 or file_sha256(self.folder / WEIGHTS)

    def summary(self) -> dict[str, Any]:
        """What it holds, as plain JSON values: what was tuned, how far it moved (L2 norms before scaling), its size.

        The deltas are grouped under ``blocks``, or under ``modules`` where the config does not tell the blocks.
        ``bytes`` is the size of weights and config together, ``file_bytes`` that of the weights; ``largest`` lists all
        deltas, those with the largest norm first.

        Raises:
            AdapterError: It is not on disk.
        """
        if self.folder is None:
            raise AdapterError(f"the adapter {self.name!r} is not on disk: save it, and read it from there")
        rows = [
            {"name": name, "parameters": delta.numel(), "norm": delta.double().norm().item()}
            for name, delta in self.deltas.items()
        ]
        group_of, kind = _grouping(self.deltas, self.config)
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            groups.setdefault(group_of[row["name"]], []).append(row)
        file_bytes = (self.folder / WEIGHTS).stat().st_size
        return {
            "folder": str(self.folder),
            "base": self.config.base_model_name_or_path,
            "target": self.config.target,
            "norm_stats": self.config.norm_stats,
            "scale": self.config.scale,
            "bytes": file_bytes + (self.folder / CONFIG).stat().st_size,
            "file_bytes": file_bytes,
            "sha256": self.sha256,
            "dtypes": sorted({str(delta.dtype).removeprefix("torch.") for delta in self.deltas.values()}),
            "tensors": len(rows),
            "parameters": sum(row["parameters"] for row in rows),
            kind: [
                {
                    "name": name,
                    "tensors": len(members),
                    "parameters": sum(row["parameters"] for row in members),
                    "norm": sum(row["norm"] ** 2 for row in members) ** 0.5,
                }
                for name, members in groups.items()
            ],
            "largest": sorted(rows, key=lambda row: -row["norm"]),
            "statistics": len(self.statistics),
            "modules_to_save": list(self.config.modules_to_save or ()),
        }


AdapterSource: TypeAlias = str | os.PathLike[str] | Adapter | PeftModel | tuple[PeftModel, str]
"""What is read as an adapter: a folder, a Hub id, an `Adapter`, a model (its active adapter), or (model, name)."""


def read_adapter(source: AdapterSource, *, revision: str | None = None, token: str | bool | None = None) -> Adapter:
    """Read an adapter, verified: whole, unaltered, complete, finite.

    Args:
        source: A folder that ``save_pretrained`` wrote, a Hub id, or an adapter of a live model.
        revision: A branch, a tag or a commit, for a Hub id.
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
    folder, oid = locate(source, revision=revision, token=token)
    config = read_config(folder)
    content, config.content = config.content, None
    assert content is not None  # read_config asks for the file
    return _adapter(os.fspath(source), config, content.tensors, folder, oid)


def locate(
    source: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> tuple[Path, str | None]:
    """The folder of an adapter, and the commit that `fetch` found; None for a folder that was given."""
    if Path(source).is_dir():
        return Path(source), None
    folder = fetch(os.fspath(source), revision, token)
    return folder, folder.name


def fetch(repo: str, revision: str | None = None, token: str | bool | None = None, force: bool = False) -> Path:
    """`download` of a repository's adapter, verified; an `AdapterFileError` where it is not whole."""
    folder = download(repo, revision, token, force)
    try:
        read_config(folder)
    except AdapterFileError as error:
        raise AdapterFileError(f"{repo}: {error} (force=True fetches it again)") from error
    return folder


def read_config(folder: str | os.PathLike[str], strict_base: bool = True) -> SurgicalConfig:
    """The config of the adapter in a folder, whose file has been verified: whole, unaltered, complete, finite.

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


def new_folder(folder: str | os.PathLike[str]) -> Path:
    """The path of a folder to write to; an `AdapterError` where there is something at that place already."""
    target = Path(os.path.expanduser(folder))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise AdapterError(f"{target} exists and is not empty: choose a new folder.")
    return target


def chosen(model: PeftModel, name: str | None) -> str:
    """The name of a live model's surgical adapter; None stands for the only active one.

    Raises:
        AdapterError: The model does not have this adapter, or has several active ones and no name was given.
    """
    names = model.active_adapters if name is None else [name]
    if len(names) != 1:
        raise AdapterError(
            f"{len(names)} adapters are active: pass (model, name) of one, or adapter_name= where one is pushed."
        )
    there = [key for key, config in model.peft_config.items() if isinstance(config, SurgicalConfig)]
    if names[0] not in there:
        raise AdapterError(f"The model has no surgical adapter {names[0]!r}; it has {', '.join(there) or 'none'}.")
    return names[0]


def _live(model: PeftModel, name: str | None) -> Adapter:
    name = chosen(model, name)
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    # After the tensors, with which the base's fingerprint is taken. A hash of a file says nothing about what is live.
    config = model.peft_config[name].to_dict()
    plain = {key: value for key, value in config.items() if key not in ("peft_type", "weights_sha256")}
    copied = {key: value.detach().cpu().clone() for key, value in tensors.items()}
    return _adapter(name, SurgicalConfig(**plain), copied)


def _adapter(name: str, config: SurgicalConfig, tensors: Mapping[str, torch.Tensor], *place: Any) -> Adapter:
    parts: dict[str | None, dict[str, torch.Tensor]] = {DELTA: {}, STATISTIC: {}, None: {}}
    for key, tensor in tensors.items():
        kind, plain = split_key(key)
        parts[kind][plain] = tensor
    order = {tensor: i for i, tensor in enumerate(config.tensor_names or ())}  # the file sorts them by dtype and key
    delta, stats, whole = (
        dict(sorted(found.items(), key=lambda item: order.get(item[0], 0))) for found in parts.values()
    )
    return Adapter(name, config, delta, stats, whole, *place)


def _grouping(names: Iterable[str], config: SurgicalConfig) -> tuple[Mapping[str, str], str]:
    """Tensor -> the block that holds it and ``"blocks"``, where the config alone tells; else modules."""
    names = list(names)
    if config.blocks is not None:
        holders = {path: block for block, paths in config.blocks.items() for path in paths}
        found = {name: _holder(name, holders) for name in names}
        if all(found.values()):
            return {name: str(block) for name, block in found.items()}, "blocks"
    if config.target is not None:
        steps = parse(config.target).steps
        # One block as the whole target holds all tensors; only the base tells which tensors belong to which of several.
        if len(steps) == 1 and isinstance(steps[0].term, Name):
            block = steps[0].term.text
            if block in _BLOCKS or NUMBERED.fullmatch(block):
                return dict.fromkeys(names, block), "blocks"
    depth = 1
    paths = [name.rpartition(".")[0].split(".") for name in names]
    while len({tuple(path[:depth]) for path in paths}) == 1 and depth < max(map(len, paths), default=0):
        depth += 1
    return {n: ".".join(path[:depth]) or n for n, path in zip(names, paths, strict=True)}, "modules"


def _holder(name: str, holders: Mapping[str, str]) -> str | None:
    """The block of the longest path in ``holders`` that is ``name`` or leads to it."""
    while name and name not in holders:
        name = name.rpartition(".")[0]
    return holders.get(name)
