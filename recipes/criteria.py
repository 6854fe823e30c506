"""What the block that a criterion scores highest is worth, beside the best one and the paper's Cross-Val.

::

    python recipes/criteria.py --rows OUTPUT/rows.jsonl --data FOLDER --models MODELS

takes the rows that ``recipes/cifar10c.py --test-images 800`` has measured of every block and the head, each at its
chosen rate, scores the untuned network's blocks on the same tuning images, and looks up how accurate the block with the
highest score is on the test images once it is tuned. It trains nothing, and no test image is scored.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from paper.cifar_cells import cell_parser, found_in_cells, images_of
from paper.cifar_networks import load_network
from paper.cifar_tables import BLOCKS
from peft_surgical import score_blocks
from peft_surgical.choosing import CRITERIA
from peft_surgical.errors import run_in_words
from peft_surgical.evaluation import TextTable, plus_minus
from peft_surgical.training.ledger import Run

BATCH, BATCHES = 40, 5
"""Images of a minibatch, and how many are scored."""


def scored(args: argparse.Namespace, network: str, task: str, run: Run) -> dict[str, dict[str, float]]:
    """Criterion -> block -> score, on the images that tuned."""
    images, labels = images_of(args.data, network, task, run)["tuning"]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(run.key["seed"]))
    batches = list(zip(images[order].split(BATCH), labels[order].split(BATCH), strict=True))
    base = load_network(network, args.models)
    return {name: dict(score_blocks(base, batches, name, BATCHES)) for name in CRITERIA}


def chosen(runs: Mapping[str, Run], scores: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """What each criterion and Cross-Val choose, and the test accuracy of each target."""
    found = {name: max(BLOCKS, key=scores[name].__getitem__) for name in CRITERIA}
    for name, among in (("Cross-Val", BLOCKS[:-1]), ("Cross-Val with head", BLOCKS)):
        found[name] = max(among, key=lambda target: runs[target].result["validation"])
    return {"chosen": found, "test": {name: run.result["test"] for name, run in runs.items()}}


def table(cells: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]], seeds: Sequence[int]) -> TextTable:
    """Points of test accuracy below the best of the blocks and the head; how often it was found."""
    tasks = {"CIFAR-10-C": [what for what in cells if what[1] != "flip"]}
    tasks["CIFAR-Flip"] = [what for what in cells if what[1] == "flip"]
    every = [one for found in cells.values() for one in found]
    lines = []
    for name in every[0]["chosen"]:
        below: dict[tuple[str, str], float] = {}
        for what, found in cells.items():
            below[what] = fmean(one["test"][one["chosen"][name]] - max(one["test"].values()) for one in found)
        shown = [plus_minus([below[what] for what in some]) for some in tasks.values()]
        hits = sum(one["test"][one["chosen"][name]] == max(one["test"].values()) for one in every)
        picked = [one["chosen"][name] for one in every]
        counted = ", ".join(f"{target} {picked.count(target)}" for target in BLOCKS if target in picked)
        lines.append([name, *shown, f"{hits} of {len(every)}", counted])
    caption = (
        "Points of test accuracy of the chosen block or head, tuned alone, minus those of the one that tests best; "
        f"mean over tasks and networks ± half the 95% interval (Student's t), seeds {', '.join(map(str, seeds))}. "
        f"Criteria score the untuned network on {BATCHES} batches of {BATCH} tuning images. Cross-Val: the block that "
        "validates best once it is tuned, as in the paper; with head: the head is a candidate, too."
    )
    return TextTable(["choice", *tasks, "best found", "chosen"], lines, caption)


def main(argv: Sequence[str] | None = None) -> None:
    parser = cell_parser(__doc__)
    args = parser.parse_args(argv)

    def scored_for(runs: Mapping[str, Run]) -> dict[str, Any]:
        key = runs["head"].key
        images = ("data", "severity", "tuning_images", "validation_images", "test_images")
        return {"criteria": list(CRITERIA), **{name: key.get(name) for name in images}}

    found = found_in_cells(
        parser,
        args,
        "criteria",
        BLOCKS,
        lambda network, task, runs: scored(args, network, task, runs["head"]),
        found_for=scored_for,
    )
    shown = table({what: [chosen(*one) for one in each] for what, each in found.items()}, args.seeds)
    shown.show()
    if args.markdown:
        shown.save(args.markdown)


if __name__ == "__main__":
    sys.exit(run_in_words(main))
