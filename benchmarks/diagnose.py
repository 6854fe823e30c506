"""How often `diagnose` finds a shift that is known: corrupted images, damaged blocks, flipped labels, and none.

::

    python benchmarks/diagnose.py --data DATA --models MODELS --markdown docs/results/diagnose.md     # minutes

DATA is a folder with CIFAR-10-C as parquet files, ``clean.parquet`` among them; MODELS the folder of the two CIFAR
networks. Each seed draws two disjoint sets of clean images, one as the source, one as the new place. What is known: a
corruption of pixels is an input-level shift; noise on the weights of one block (half of each tensor's deviation) makes
features move from that block on; labels 9 - y (the paper's CIFAR-Flip) are an output-level shift, which only labels can
show; other clean images are no shift.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections import Counter
from pathlib import Path

import torch
from step import machine
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))
from paper.cifar import corruptions_in, read_images
from paper.cifar_networks import load_network, normalise
from peft_surgical import anatomy_of
from peft_surgical.diagnosis.drift import Features, Reference, block_features
from peft_surgical.diagnosis.probe import spread_against_random
from peft_surgical.diagnosis.verdict import judged
from peft_surgical.evaluation import TextTable, mean_interval, wilson_interval

KINDS = ("none", "input", "feature", "output")
FOLDERS = {"resnet26": "cifar10_rn26_gn", "resnet32": "cifar10_resnet32_bn"}


def damaged(network: nn.Module, names: tuple[str, ...], seed: int) -> nn.Module:
    """A copy with noise on the weights of these tensors, half as large as their deviation."""
    made = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(seed)
    for name, value in made.state_dict().items():
        if name in names and value.is_floating_point() and value.ndim > 1:
            value.add_(0.5 * value.std() * torch.randn(value.shape, generator=generator))
    return made


def cases(network: nn.Module, name: str, data: Path, rows: Tensor, seed: int):
    """Yields (case, kind, block, features of the new place)."""
    anatomy = anatomy_of(network)

    def seen(model: nn.Module, pixels: Tensor, labels: Tensor) -> Features:
        return block_features(model, anatomy, normalise(pixels, name).split(50), labels)

    clean = read_images(data, "clean")
    plain = seen(network, clean.pixels[rows], clean.labels[rows])
    yield "other clean images", "none", None, plain
    yield "labels flipped", "output", "head", Features(plain.blocks, 9 - clean.labels[rows])
    for corruption in corruptions_in(data):
        if corruption != "clean":
            images = read_images(data, corruption)
            yield corruption, "input", "block1", seen(network, images.pixels[rows], images.labels[rows])
    first = anatomy.names[0]
    for block in anatomy.names[:-1]:
        broken = damaged(network, anatomy[block].tensors, seed)
        kind = "input" if block == first else "feature"
        yield f"{block} damaged", kind, block, seen(broken, clean.pixels[rows], clean.labels[rows])


def main() -> None:
    """Diagnose every case, count, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", required=True)
    parser.add_argument("--images", type=int, default=100, help="of the source, and of the new place")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--networks", nargs="+", default=["resnet26", "resnet32"], choices=FOLDERS)
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    said: Counter[tuple[bool, str, str]] = Counter()
    blocks: dict[tuple[bool, str], list[bool]] = {}
    sure: dict[bool, list[float]] = {True: [], False: []}
    gains: dict[int, list[float]] = {}
    clean = read_images(given.data, "clean")
    for name in given.networks:
        network = load_network(name, given.models).eval()
        for seed in range(given.seeds):
            order = torch.randperm(len(clean.labels), generator=torch.Generator().manual_seed(seed))
            ours, rows = order[: given.images], order[given.images : 2 * given.images]
            pixels = normalise(clean.pixels[ours], name).split(50)
            source = block_features(network, anatomy_of(network), pixels, clean.labels[ours])
            reference = Reference.of(source, name)
            for case, kind, block, target in cases(network, name, given.data, rows, seed):
                for labelled in (False, True):
                    if kind == "output" and not labelled:
                        continue
                    features = target if labelled else Features(target.blocks)
                    found = judged(features, reference)
                    said[labelled, kind, found.kind] += 1
                    blocks.setdefault((labelled, case), []).append(found.target == block)
                    sure[(found.kind, found.target) == (kind, block)].append(found.sure or 0.0)
                    print(name, seed, case, labelled, found.kind, found.target, found.sure, flush=True)
            for corruption in ("gaussian_noise", "contrast"):
                images = read_images(given.data, corruption)
                seen = block_features(
                    network, anatomy_of(network), normalise(images.pixels[rows], name).split(50), images.labels[rows]
                )
                for count, one in spread_against_random(seen.last, images.labels[rows], 10, (10, 20)).items():
                    gains.setdefault(count, []).append(one.value)
    confusion = []
    for labelled in (False, True):
        for kind in KINDS:
            counts = [said[labelled, kind, other] for other in KINDS]
            if sum(counts):
                right = wilson_interval(counts[KINDS.index(kind)], sum(counts))
                share = f"{100 * right.value:.0f}% ({100 * right.low:.0f} to {100 * right.high:.0f})"
                confusion.append([kind, "yes" if labelled else "no", *map(str, counts), share])
    each = []
    for case in dict.fromkeys(case for _, case in blocks):
        cells = [blocks.get((labelled, case)) for labelled in (False, True)]
        each.append([case, *("-" if one is None else f"{sum(one)} of {len(one)}" for one in cells)])
    certain = [f"{100 * sum(one) / len(one):.0f}% (n={len(one)})" if one else "-" for one in sure.values()]
    gain = [
        f"{count} labels {100 * one.value:+.1f} ({100 * one.low:+.1f} to {100 * one.high:+.1f})"
        for count, one in ((count, mean_interval(values)) for count, values in gains.items())
    ]
    where = machine("cpu")
    note = (
        f"CIFAR-10 and CIFAR-10-C, the severity that the folder has, {' and '.join(given.networks)}, {given.seeds} "
        f"seeds, {given.images} source and {given.images} new images each; Wilson's 95% intervals, as if cases were "
        "independent, which those of one seed are not. Mean share of halves that agree: "
        f"{certain[0]} where the verdict is right, {certain[1]} where it is not. Accuracy of the probe with images "
        "chosen by clusters minus at random, points, over networks, seeds and two corruptions, Student's t: "
        f"{'; '.join(gain)}. {where['cpu']}, load average {os.getloadavg()[2]:.1f}."
    )
    heading = ["what it is", "labels", *(f"said: {kind}" for kind in KINDS), "right"]
    tables = [TextTable(heading, confusion), TextTable(["case", "block found", "with labels"], each, note)]
    text = "\n".join(one.markdown() for one in tables)
    print(text)
    if given.markdown:
        given.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    with torch.no_grad():
        main()
