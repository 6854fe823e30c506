"""Where the outputs of frozen prefixes are kept: in memory, or in files that are mapped into memory, within budgets.

A file is written under another name and renamed when it is complete, so a process that is killed leaves none or a whole
one. Processes that share a folder wait for the one that writes. Files hold tensors' bytes and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import Dataset

MEMORY, DISK = 2**30, 2**34
"""Default budgets in bytes: 1 GiB of memory, 16 GiB of files."""
_SUFFIX = ".prefix"


class NoRoomError(Exception):
    """What is to be stored is larger than the budgets; the message says by how much."""


@dataclass(frozen=True)
class Layout:
    """How one tensor of a sample is stored.

    Attributes:
        shape: Shape of one sample.
        dtype: In the store.
        order: The sample's dimensions from the slowest to the fastest in memory, so that what is read has the strides
            of what was written: kernels differ between them, and so do their last digits.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of one sample."""
        return math.prod(self.shape) * self.dtype.itemsize

    def empty(self, rows: int) -> Tensor:
        """(rows, the sample's dimensions in the order in which they are stored)."""
        return torch.empty(rows, *(self.shape[d] for d in self.order), dtype=self.dtype)

    def stored(self, batch: Tensor) -> Tensor:
        """A batch in the order in which it is stored."""
        return batch.permute(0, *(d + 1 for d in self.order)).to(self.dtype)

    def read(self, stored: Tensor) -> Tensor:
        """The reverse of `stored`, but for the dtype."""
        return stored.permute(0, *(self.order.index(d) + 1 for d in range(len(self.order))))


def layout_of(batch: Tensor, dtype: torch.dtype | None = None) -> Layout:
    """The layout of the samples of a batch (n, ...), in another dtype if one is given."""
    order = sorted(range(batch.dim() - 1), key=lambda d: -batch.stride(d + 1))
    kept = dtype if dtype is not None and batch.is_floating_point() else batch.dtype
    return Layout(tuple(batch.shape[1:]), kept, tuple(order))


@dataclass
class Table:
    """What is remembered of a data set.

    Attributes:
        token: Its name in the keys of this process.
        images: A hash of its images, its name in the keys of several processes.
        rows: Its rows without their images, once they have been read.
    """

    token: str
    images: str | None = None
    rows: list[Any] | None = None


class FeatureStore:
    """Outputs of frozen prefixes for all images of data sets, shared by the runs that are given the same store.

    What is used least recently is removed first, from memory and from the folder.

    Args:
        memory: Budget in bytes in memory. What does not fit there is kept in files.
        disk: Budget in bytes in files.
        folder: For the files; None for a temporary folder of this store.
        shared: Whether other processes use the folder, too: then everything is kept in files.
        dtype: ``torch.bfloat16`` to halve the bytes of float32 features, which rounds them.
    """

    def __init__(
        self,
        memory: int = MEMORY,
        disk: int = DISK,
        folder: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | None = None,
        shared: bool = False,
    ) -> None:
        self.memory, self.disk, self.dtype, self.shared = memory, disk, dtype, shared
        self.folder = None if folder is None else Path(folder)
        self._own: Path | None = None
        self._kept: OrderedDict[str, list[Tensor]] = OrderedDict()
        self._datasets: dict[int, tuple[Any, Table]] = {}
        self._agreements: dict[str, dict[Any, bool]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which begins with what is in the shared folder."""
        return {**self.__dict__, "_kept": OrderedDict(), "_datasets": {}, "_agreements": {}, "_own": None}

    def agreements(self, key: str) -> dict[Any, bool]:
        """For which kinds of batches the features of a key were compared with the prefix itself, and with what result.

        This process alone remembers them: the kernels of another may differ.
        """
        return self._agreements.setdefault(key, {})

    def table(self, dataset: Dataset[Any]) -> Table:
        """What is remembered of a data set as long as it exists."""
        known = self._datasets.get(id(dataset))
        if known is None or known[0]() is not dataset:
            for number in [number for number, (reference, _) in self._datasets.items() if reference() is None]:
                del self._datasets[number]
            known = (_reference(dataset), Table(hashlib.sha256(os.urandom(16)).hexdigest()))
            self._datasets[id(dataset)] = known
        return known[1]

    def features(
        self, key: str, layouts: Sequence[Layout], rows: int, fill: Callable[[list[Tensor]], None]
    ) -> list[Tensor]:
        """The tensors of a key, (rows, ...) each, computed by ``fill`` into empty ones if they are not there.

        Raises:
            NoRoomError: They fit into no budget.
        """
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        size = sum(_padded(rows * layout.nbytes) for layout in layouts)
        if self.shared or size > self.memory:
            return self._from_file(key, layouts, rows, size, fill)
        made = [layout.empty(rows) for layout in layouts]
        fill(made)
        self._kept[key] = made
        while sum(tensor.nbytes for one in self._kept.values() for tensor in one) > self.memory:
            self._kept.popitem(last=False)
        return made

    def _from_file(
        self, key: str, layouts: Sequence[Layout], rows: int, size: int, fill: Callable[[list[Tensor]], None]
    ) -> list[Tensor]:
        folder = self._place()
        file = folder / f"{key}{_SUFFIX}"
        with FileLock(file.with_suffix(".lock")):
            if not file.is_file():
                for left in folder.glob(f"{key}.[0-9]*"):  # by a process that was killed: it has no lock any more
                    left.unlink()
                self._make_room(folder, size)
                scratch = file.with_suffix(f".{os.getpid()}")
                try:
                    _reserve(scratch, size)
                    fill(_mapped(scratch, layouts, rows, "r+"))
                    with scratch.open("rb+") as written:
                        os.fsync(written.fileno())
                    os.replace(scratch, file)
                finally:
                    scratch.unlink(missing_ok=True)
            os.utime(file)  # used last
            return _mapped(file, layouts, rows, "c")

    def _place(self) -> Path:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            return self.folder
        if self._own is None:
            self._own = Path(tempfile.mkdtemp(prefix="peft-surgical-prefix-"))
            weakref.finalize(self, shutil.rmtree, self._own, ignore_errors=True)
        return self._own

    def _make_room(self, folder: Path, size: int) -> None:
        budget = min(self.disk, shutil.disk_usage(folder).free // 2)
        if size > budget:
            raise NoRoomError(
                f"its outputs need {size / 2**20:,.0f} MiB, and there is room for {self.memory / 2**20:,.0f} in memory "
                f"and {budget / 2**20:,.0f} in files"
            )
        kept = sorted(folder.glob(f"*{_SUFFIX}"), key=lambda file: file.stat().st_mtime)
        total = sum(file.stat().st_size for file in kept)
        for file in kept:
            if total + size <= self.disk:
                break
            total -= file.stat().st_size
            file.unlink(missing_ok=True)  # who has it mapped keeps it


def _reference(dataset: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(dataset)
    except TypeError:  # a list
        return lambda: dataset


def _reserve(file: Path, size: int) -> None:
    """Make a file of so many bytes of the disk. Writing to a sparse one would end the process when the disk is full.

    Raises:
        NoRoomError: It has not so many.
    """
    try:
        with file.open("wb") as written:
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(written.fileno(), 0, size)
            else:
                written.truncate(size)
    except OSError as error:
        raise NoRoomError(f"its outputs need {size / 2**20:,.0f} MiB in {file.parent}: {error.strerror}") from error


def _mapped(file: Path, layouts: Sequence[Layout], rows: int, mode: Any) -> list[Tensor]:
    if file.stat().st_size == 0:
        return [layout.empty(rows) for layout in layouts]
    raw, found, start = torch.from_numpy(np.memmap(file, np.uint8, mode)), [], 0
    for layout in layouts:
        end = start + rows * layout.nbytes
        shape = (rows, *(layout.shape[d] for d in layout.order))
        found.append(raw[start:end].view(layout.dtype).view(shape))
        start += _padded(rows * layout.nbytes)
    return found


def _padded(size: int) -> int:
    return -(-size // 64) * 64  # every tensor of a file begins at a multiple of its dtype's size


def key_of_features(**what: Any) -> str:
    """A key, 32 hexadecimal digits, over all that determines features."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:32]
