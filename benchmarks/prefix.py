"""Whole runs with the frozen prefix computed once against the same runs without, in one process.

::

    python benchmarks/prefix.py --output outputs/benchmarks/prefix.json                 # random weights and images
    python benchmarks/prefix.py --shared ../shared --images 1000 --networks resnet26    # real ones

One cell is one network and one target: `fit` over 15 epochs, cached and uncached in turn, from the same weights, with
every image decoded and transformed once before anything is timed, as tune and compare do. Each pair must give the same
adapter bit for bit, or the cell fails. *hand* is a feature cache in plain torch, written for these networks (see
`step.suffix`): the same images, steps, rate and evaluations, and no more. A number is the median over pairs of cached /
uncached seconds, with the distribution-free 95% interval between two order statistics (all of the line below six
pairs). The limit is what remains if nothing but the suffix were trained and evaluated in every epoch, and the prefix
run once over all images: counted in floating-point operations, a backward pass as twice a forward pass of what it goes
through. ``--uncached-epochs 3`` trains the uncached run for three epochs and multiplies the time of its epochs, and
compares no adapters.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from step import ResNet26, features_before, median_interval, suffix
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback

from peft_surgical import anatomy_of
from peft_surgical.blocks import parse, resolve
from peft_surgical.data.labelled import collate
from peft_surgical.prefix.storage import FeatureStore
from peft_surgical.training.fitting import FitSettings, fit

LITE0 = "tf_efficientnet_lite0"
VIT = "vit_base_patch16_224"
TINY = "test_resnet"
TARGETS = {
    "resnet26": ("head", "block3"),
    LITE0: ("head", "block7", "block6", "block5"),
    VIT: ("last1", "last4"),
    TINY: ("head",),
}


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
    folder = {"resnet26": "cifar10_rn26_gn", LITE0: "efficientnet_lite0_imagenet"}.get(name)
    if name == "resnet26":
        network: nn.Module = ResNet26()
    else:
        import timm

        network = timm.create_model(name)
    if shared is not None and folder is not None:  # the others have random weights, which changes no time
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


class Epochs(TrainerCallback):
    """The seconds that the epochs of a run take, without what is done once."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """See TrainerCallback."""
        self.begun = time.perf_counter()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """See TrainerCallback."""
        self.seconds = time.perf_counter() - self.begun


def by_hand(network: nn.Module, target: str, rows: tuple[Images, Images], settings: FitSettings) -> None:
    """The run with a feature cache as one would write it for this network: features once, then a loop of the suffix."""
    anatomy = anatomy_of(network.eval())
    tuned = {*resolve(parse(target), anatomy)}
    cut = suffix(network, next(block.name for block in anatomy if tuned & {*block.tensors}))
    assert cut is not None
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in tuned)
    size = settings.batch_size
    kept = [torch.cat([features_before(network, cut[0], part) for part in one.images.split(size)]) for one in rows]
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=settings.lr, weight_decay=settings.weight_decay)
    best, state = -1.0, [parameter.detach().clone() for parameter in trained]
    for _ in range(settings.epochs):
        for chosen in torch.randperm(len(kept[0])).split(size):
            F.cross_entropy(cut[1](kept[0][chosen]), rows[0].labels[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            logits = torch.cat([cut[1](part) for part in kept[1].split(500)])
            accuracy = float((logits.argmax(1) == rows[1].labels).float().mean())
            if accuracy > best:
                best, state = accuracy, [parameter.clone() for parameter in trained]
    with torch.no_grad():
        for parameter, value in zip(trained, state, strict=True):
            parameter.copy_(value)


def limit_of(share: float, tuning: int, validation: int, epochs: int) -> float:
    """Cached / uncached if the prefix, a share of a forward pass, ran once and everything else as it does."""
    rest = (1 - share) * epochs * (3 * tuning + validation)
    return (share * (tuning + validation) + rest) / (share * epochs * (tuning + validation) + rest)


def share_in(line: str) -> float:
    """The share of a forward pass that a run said it cached."""
    return int(line.partition("%")[0].rpartition(" ")[2]) / 100 if line.startswith("prefix cached") else 0.0


def measure(
    name: str,
    target: str,
    rows: tuple[Images, Images],
    settings: FitSettings,
    pairs: int,
    make: Callable[[], nn.Module],
    uncached_epochs: int | None = None,
    hand: bool = True,
) -> dict[str, Any]:
    taken: dict[str, list[float]] = {"cached": [], "uncached": []} | ({"hand": []} if hand else {})
    line, same = "", uncached_epochs in (None, settings.epochs)
    for pair in range(pairs):
        found = {}
        for kind in taken if pair % 2 == 0 else reversed(taken):
            network, epochs = make(), Epochs()
            own = settings if same or kind != "uncached" else replace(settings, epochs=uncached_epochs)
            begun = time.perf_counter()
            if kind == "hand":
                by_hand(network, target, rows, own)
            else:
                cache = kind == "cached"
                found[kind] = fit(network, target, *rows, own, collate=collate, cache=cache, callbacks=[epochs])
            seconds = time.perf_counter() - begun
            more = 0.0 if kind != "uncached" else epochs.seconds * (settings.epochs / own.epochs - 1)
            taken[kind].append(seconds + more)
        states = [found[kind].model.state_dict() for kind in ("cached", "uncached")]
        if same and any(not torch.equal(value, states[1][key]) for key, value in states[0].items()):
            raise SystemExit(f"{name} {target}: another adapter with the cache than without")
        line = found["cached"].prefix
        shown = ", ".join(f"{kind} {seconds[-1]:.1f} s" for kind, seconds in taken.items())
        print(f"{name} {target}: {shown}; {line}", flush=True)
    over = {
        kind: [a / b for a, b in zip(taken["cached"], taken[kind], strict=True)] for kind in taken if kind != "cached"
    }
    ratio = median_interval(over["uncached"])
    return {
        "network": name,
        "target": target,
        "ratio": ratio.value,
        "low": ratio.low,
        "high": None if ratio.high == float("inf") else ratio.high,
        "over_hand": over.get("hand"),
        "limit": limit_of(share_in(line), len(rows[0]), len(rows[1]), settings.epochs),
        **{f"{kind}_seconds": seconds for kind, seconds in taken.items()},
        "uncached_epochs": uncached_epochs or settings.epochs,
        "prefix": line,
    }


def sweep(
    name: str,
    rows: tuple[Images, Images],
    settings: FitSettings,
    lrs: Sequence[float],
    make: Callable[[], nn.Module],
) -> dict[str, Any]:
    """The runs of Cross-Val, each block, the head and all with each rate: with one store for all, and one by one."""
    targets = [*anatomy_of(make()).names, "all"]
    taken: dict[str, dict[str, float]] = {}
    shares, seconds = {}, {"cached": 0.0, "uncached": 0.0}
    store = FeatureStore()
    for number, target in enumerate(targets):
        taken[target] = dict.fromkeys(seconds, 0.0)
        for lr in lrs:
            for kind in seconds if number % 2 == 0 else reversed(seconds):
                begun = time.perf_counter()
                cache = store if kind == "cached" else False
                own = replace(settings, lr=lr)
                found = fit(make(), target, *rows, own, collate=collate, cache=cache)
                taken[target][kind] += time.perf_counter() - begun
                if kind == "cached":
                    shares[target] = share_in(found.prefix)
        print(f"{name} {target}: {taken[target]}", flush=True)
    for kind in seconds:
        seconds[kind] = sum(one[kind] for one in taken.values())
    tuning, validation, epochs = len(rows[0]), len(rows[1]), settings.epochs
    whole = least = 0.0  # in forward passes; every prefix once, whatever the number of rates
    for share in shares.values():
        rest = (1 - share) * epochs * (3 * tuning + validation)
        least += share * (tuning + validation) + rest * len(lrs)
        whole += (share * epochs * (tuning + validation) + rest) * len(lrs)
    return {
        "network": name,
        "ratio": seconds["cached"] / seconds["uncached"],
        "limit": least / whole,
        "seconds": seconds,
        "by_target": taken,
        "shares": shares,
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
    parser.add_argument("--uncached-epochs", type=int, help="of the uncached run, whose time is multiplied")
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
            again = functools.partial(copy.deepcopy, base)
            cells.append(measure(name, target, rows, settings, args.pairs, again, args.uncached_epochs))
            args.output.parent.mkdir(parents=True, exist_ok=True)
            what = {"images": args.images, "pixels": pixels, "epochs": args.epochs, "batch_size": args.batch_size}
            machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
            machine |= {"processor": platform.processor() or platform.machine()}
            args.output.write_text(json.dumps({**what, "machine": machine, "cells": cells}, indent=1) + "\n")


if __name__ == "__main__":
    main()
