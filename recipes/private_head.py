"""What does privacy cost? The head of a CIFAR-10 network, tuned under differential privacy on corrupted images.

::

    python recipes/private_head.py --data CIFAR10C --public PATH/test.parquet --models MODELS

tunes the head of the ResNet-26 on the features of 1,000 images of a corruption by noisy gradient descent
(`peft_surgical.training.private`), for every epsilon, with the features as they are, normalised, and reduced by PCA to
their first 9 components (Wang et al. 2024, "Neural Collapse Meets Differential Privacy": for 10 classes that collapse,
9 directions tell everything). Mean and components are those of 2,000 public images: CIFAR-10 test images in
``--public`` that are not among the corrupted ones. Measured: docs/results/private-resnet26.md.

800 test images are the same for every seed; tuning images are drawn from the others. Nothing is selected on these
tasks: steps, reach and clipping are the package's defaults. The seeds also draw the noise, so that the numbers can be
repeated; whoever needs the guarantee leaves the seed out.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paper.cifar import Images, read_images, split
from paper.cifar_networks import NETWORKS, load_network, normalise
from peft_surgical import anatomy_of
from peft_surgical.errors import DataError, run_in_words
from peft_surgical.evaluation import TextTable, accuracy, plus_minus
from peft_surgical.training.ledger import Ledger, Run
from peft_surgical.training.private import PRIVACY_DELTA, REACH, STEPS, Basis, plain_basis, private_moves, public_basis

TUNING, TEST, PUBLIC, COMPONENTS = 1000, 800, 2000, 9
BASES = {
    "as they are": lambda features: plain_basis(features.shape[1]),
    "normalised": functools.partial(public_basis, normalise=True),
    "PCA": functools.partial(public_basis, components=COMPONENTS),
    "PCA, normalised": functools.partial(public_basis, components=COMPONENTS, normalise=True),
}


def head_of(network: nn.Module) -> nn.Linear:
    """The network's last layer."""
    (path,) = anatomy_of(network)["head"].modules
    found: Any = network.get_submodule(path)
    return found


def features_of(network: nn.Module, images: Images, name: str) -> Tensor:
    """The inputs of the head (n, width), float64."""
    kept: list[Tensor] = []
    hook = head_of(network).register_forward_pre_hook(lambda module, given: kept.append(given[0].double()))
    with torch.no_grad():
        for pixels in images.pixels.split(250):
            network(normalise(pixels, name))
    hook.remove()
    return torch.cat(kept)


def public_images(file: str, folder: str) -> Images:
    """Images of a file that are not among the clean ones of the corrupted folder."""
    private = {image.numpy().tobytes() for image in read_images(folder, "clean").pixels}
    images = read_images(file)
    rows = [row for row, image in enumerate(images.pixels) if image.numpy().tobytes() not in private][:PUBLIC]
    if not rows:
        raise DataError(f"{file} holds no image that is not also in {folder}: give other images of the source")
    return Images(images.pixels[rows], images.labels[rows])


def key_of(args: argparse.Namespace, task: str, basis: str, epsilon: float | None, seed: int) -> dict[str, Any]:
    """What determines a row; ``epsilon`` is None without noise, and ``basis`` is none where nothing was tuned."""
    found = {"recipe": "private_head", "network": args.model, "task": task, "basis": basis, "epsilon": epsilon}
    return found | {"delta": PRIVACY_DELTA, "steps": STEPS, "reach": REACH, "images": TUNING, "seed": seed}


