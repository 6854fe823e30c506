"""Is the damaged block the one to tune? Noise on the weights of one block, then every block is tuned (paper, Sec. 3.3).

::

    python recipes/synthetic.py --data PATH/clean.parquet --network resnet26

adds Gaussian noise to the weights of one block of a trained network, tunes each block, `all`, and all with Auto-RGN on
1,000 clean CIFAR-10 images, and shows test accuracy for every pair (paper, Table 5), the RGN of every block at the
start (Figure 5) and Auto-RGN's rates by epoch (Figure 6). ``--noise`` is in units of each tensor's root mean square.

Protocol: that of ``recipes/cifar10c.py`` with fewer epochs: 1,000 images to tune, 200 to validate, 800 to test; Adam,
batch 64; the rate is chosen by validation accuracy on seed 0 and kept for the other seeds, the epoch by that of each
run. The seed also draws the noise. Processes share the ledger and can be killed and started again.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader

from paper.cifar import read_images, split
from paper.cifar_networks import NETWORKS, load_network, normalise
from paper.grids import Cell, grid_parser, parse_grid, shard
from peft_surgical import anatomy_of, score_blocks
from peft_surgical.choosing.pace import block_means
from peft_surgical.errors import run_in_words
from peft_surgical.evaluation import TextTable, accuracy, plus_minus, predict_logits
from peft_surgical.training.fitting import FitSettings, fit
from peft_surgical.training.ledger import Ledger

METHODS = ["none", "block1", "block2", "block3", "head", "all", "auto-rgn"]


def damaged(args: argparse.Namespace, block: str, seed: int) -> nn.Module:
    """The network with noise on the parameters of one block, drawn with the seed."""
    network = load_network(args.network, args.models)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in anatomy_of(network)[block].tensors:
            tensor = network.state_dict()[name]  # shares memory with the network
            if isinstance(dict(network.named_parameters()).get(name), nn.Parameter):
                scale = args.noise * tensor.square().mean().sqrt()
                tensor += scale * torch.randn(tensor.shape, generator=generator)
    return network


def run(args: argparse.Namespace, key: dict[str, Any]) -> dict[str, Any]:
    """Damage, tune, test: one entry of the ledger."""
    images = read_images(args.data)
    parts = split(images.labels, key["seed"])
    inputs = normalise(images.pixels, args.network)
    tuning, validation = (
        [{"pixel_values": inputs[i], "labels": images.labels[i]} for i in part.tolist()] for part in parts[:2]
    )
    network = damaged(args, key["noise_on"], key["seed"])
    if key["method"] == "none":
        drawn = torch.Generator().manual_seed(key["seed"])
        scores = score_blocks(network, DataLoader(tuning, 64, shuffle=True, generator=drawn))
        tested = accuracy(predict_logits(network, inputs[parts.test]), images.labels[parts.test])
        return {"validation": 0.0, "test": tested, "rgn": dict(scores.block_scores)}
    found = fit(network, key["method"], tuning, validation, FitSettings(key["lr"], key["epochs"], seed=key["seed"]))
    tested = accuracy(predict_logits(found.model, inputs[parts.test]), images.labels[parts.test])
    result = {"validation": found.validation, "epoch": found.best_epoch, "cost": found.cost, "test": tested}
    if found.record:
        anatomy = anatomy_of(load_network(args.network, args.models))
        result["factors"] = [block_means(factors, anatomy) for _, factors in sorted(found.record.items())]
    rate, shown = f"{key['lr']:g}", f"{100 * tested:.1f} %"
    print(f"noise on {key['noise_on']}, tuned {key['method']} at {rate}, seed {key['seed']}: {shown}", flush=True)
    return result


def cell(args: argparse.Namespace, block: str, method: str) -> Cell:
    settings = {"recipe": "synthetic", "network": args.network, "noise": args.noise, "noise_on": block}
    settings |= {"method": method, "epochs": args.epochs, "images": 1000}
    rates = (None,) if method == "none" else tuple(args.head_lr if method == "head" else args.lr)
    return Cell(settings, rates, tuple(args.seeds))


def show(args: argparse.Namespace, ledger: Ledger, blocks: Sequence[str]) -> None:
    """Table 5 as text and Markdown; Figures 5 and 6."""
    runs = {(b, m): cell(args, b, m).reported(ledger) for b in blocks for m in args.methods}
    lines = [[b, *(plus_minus([run.result["test"] for run in runs[b, m]]) for m in args.methods)] for b in blocks]
    caption = (
        f"{args.network}, Gaussian noise of {args.noise:g} x RMS on the parameters of one block. Test accuracy in "
        "percent on 800 clean images, mean ± half the 95% interval (Student's t) over seeds "
        f"{', '.join(map(str, args.seeds))}, which draw noise and split; {args.epochs} epochs on 1,000 images. "
        "Selection: rate by validation accuracy of seed 0, epoch by that of each run; no test image had a say."
    )
    header = ["noise on", *args.methods]
    table = TextTable(header, lines, caption)
    table.show()
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    table.save(folder / f"synthetic-{args.network}.md")

    figure = Figure(figsize=(4 * len(blocks), 6), layout="constrained")
    axes = figure.subplots(2, len(blocks), squeeze=False)
    for column, block in enumerate(blocks):
        start = [run.result["rgn"] for run in runs[block, "none"]] if (block, "none") in runs else []
        axes[0, column].bar(
            list(start[0]) if start else [], [fmean(s[b] for s in start) for b in start[0]] if start else []
        )
        axes[0, column].set(title=f"noise on {block}", ylabel="RGN before tuning")
        for one in runs.get((block, "auto-rgn"), [])[:1]:
            for name in one.result["factors"][0]:
                axes[1, column].plot([epoch[name] for epoch in one.result["factors"]], marker=".", label=name)
            axes[1, column].set(xlabel="epoch", ylabel="Auto-RGN's factor, seed 0")
            axes[1, column].legend()
    figure.savefig(folder / f"synthetic-{args.network}.png", dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    parser = grid_parser(
        __doc__, output="outputs/synthetic", data="parquet file of clean CIFAR-10 images", seeds=(0, 1, 2)
    )
    add = parser.add_argument
    add("--noise", type=float, default=0.7, help="in units of each tensor's root mean square")
    add("--blocks", nargs="+", help="where to add noise (default: every block)")
    add("--methods", nargs="+", default=METHODS)
    add("--lr", type=float, nargs="+", default=[1e-3, 1e-4])
    add("--head-lr", type=float, nargs="+", default=[1e-1, 1e-2])
    add("--epochs", type=int, default=5)
    args = parse_grid(parser, argv)
    ledger = Ledger(args.ledger)
    blocks = args.blocks or anatomy_of(NETWORKS[args.network].build()).names
    cells = [cell(args, block, method) for block in blocks for method in args.methods]
    for one in [] if args.table else shard(cells, *args.shard):
        one.fill(ledger, functools.partial(run, args))
    show(args, ledger, blocks)


if __name__ == "__main__":
    sys.exit(run_in_words(main))
