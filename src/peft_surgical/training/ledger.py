"""A ledger of finished runs, for work that is killed, resumed and shared by processes.

One JSON object per line: the key of a run, which is the dict of settings that determine it, and its result. Appending
is one ``write`` under a lock, so that a line is whole, or torn at the very end of the file; a torn last line (from a
kill in the middle of the write) is ignored when reading and cut off by the next append. A last line that is a whole run
and lacks only its line end, as editors leave it, counts. A file that holds anything else is not a ledger, and is left
as it is.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DataError
from ..files import printable

try:
    import fcntl
except ImportError:  # Windows: there, one process per ledger
    fcntl = None  # type: ignore[assignment]


NOTES = ("seconds", "prefix", "saved")
"""How long a run took, what of the network was computed once for each image, and the training steps that this saved."""


@dataclass(frozen=True)
class Run:
    """One finished run, in plain JSON.

    Attributes:
        key: The settings that determine it.
        result: What they determine.
        notes: What else is known of it, the entries `NOTES` of what the run gave; two runs that differ in nothing else
            are equal.
    """

    key: dict[str, Any]
    result: dict[str, Any]
    notes: dict[str, Any] = field(default_factory=dict, compare=False)


def canonical(key: Mapping[str, Any]) -> str:
    """The text by which keys are compared, independent of the order of the settings.

    Raises:
        DataError: A value is not plain JSON.
    """
    try:
        return json.dumps(key, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"{dict(key)!r} cannot be written to a ledger ({error}): use plain JSON values only") from error


class Ledger:
    """The finished runs in one file. Reading always reflects the file, also what other processes have added.

    ::

        ledger = Ledger("runs.jsonl")
        key = {"corruption": "frost", "target": "block1", "lr": 1e-3, "seed": 0}
        result = ledger.run(key, train).result  # train(key) is called only if this run is not there yet

    Args:
        file: Created, with its folder, by the first append.
    """

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self.file = Path(file)

    def __len__(self) -> int:
        return len(self.runs())

    def __iter__(self) -> Iterator[Run]:
        return iter(self.runs())

    def runs(self, **settings: Any) -> list[Run]:
        """The runs whose key agrees with all of these settings, in the order in which they were first added.

        Raises:
            DataError: The file holds a line that is not a run.
        """
        missing = object()
        return [run for run in self._read().values() if all(run.key.get(k, missing) == v for k, v in settings.items())]

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result of `find_run`, or None."""
        run = self.find_run(key)
        return None if run is None else run.result

    def find_run(self, key: Mapping[str, Any]) -> Run | None:
        """The run that was last added for exactly this key, or None.

        Raises:
            DataError: The key is not plain JSON, or the file holds a line that is not a run.
        """
        return self._read().get(canonical(key))

    def run(self, key: Mapping[str, Any], train: Callable[[dict[str, Any]], Mapping[str, Any]]) -> Run:
        """The finished run with exactly this key, or else that of ``train(key)``, which is appended."""
        if (found := self.find_run(key)) is not None:
            return found
        given = train(dict(key))
        self.append(key, given)
        return _noted(key, given)

    def append(self, key: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Add one run, whose ``result`` may hold `NOTES`. On return it is on disk.

        Raises:
            DataError: Key or result are not plain JSON (NaN is not), or the file is not a ledger.
        """
        run = _noted(key, result)
        notes = f', "notes": {canonical(run.notes)}' if run.notes else ""
        line = f'{{"key": {canonical(key)}, "result": {canonical(run.result)}{notes}}}\n'.encode()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            with _locked(descriptor):
                line = self._prepared(descriptor) + line
                try:
                    written = os.write(descriptor, line)
                    os.fsync(descriptor)
                except OSError as error:  # which names no file
                    raise OSError(error.errno, error.strerror, str(self.file)) from error
        finally:
            os.close(descriptor)
        if written != len(line):  # what was written is cut off by the next append
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.file))

    def _read(self) -> dict[str, Run]:
        # The whole file, every time: a ledger has some thousand lines, and other processes append to it.
        content = self.file.read_bytes() if self.file.exists() else b""
        runs: dict[str, Run] = {}
        *lines, tail = content.split(b"\n")
        for run in (*map(self._run, lines), *([self._run(tail)] if self._is_whole(tail) else [])):
            runs[canonical(run.key)] = run
        return runs

    def _run(self, line: bytes) -> Run:
        try:
            parts = json.loads(line)
            return Run(dict(parts["key"]), dict(parts["result"]), dict(parts.get("notes", {})))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(
                f"{self.file} holds a line that is no run: {printable(line[:80])}; delete that line, or name another "
                "ledger"
            ) from error

    def _is_whole(self, tail: bytes) -> bool:
        """Whether the last line, which has no line end, is a run; False for the beginning of one.

        Raises:
            DataError: It is neither, so that somebody else has written it.
        """
        try:
            json.loads(tail)
        except (ValueError, RecursionError):
            if tail.startswith(_BEGINNING) or _BEGINNING.startswith(tail):
                return False
        self._run(tail)
        return True

    def _prepared(self, descriptor: int) -> bytes:
        """What the next line has to begin with, after a torn line has been cut off; only under the lock."""
        size = os.lseek(descriptor, 0, os.SEEK_END)
        os.lseek(descriptor, 0, os.SEEK_SET)
        with open(descriptor, "rb", closefd=False) as file:
            first = file.readline()
            if first.endswith(b"\n"):
                self._run(first)
            file.seek(end := _end_of_last_line(file, size))
            tail = file.read()
        if self._is_whole(tail):
            return b"\n"
        os.ftruncate(descriptor, end)
        return b""


_BEGINNING = b'{"key": {'


def _noted(key: Mapping[str, Any], given: Mapping[str, Any]) -> Run:
    notes = {name: value for name, value in given.items() if name in NOTES}
    return Run(dict(key), {name: value for name, value in given.items() if name not in NOTES}, notes)


@contextmanager
def _locked(descriptor: int) -> Iterator[None]:
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_UN)


def _end_of_last_line(file: BinaryIO, size: int) -> int:
    """The position behind the last line end of a file of so many bytes."""
    end = size
    while end > 0:
        start = max(0, end - 4096)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