def measure(args: argparse.Namespace, rows: Ledger) -> None:
    """Everything that is missing in the rows."""
    network = load_network(args.model, args.models)
    head = head_of(network)
    weight, bias = head.weight.detach().double(), head.bias.detach().double()
    public = features_of(network, public_images(args.public, args.data), args.model)
    bases: dict[str, Basis] = {name: make(public) for name, make in BASES.items()}
    for task in args.tasks:
        images = read_images(args.data, task)
        features = features_of(network, images, args.model)

        def tested(seed: int, moved: Tensor, shift: Tensor) -> dict[str, float]:
            test = split(images.labels, seed, test=TEST).test  # noqa: B023
            logits = features[test] @ (weight + moved).T + bias + shift  # noqa: B023
            return {"test": accuracy(logits, images.labels[test]), "n": len(test)}  # noqa: B023

        for seed in args.seeds:
            if rows.find(key := key_of(args, task, "none", None, seed)) is None:
                rows.append(key, tested(seed, torch.zeros_like(weight), torch.zeros_like(bias)))
        for seed, (name, basis), epsilon in itertools.product(args.seeds, bases.items(), args.epsilon):
            finite = None if math.isinf(epsilon) else epsilon
            if rows.find(key := key_of(args, task, name, finite, seed)) is not None:
                continue
            drawn = split(images.labels, seed, test=TEST).tune
            *moves, told = private_moves(
                features[drawn], images.labels[drawn], weight, bias, epsilon=epsilon, basis=basis, seed=seed
            )
            rows.append(key, tested(seed, *moves) | told)


def table(args: argparse.Namespace, rows: Sequence[Run]) -> TextTable:
    """Accuracy by features and epsilon."""
    found = {(r.key["task"], r.key["basis"], r.key["epsilon"], r.key["seed"]): r.result for r in rows}

    def cell(task: str, basis: str, epsilon: float | None) -> str:
        values = [found[task, basis, epsilon, seed]["test"] for seed in args.seeds]
        return plus_minus(values, ratio=0 if basis == "none" else TUNING / (2000 - TEST - TUNING))

    asked = [None if math.isinf(epsilon) else epsilon for epsilon in args.epsilon]
    header = ["task", "features", "not tuned", *("no noise" if e is None else f"epsilon {e:g}" for e in asked)]
    lines = [
        [task, basis, cell(task, "none", None), *(cell(task, basis, epsilon) for epsilon in asked)]
        for task in args.tasks
        for basis in BASES
    ]
    caption = (
        f"{args.model}, the head alone by {STEPS} steps of noisy gradient descent on {TUNING:,} images. Test accuracy "
        f"in percent on {TEST} images, the same for every seed; mean ± half the 95% interval (Student's t) over seeds "
        f"{', '.join(map(str, args.seeds))}, which draw tuning images and noise, corrected for the images that seeds "
        f"share (Nadeau & Bengio 2003). Delta {PRIVACY_DELTA:g}; epsilon by Opacus's RDP accountant for the tuning "
        f"images. PCA: {COMPONENTS} components of public images. Nothing was selected on these tasks."
    )
    return TextTable(header, lines, caption)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", metavar="FOLDER", help="with <corruption>.parquet and clean.parquet; needed to train")
    add("--public", metavar="FILE", help="CIFAR-10 images, of which those in --data are left out; needed to train")
    add("--models", metavar="FOLDER", help="with the networks' weights; default: PEFT_SURGICAL_SHARED")
    add("--model", choices=tuple(NETWORKS), default="resnet26", help="default: %(default)s")
    add("--tasks", nargs="+", default=["gaussian_noise", "pixelate"], metavar="T", help="default: %(default)s")
    add("--epsilon", nargs="+", type=float, default=[math.inf, 8.0, 1.0], metavar="E", help="default: %(default)s")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], metavar="S", help="default: %(default)s")
    add("--rows", metavar="FILE", default="outputs/private_head/rows.jsonl", help="default: %(default)s")
    add("--table", action="store_true", help="only draw the table from the rows")
    add("--markdown", metavar="FILE", help="also write the table to this file")
    args = parser.parse_args(argv)
    if not args.table and not (args.data and args.public):
        parser.error("--data and --public are needed to train; --table draws what the rows hold")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    rows = Ledger(Path(args.rows))
    if not args.table:
        measure(args, rows)
    found = table(args, rows.runs())
    found.show()
    if args.markdown:
        found.save(args.markdown)


if __name__ == "__main__":
    sys.exit(run_in_words(main))
