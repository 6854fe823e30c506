"""Whole runs with the frozen prefix computed once against the same runs without, in one process.

::

    python benchmarks/prefix.py --output outputs/benchmarks/prefix.json                 # random weights and images
    python benchmarks/prefix.py --shared ../shared --images 1000 --networks resnet26    # real ones

One cell is one network and one target: `fit` over 15 epochs, cached and uncached in turn, from the same weights, with
every image decoded and transformed once before anything is timed, as tune and compare do. Each pair must give the same
adapter bit for bit, or the cell fails. A number is the median over pairs of cached / uncached seconds, with the
distribution-free 95% interval between two order statistics (all of the line below six pairs). The limit is what remains
if nothing but the suffix were trained and evaluated in every epoch, and the prefix run once over all images: counted
in floating-point operations, a backward pass as twice a forward pass of what it goes through.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from step import ResNet26, median_interval
from torch import Tensor, nn
from torch.utils.data import Dataset

from peft_surgical.data.labelled import collate
from peft_surgical.training.fitting import FitSettings, fit

LITE0 = "tf_efficientnet_lite0"
TARGETS = {"resnet26": ("head", "block3"), LITE0: ("head", "block7", "block6", "block5")}


class Images(Dataset):
    """Images that were transformed before, in memory."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"pixel_values": self.images[i], "labels": int(self.labels[i])}


def network_of(name: str, shared: Path | None) -> nn.Module:
    torch.manual_seed(0)
    if name == "resnet26":
        network, folder = ResNet26(), "cifar10_rn26_gn"
    else:
        import timm

        network, folder = timm.create_model(LITE0), "efficientnet_lite0_imagenet"
    if shared is not None:
        network.load_state_dict(load_file(shared / "models" / folder / "model.safetensors"))
    return network.eval()


def images_of(name: str, shared: Path | None, count: int, pixels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if shared is None:
        return torch.randn(count, 3, pixels, pixels, generator=generator), torch.arange(count) % 7
    import datasets
    import numpy as np

    if name == "resnet26":
        found = datasets.load_dataset("parquet", data_files=str(shared / "data/cifar10c/frost.parquet"), split="train")
        image, label = "img" if "img" in found.column_names else "image", "label"
    else:
        found = datasets.load_dataset("imagefolder", data_dir=str(shared / "data/pacs/sketch"), split="train")
        image, label = "image", "label"
    order = torch.randperm(len(found), generator=generator)[:count].tolist()
    rows = [found[i] for i in order]
    pictures = [row[image].convert("RGB").resize((pixels, pixels)) for row in rows]
    stacked = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) for one in pictures])
    return stacked.float() / 127.5 - 1, torch.tensor([row[label] for row in rows])


def measure(
    name: str,
    target: str,
    rows: tuple[Images, Images],
    settings: FitSettings,
    pairs: int,
    make: Callable[[], nn.Module],
) -> dict[str, Any]:
    taken: dict[bool, list[float]] = {True: [], False: []}
    line = ""
    for pair in range(pairs):
        found = {}
        for cache in (True, False) if pair % 2 == 0 else (False, True):
            network = make()
            begun = time.perf_counter()
            found[cache] = fit(network, target, *rows, settings, collate=collate, cache=cache)
            taken[cache].append(time.perf_counter() - begun)
        states = [found[cache].model.state_dict() for cache in (True, False)]
        if any(not torch.equal(value, states[1][key]) for key, value in states[0].items()):
            raise SystemExit(f"{name} {target}: another adapter with the cache than without")
        line = found[True].prefix
        print(f"{name} {target}: {taken[True][-1]:.1f} s / {taken[False][-1]:.1f} s; {line}", flush=True)
    ratio = median_interval([a / b for a, b in zip(taken[True], taken[False], strict=True)])
    share = int(line.partition("%")[0].rpartition(" ")[2]) / 100 if line.startswith("prefix cached") else 0.0
    tuning, validation, epochs = len(rows[0]), len(rows[1]), settings.epochs
    suffix = (1 - share) * epochs * (3 * tuning + validation)
    limit = (share * (tuning + validation) + suffix) / (share * epochs * (tuning + validation) + suffix)
    return {
        "network": name,
        "target": target,
        "ratio": ratio.value,
        "low": ratio.low,
        "high": None if ratio.high == float("inf") else ratio.high,
        "limit": limit,
        "cached_seconds": taken[True],
        "uncached_seconds": taken[False],
        "prefix": line,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--targets", nargs="+", help="instead of each network's own")
    parser.add_argument("--shared", type=Path, help="folder with models/ and data/; without it everything is random")
    parser.add_argument("--images", type=int, default=1000, help="to tune on; a fifth as many to validate")
    parser.add_argument("--pixels", type=int, help="side of the images: 32 for the ResNet-26, 224 for the others")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/prefix.json"))
    args = parser.parse_args()
    cells = []
    for name in args.networks:
        pixels = args.pixels or (32 if name == "resnet26" else 224)
        images, labels = images_of(name, args.shared, args.images + args.images // 5, pixels)
        rows = (
            Images(images[: args.images], labels[: args.images]),
            Images(images[args.images :], labels[args.images :]),
        )
        base = network_of(name, args.shared)
        settings = FitSettings(lr=1e-3, epochs=args.epochs, batch_size=args.batch_size, use_cpu=True)
        for target in args.targets or TARGETS[name]:
            cells.append(measure(name, target, rows, settings, args.pairs, lambda base=base: copy.deepcopy(base)))
            args.output.parent.mkdir(parents=True, exist_ok=True)
            what = {"images": args.images, "pixels": pixels, "epochs": args.epochs, "batch_size": args.batch_size}
            machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
            machine |= {"processor": platform.processor() or platform.machine()}
            args.output.write_text(json.dumps({**what, "machine": machine, "cells": cells}, indent=1) + "\n")


if __name__ == "__main__":
    main()
