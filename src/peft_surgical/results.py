"""Folders of results, in which nothing is overwritten or removed that this package has not written there.

A hidden folder in them marks them as claimed. It holds what an experiment needs until it is over, and a record of the
results: the SHA-256 of each, by which a file of the same name that somebody else has put there is told from them.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ConfigError
from .files import file_sha256, printable, shown
from .folders import canonical_json, commit, write_atomically
from .keys import CARD, CONFIG, PRIVATE

_RECORD, _ORIGIN = "written.json", "origin"


def claim(folder: str | os.PathLike[str], names: Iterable[str], origin: str | None = None) -> Path:
    """The absolute path of a folder for results, made if need be; before anything is computed for it.

    Args:
        folder: An empty folder, a new one, or one that was claimed before.
        names: What will be written there.
        origin: Where it comes from; results of another origin are not replaced.

    Raises:
        ConfigError: No folder can be made or written there, or it holds what this package has not written.
    """
    target = Path(os.path.expanduser(folder)).absolute()
    private = target / PRIVATE
    try:
        target.mkdir(parents=True, exist_ok=True)
        others = sorted(path.name for path in target.iterdir() if not path.name.startswith("."))
        if others and not private.is_dir():
            raise ConfigError(
                f"{target} holds {shown(others)}, which might be overwritten: name a folder that is new or empty with "
                "output="
            )
        private.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=private):
            pass
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"no results can be written to {target} ({error}): name another folder with output="
        ) from error
    if private.is_symlink():
        raise ConfigError(f"{private} is a link, and what is behind it would be removed: take it away")
    if origin is not None:
        note = private / _ORIGIN
        known = note.read_text(encoding="utf-8", errors="replace") if note.is_file() else origin
        if known != origin:
            raise ConfigError(f"{target} holds what came from {printable(known)}: name another folder with output=")
        write_atomically(note, origin)
    _refuse_foreign(target, names)
    return target


@contextmanager
def published(folder: Path, page: bool = False) -> Iterator[Path]:
    """A folder in which to write results, which take the place of earlier ones in ``folder`` when the block ends.

    Args:
        folder: Where they belong.
        page: Whether ``README.md`` is one of them. That of an adapter that is saved has a mark of its own.

    Raises:
        ConfigError: There is a file in ``folder`` that this package has not written.
    """
    (folder / PRIVATE).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder / PRIVATE) as place:
        stage = Path(place)
        yield stage
        files = [path for path in stage.rglob("*") if path.is_file() and (page or path.name != CARD)]
        new = {path.relative_to(stage).as_posix(): file_sha256(path) for path in files}
        _refuse_foreign(folder, new)
        record = _record_of(folder)
        # Both, in case the process is killed before or after a file is replaced.
        before = {name: list(record.get(name, ())) for name in new}
        record |= {name: [*before[name][-1:], sha256] for name, sha256 in new.items() if before[name][-1:] != [sha256]}
        write_atomically(folder / PRIVATE / _RECORD, canonical_json(record))
        commit(stage, folder)


def withdraw(folder: Path, names: Iterable[str]) -> None:
    """Remove earlier results; a `ConfigError` for a file that this package has not written."""
    names = list(names)
    _refuse_foreign(folder, names)
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _refuse_foreign(folder: Path, names: Iterable[str]) -> None:
    record = _record_of(folder)
    if foreign := [name for name in names if not _is_own(folder / name, record.get(name, ()))]:
        raise ConfigError(
            f"{folder} holds {shown(foreign)}, which something else has written or changed: move that away, or name "
            "another folder with output="
        )


def _is_own(file: Path, known: Collection[str]) -> bool:
    if not file.exists():
        return True
    if not file.is_file():
        return False
    if file_sha256(file) in known:
        return True
    if file.name != CONFIG:
        return False
    try:  # a save was killed: what was to become of the config, with the older one inside
        plain = json.loads(file.read_text(encoding="utf-8"))
        plain.pop("superseded")
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
        return False
    return hashlib.sha256(canonical_json(plain).encode()).hexdigest() in known


def _record_of(folder: Path) -> dict[str, list[str]]:
    """File -> the SHA-256 of what this package wrote there last, and before that."""
    try:
        plain = json.loads((folder / PRIVATE / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    entries = plain.items() if isinstance(plain, dict) else ()
    return {name: [*map(str, known)] for name, known in entries if isinstance(known, list)}
