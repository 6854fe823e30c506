"""Writing into folders: adapters that are replaced as a whole, by one process at a time.

An adapter is two files, its weights and its config, and a kill between writing the two would leave one adapter's
weights beside another's config. So `commit` renames files that are already complete, in three steps::

    1. the new config, with the old one inside as "superseded"     weights: old -> the old config applies
    2. the new weights                                             weights: new -> the new config applies
    3. the new config alone

Each step is atomic and leaves a whole adapter: a reader compares the SHA-256 of the weights with what the configs say.
The steps of two processes must not mix, so each holds a lock on the folder meanwhile.

What is not complete yet lies in the folder itself, where a rename is possible whatever is mounted there, under a hidden
name that nobody can guess. What a killed process left of that is removed by the next one.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import AdapterError
from .files import file_sha256
from .keys import CONFIG, SCRATCH, WEIGHTS

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_TIMEOUT = 60.0
"""Seconds to wait for another process that writes into a folder."""
_POLL = 0.01
_DAY = 24 * 3600.0  # seconds, after which something is abandoned where nothing can be marked


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, as written beside the weights."""
    return json.dumps(value, indent=2, sort_keys=True)


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` beside ``path`` and rename it into place: a reader sees the old file or the new one."""
    while True:
        scratch = path.with_name(f"{SCRATCH}{secrets.token_hex(8)}")
        # Never through a link that somebody has put there, and with the mode that a new file has.
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                _mark(file.fileno())
                if not scratch.exists():  # taken for something abandoned, before it was marked
                    continue
                file.write(text)
            os.replace(scratch, path)
            return
        finally:
            scratch.unlink(missing_ok=True)


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A folder inside ``target`` in which to write what `commit` moves to its place. Makes ``target`` where need be.

    Raises:
        AdapterError: Another process keeps the folder locked.
    """
    new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    with locked(target):
        _sweep(target)
        stage = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=target))
        held = os.open(stage, os.O_RDONLY) if fcntl is not None else None
        if held is not None:
            _mark(held)
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if held is not None:
            os.close(held)
        if new:
            with contextlib.suppress(OSError):  # it holds what was written
                target.rmdir()


def commit(stage: Path, target: Path) -> None:
    """Move the adapters in ``stage`` (and in its folders, one per further adapter) to ``target``.

    Raises:
        AdapterError: Another process keeps a folder locked.
    """
    folders = sorted({path.parent for path in stage.rglob("*") if path.is_file()})
    for source in folders:
        goal = target / source.relative_to(stage)
        goal.mkdir(parents=True, exist_ok=True)
        with locked(goal):
            if (source / CONFIG).is_file():
                _replace(source, goal)
            for path in sorted(path for path in source.iterdir() if path.is_file()):
                os.replace(path, goal / path.name)


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
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None  # nothing that could be loaded
    if not isinstance(config, dict):
        return None
    previous = config.pop("superseded", None)
    # An earlier save was killed before its weights were in place.
    if isinstance(previous, dict) and previous.get("weights_sha256") == file_sha256(folder / WEIGHTS):
        return previous
    return config


# --- locks ---


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes and threads from changing an adapter in this folder while the block runs.

    The lock is on the folder, which leaves no file there, and ends with the process. Where folders cannot be locked
    (Windows, some network file systems) it is on a hidden file in it.

    Raises:
        AdapterError: Another process keeps it for longer than `LOCK_TIMEOUT`.
    """
    descriptor = None if fcntl is None else os.open(folder, os.O_RDONLY)
    try:
        if descriptor is None or not _waited(descriptor, folder):
            try:
                with FileLock(folder / f"{SCRATCH}lock", timeout=LOCK_TIMEOUT):
                    yield
            except Timeout as error:
                raise _busy(folder) from error
        else:
            yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for a copy that a forked process has
            os.close(descriptor)


def _waited(descriptor: int, folder: Path) -> bool:
    """Lock a folder, waiting for others; False where this file system does not lock folders."""
    end = time.monotonic() + LOCK_TIMEOUT
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > end:
                raise _busy(folder) from error
            time.sleep(_POLL)
        except OSError:
            return False
        else:
            return True


def _busy(folder: Path) -> AdapterError:
    return AdapterError(
        f"another process has been writing into {folder} for {LOCK_TIMEOUT:.0f} seconds: save to another folder, or "
        "wait until it is done"
    )


def _mark(descriptor: int) -> None:
    """Mark something unfinished as being written by a process that lives."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)


def _sweep(folder: Path) -> None:
    """Remove what killed processes have left unfinished in a folder; only while it is locked."""
    for path in folder.glob(f"{SCRATCH}*"):
        if path.name == f"{SCRATCH}lock" or path.is_symlink():
            continue
        with contextlib.suppress(OSError), _abandoned(path) as abandoned:
            if abandoned and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif abandoned:
                path.unlink(missing_ok=True)


@contextmanager
def _abandoned(path: Path) -> Iterator[bool]:
    """Whether nobody writes there, who then has to wait until the block ends."""
    old = time.time() - path.lstat().st_mtime > _DAY
    if fcntl is None:
        yield old
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        except OSError:
            yield old
        else:
            yield True
    finally:
        os.close(descriptor)
