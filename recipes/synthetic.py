"""Is the damaged block the one to tune? Noise on the weights of one block, then every block is tuned (paper, Sec. 3.3).

::

    python recipes/synthetic.py --data PATH/clean.parquet --models MODELS --epochs 3

adds Gaussian noise to the weights of one block of a trained network, tunes each block, `all`, and all with Auto-RGN on
1,000 clean CIFAR-10 images, and shows test accuracy for every pair (paper, Table 5), the RGN of every block at the
start (Figure 5) and Auto-RGN's rates by epoch (Figure 6). ``--noise`` is in units of each tensor's root mean square.
Expect, in percent of 800 test images (ResNet-26, docs/results/synthetic-resnet26.md): on noise in block 1 tuning it
gives 84.3 from 62.6, all 82.0; in block 2 84.2 from 58.0, all 84.3; in block 3 60.0 from 17.8, all 62.1.

Each damaged block is a study with a folder of its own; the rows of all of them are ``OUTPUT/rows.jsonl``, from which
``--table`` draws table and figure alone. Protocol: that of ``recipes/cifar10c.py`` with fewer epochs and two rates. The
seed also draws the noise.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure

from accelerate import PartialState
from paper.cifar_networks import NETWORKS, open_network
from paper.cifar_tasks import CIFAR10_HUB_ID, read_cifar, task_images
from paper.protocol import Protocol, parser_of, rows_of
from paper.rows import reported, write_rows
from paper.study import run_study
from peft_surgical import anatomy_of
from peft_surgical.bases import Base
from peft_surgical.errors import run_in_words
from peft_surgical.evaluation import TextTable, plus_minus
from peft_surgical.experiment.experiment import Experiment
from peft_surgical.training.fitting import FitSettings
from peft_surgical.training.ledger import Ledger, Run
from peft_surgical.training.search import NONE

PROTOCOL = Protocol(
    name="Synthetic",
    data=CIFAR10_HUB_ID,
    layouts="a parquet file of clean CIFAR-10 images, a folder with clean.parquet, or the Hub id",
    model="resnet26",
    rows=("block1", "block2", "block3", "head", "all", "auto-rgn"),
    lrs=(1e-3, 1e-4),
    head_lrs=(1e-1, 1e-2),
    fitting=FitSettings(lr=1e-3, epochs=5, batch_size=64, optimizer="adam", weight_decay=1e-4),
    reference="chosen here; the question: paper, Sec. 3.3",
)


def open_damaged(models: str | None, noise: float, block: str, name: str, *, seed: int = 0, **how: Any) -> Base:
    """The network with noise on the parameters of one block, drawn with the seed."""
    base = open_network(models, name, seed=seed, **how)
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(base.model.named_parameters())
    with torch.no_grad():
        for tensor in anatomy_of(base.model)[block].tensors:
            if (value := parameters.get(tensor)) is not None:
                scale = noise * value.square().mean().sqrt()
                value += scale * torch.randn(value.shape, generator=generator)
    return base


def settings_of(args: argparse.Namespace, block: str, method: str) -> dict[str, Any]:
    found = {"recipe": "synthetic", "network": args.model, "noise": args.noise, "noise_on": block, "method": method}
    found |= {"epochs": args.epochs, "images": args.tuning_images}
    return found if args.test_images is None else found | {"test_images": args.test_images}


def study(args: argparse.Namespace, rows: Ledger, block: str) -> None:
    """One damaged block: trains what is missing, and writes its rows."""

    def export(experiment: Experiment, found: Mapping[str, list[Run]]) -> None:
        def measured(run: Run) -> dict[str, Any]:
            seed = run.key["seed"]
            sizes = {"n": len(experiment.rows("test", seed)), "of": len(task_images("clean", str(args.data)).labels)}
            if run.key["method"] != NONE:
                return sizes
            return {**sizes, "rgn": dict(experiment.scores("rgn", seed).block_scores)}

        write_rows(rows, experiment, found, functools.partial(settings_of, args, block), measured)

    sizes = {"tuning": args.tuning_images, "validation": args.validation_images, "test": args.test_images}
    run_study(
        replace(PROTOCOL, name=f"CIFAR-10, noise on {block}"),
        argparse.Namespace(**{**vars(args), "output": str(Path(args.output, args.model, block))}),
        lambda seed: read_cifar("clean", args.data, seed=seed, **sizes),
        opener=functools.partial(open_damaged, args.models, args.noise, block),
        seeded_base=True,
        export=export,
    )


def cell(args: argparse.Namespace, rows: Sequence[Run], block: str, method: str) -> list[Run]:
    rates = (None,) if method == NONE else tuple(args.head_lr if method == "head" else args.lr)
    return reported(rows, settings_of(args, block, method), rates, args.seeds)


def table(args: argparse.Namespace, rows: Sequence[Run]) -> TextTable:
    """The paper's Table 5."""
    methods = rows_of(PROTOCOL, args.target, args.method)
    runs = {block: {m: cell(args, rows, block, m) for m in methods} for block in args.blocks}
    known = next((run.result for found in runs.values() for some in found.values() for run in some), {})
    # Rows that do not say so are of a file of 2,000 images.
    test, images = known.get("n", 800), args.tuning_images
    others, fixed = known.get("of", 2000) - test - images, args.test_images is not None
    # What seeds share, see `mean_interval`: the split is cut anew, or the test images are fixed.
    ratio = images / max(others, 1) if fixed else test / images
    tests = {block: {m: [run.result["test"] for run in some] for m, some in by.items()} for block, by in runs.items()}
    lines = []
    for block, found in tests.items():
        gains = [a - b for a, b in zip(found.get(block, []), found.get("all", []), strict=False)]
        lines.append(
            [block, *(plus_minus(found[m], ratio=ratio) for m in methods), plus_minus(gains, sign="+", ratio=ratio)]
        )
    drawn = "which draw noise, tuning and validation images" if fixed else "which draw noise and split"
    caption = (
        f"{args.model}, Gaussian noise of {args.noise:g} x RMS on the parameters of one block. Test accuracy in "
        f"percent on {test} clean images{', the same for every seed' if fixed else ''}, mean ± half the 95% "
        f"interval (Student's t) over seeds {', '.join(map(str, args.seeds))}, {drawn}, corrected for the images that "
        f"seeds share (Nadeau & Bengio 2003); {args.epochs} epochs on {args.tuning_images:,} images. Last column: "
        "points of the damaged block tuned above all tuned, paired by seed. Selection: rate by validation accuracy of "
        "seed 0, epoch by that of each run; nothing was selected on test images. The paper's noise is not known."
    )
    return TextTable(["noise on", *methods, "block minus all"], lines, caption)


