"""The adapters that are at hand, in huggingface_hub's cache and in folders: for ``peft-surgical list``.

Read from their configs alone, without importing `peft_surgical`, so that the list is there at once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# As in `peft_surgical.config`, whose import takes seconds; a test compares them.
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
METHOD = "SURGICAL"

UNNAMED = "(no base named)"
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_LARGEST = 16 * 2**20  # bytes of a config, as in `peft_surgical.files`


@dataclass(frozen=True)
class Stored:
    """An adapter on this machine, as its config describes it; its file is not read.

    Attributes:
        name: Repository, or folder.
        base: What it calls its base, or `UNNAMED`.
        target: What it tunes, in words.
        bytes: Size of its file; 0 where it was not fetched as a whole.
        folder: Where it lies.
        commit: The repository's; None for a folder.
        refs: Branches and tags that were at that commit when it was fetched.
    """

    name: str
    base: str
    target: str
    bytes: int
    folder: str
    commit: str | None = None
    refs: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether its file is there."""
        return self.bytes > 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "refs": list(self.refs)}


def cached_adapters() -> list[Stored]:
    """The surgical adapters in huggingface_hub's cache, one entry for each commit that was fetched."""
    from huggingface_hub import constants

    # Scanning reads every file of every model, and imports an HTTP client: only where there may be an adapter.
    cache = Path(constants.HF_HUB_CACHE)
    if not any(cache.glob(f"models--*/snapshots/*/{CONFIG_FILE}")):
        return []
    from huggingface_hub import scan_cache_dir

    found = []
    for repo in scan_cache_dir(cache).repos:
        for revision in repo.revisions if repo.repo_type == "model" else ():
            place = Path(revision.snapshot_path)
            config = _config_in(place)
            if config is not None:
                refs = tuple(sorted(revision.refs))
                found.append(_stored(repo.repo_id, place, config, revision.commit_hash, refs))
    return found


def adapters_in(folders: Iterable[str | os.PathLike[str]]) -> list[Stored]:
    """The surgical adapters in folders and below them, without checkpoints of training and unfinished experiments."""
    found = []
    for folder in folders:
        for file in Path(folder).rglob(CONFIG_FILE):
            config = _config_in(file.parent)
            if config is not None and not _is_intermediate(file.parent.relative_to(folder)):
                found.append(_stored(str(file.parent), file.parent, config))
    return found


def by_base(adapters: Iterable[Stored]) -> dict[str, list[Stored]]:
    """Base -> its adapters, both in alphabetical order."""
    grouped: dict[str, list[Stored]] = {}
    for adapter in sorted(adapters, key=lambda a: (a.base, a.name, a.commit or "")):
        grouped.setdefault(adapter.base, []).append(adapter)
    return grouped


def _config_in(folder: Path) -> dict[str, Any] | None:
    """The config of a surgical adapter; None for everything else, whatever somebody has written there."""
    file = folder / CONFIG_FILE
    try:
        if not file.is_file() or file.stat().st_size > _LARGEST:
            return None
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) and config.get("peft_type") == METHOD else None


def _is_intermediate(place: Path) -> bool:
    """Whether this is a checkpoint of training, or unfinished: hidden, or in a hidden folder."""
    return _CHECKPOINT.match(place.name) is not None or any(part.startswith(".") for part in place.parts)


def _stored(
    name: str, folder: Path, config: dict[str, Any], commit: str | None = None, refs: tuple[str, ...] = ()
) -> Stored:
    names = config.get("tensor_names")
    count = f"{len(names) if isinstance(names, list) else 0} tensors"
    terms = config.get("target") or config.get("target_modules") or count
    target = " + ".join(map(str, terms)) if isinstance(terms, list) else str(terms)
    file = folder / WEIGHTS_FILE
    size = file.stat().st_size if file.is_file() else 0
    base = str(config.get("base_model_name_or_path") or UNNAMED)
    return Stored(name, base, target, size, str(folder), commit, refs)
