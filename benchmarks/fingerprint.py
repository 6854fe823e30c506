"""What it costs to know the base: hashing a ViT-L/16, all bytes or a sample of each tensor, against reading its file.

::

    python benchmarks/fingerprint.py            # half a minute of CPU time, 2.5 GB of memory, 1.2 GB of disk
    python benchmarks/fingerprint.py --markdown docs/results/fingerprint.md

Seconds of CPU time on one thread, which other work on the machine does not change much: of interleaved rounds the least
of each way. The file is in the disk's cache.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file

from peft_surgical.evaluation import TextTable
from peft_surgical.fingerprints import fingerprint, mark_of

ROUNDS = 3


def seconds(work: Callable[[], Any]) -> float:
    """CPU time of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def measured(name: str, rounds: int = ROUNDS) -> TextTable:
    """A row for each way to look at all weights of a network of timm."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in timm.create_model(name).state_dict().items()}
    tensors = {key: torch.randn(shape) for key, shape in shapes.items()}
    size = sum(value.nbytes for value in tensors.values())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "base.safetensors")
        save_file(tensors, file)
        ways: dict[str, Callable[[], Any]] = {
            "reading the file": lambda: {key: value.clone() for key, value in load_file(file).items()},
            "hashing all bytes": lambda: fingerprint(tensors),
            "marks of samples, which the fingerprint holds": lambda: [
                mark_of(k, value) for k, value in tensors.items()
            ],
        }
        spent = {way: min(times) for way, times in zip(ways, zip(*_rounds(ways, rounds), strict=True), strict=True)}
    reading = spent["reading the file"]
    rows = [[way, f"{least:.3f}", f"{least / reading:.3f}"] for way, least in spent.items()]
    text = (
        f"{name}: {len(tensors)} tensors, {size / 1e9:.2f} GB. CPU seconds on one thread, the least of {rounds} rounds."
    )
    return TextTable(["what", "seconds", "of reading"], rows, text)


def _rounds(ways: dict[str, Callable[[], Any]], rounds: int) -> list[list[float]]:
    return [[seconds(work) for work in ways.values()] for _ in range(rounds)]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="vit_large_patch16_224", help="a name of timm")
    parser.add_argument("--markdown", help="also write the table to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    table = measured(args.network)
    table.show()
    if args.markdown:
        table.save(args.markdown)


if __name__ == "__main__":
    main()