def draw(args: argparse.Namespace, rows: Sequence[Run], file: Path) -> None:
    """Figures 5 and 6 of the paper."""
    figure = Figure(figsize=(4 * len(args.blocks), 6), layout="constrained")
    axes = figure.subplots(2, len(args.blocks), squeeze=False)
    for column, block in enumerate(args.blocks):
        start = [run.result["rgn"] for run in cell(args, rows, block, NONE)]
        names = list(start[0]) if start else []
        axes[0, column].bar(names, [fmean(scores[name] for scores in start) for name in names])
        axes[0, column].set(title=f"noise on {block}", ylabel="RGN before tuning")
        for run in cell(args, rows, block, "auto-rgn")[:1]:
            for name in run.result["factors"][0]:
                axes[1, column].plot([epoch[name] for epoch in run.result["factors"]], marker=".", label=name)
            axes[1, column].set(xlabel="epoch", ylabel=f"Auto-RGN's factor, seed {run.key['seed']}")
            axes[1, column].legend()
    figure.savefig(file, dpi=100)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(PROTOCOL, __doc__)
    add = parser.add_argument
    add("--models", metavar="FOLDER", help="with the networks' weights; default: PEFT_SURGICAL_SHARED")
    add("--model", choices=tuple(NETWORKS), default=PROTOCOL.model, help="default: %(default)s")
    add("--noise", type=float, default=0.7, help="in units of each tensor's root mean square; default: %(default)s")
    add("--blocks", nargs="+", help="where to add noise; default: every block")
    add("--tuning-images", type=int, default=1000, metavar="N", help="default: %(default)s")
    fixed = "images to test on, the same for every seed; default: those that are left, other ones for each seed"
    add("--test-images", type=int, metavar="N", help=fixed)
    add("--rows", metavar="FILE", help="results from which the table is drawn; default: OUTPUT/rows.jsonl")
    add("--table", action="store_true", help="only draw from the rows, train nothing")
    args = parser.parse_args(argv)
    args.rows = Path(args.rows or Path(args.output, "rows.jsonl"))
    args.blocks = args.blocks or anatomy_of(NETWORKS[args.model].build()).names
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    rows = Ledger(args.rows)
    for block in () if args.table else args.blocks:
        study(args, rows, block)
        if args.dry_run:
            return
    if args.table or PartialState().is_main_process:
        found = table(args, rows.runs())
        found.show()
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        found.save(folder / f"synthetic-{args.model}.md")
        draw(args, rows.runs(), folder / f"synthetic-{args.model}.png")


if __name__ == "__main__":
    sys.exit(run_in_words(main))
