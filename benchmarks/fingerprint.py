"""What it costs to know the base: hashing a ViT-L/16, all bytes or a sample of each tensor, against reading its file.

::

    python benchmarks/fingerprint.py            # a minute, 2.5 GB of memory, 1.2 GB of disk

Prints seconds on one thread: the least of three runs, so that nothing waits for the disk.
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file

from peft_surgical.fingerprints import fingerprint, mark_of


def least(work: Callable[[], Any], times: int = 3) -> float:
    """The shortest of several runs, in seconds."""
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        spent.append(time.perf_counter() - start)
    return min(spent)


def main() -> None:
    """Print one line for each way."""
    torch.set_num_threads(1)
    with torch.device("meta"):
        names = timm.create_model("vit_large_patch16_224").state_dict()
    tensors = {name: torch.randn(value.shape) for name, value in names.items()}
    size = sum(value.nbytes for value in tensors.values())
    print(f"vit_large_patch16_224: {len(tensors)} tensors, {size / 1e9:.2f} GB; {platform.processor()}, one thread")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "base.safetensors")
        save_file(tensors, file)
        copied = least(lambda: {name: value.clone() for name, value in load_file(file).items()})
    print(f"reading the file from the disk's cache: {copied:.2f} s")
    print(f"hashing all bytes: {least(lambda: fingerprint(tensors)):.2f} s")
    print(f"marks of samples: {least(lambda: [mark_of(name, value) for name, value in tensors.items()]):.3f} s")


if __name__ == "__main__":
    main()
