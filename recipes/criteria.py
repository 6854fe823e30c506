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
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from paper.cifar_networks import NETWORKS, load_network, normalise
from paper.cifar_tasks import read_cifar, task_images
from paper.rows import chosen_runs
from peft_surgical import score_blocks
from peft_surgical.choosing import CRITERIA
from peft_surgical.errors import DataError, run_in_words
from peft_surgical.evaluation import TextTable, plus_minus
from peft_surgical.training.ledger import Ledger

BLOCKS = ("block1", "block2", "block3")
TARGETS = (*BLOCKS, "head")
BATCH, BATCHES = 40, 5
"""Images of a minibatch, and how many are scored."""


def scored(args: argparse.Namespace, network: str, task: str, key: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Criterion -> block -> score, on the images that tuned."""
    sizes = {"tuning": key["tuning_images"], "validation": key["validation_images"], "test": key["test_images"]}
    data = read_cifar(task, args.data, seed=key["seed"], **sizes)
    pixels = task_images(task, str(args.data))
    at = torch.tensor([int(name.split()[-1]) for name in data.tuning["file"]])
    at = at[torch.randperm(len(at), generator=torch.Generator().manual_seed(key["seed"]))]
    images, labels = normalise(pixels.pixels[at], network), pixels.labels[at]
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    base = load_network(network, args.models)
    return {name: dict(score_blocks(base, batches, name, BATCHES)) for name in CRITERIA}


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
        counted = ", ".join(f"{target} {picked.count(target)}" for target in TARGETS if target in picked)
        lines.append([name, *shown, f"{hits} of {len(every)}", counted])
    caption = (
        "Points of test accuracy of the chosen block or head, tuned alone, minus those of the one that tests best; "
        f"mean over tasks and networks ± half the 95% interval (Student's t), seeds {', '.join(map(str, seeds))}. "
        f"Criteria score the untuned network on {BATCHES} batches of {BATCH} tuning images. Cross-Val: the block that "
        "validates best once it is tuned, as in the paper; with head: the head is a candidate, too."
    )
    return TextTable(["choice", *tasks, "best found", "chosen"], lines, caption)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", required=True, help="what recipes/cifar10c.py measured")
    add("--data", help="folder of <corruption>.parquet; needed where a cell is not in --ledger yet")
    add("--models", help="folder with the networks' weights; default: PEFT_SURGICAL_SHARED")
    add("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS), help="default: %(default)s")
    add("--seeds", nargs="+", type=int, default=[0], help="default: 0")
    add("--ledger", help="scores so far; default: criteria.jsonl beside --rows")
    add("--markdown", metavar="FILE", help="also write the table to this file")
    args = parser.parse_args(argv)
    rows, ledger = Ledger(args.rows).runs(), Ledger(args.ledger or Path(args.rows).with_name("criteria.jsonl"))
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for network in args.networks:
        for task in sorted({run.key["task"] for run in rows}):
            measured = [runs for seed in args.seeds if (runs := chosen_runs(rows, network, task, seed, TARGETS))]
            for runs in measured if len(measured) == len(args.seeds) else ():
                key = {"recipe": "criteria", "network": network, "task": task}
                key |= {name: runs["head"].key[name] for name in ("seed", "tuning_images")}
                if ledger.find(key) is None:
                    if not args.data:
                        parser.error(f"{network} on {task} is not in {ledger.file}: give --data")
                    ledger.append(key, scored(args, network, task, runs["head"].key))
                scores = ledger.find(key) or {}
                chosen = {name: max(TARGETS, key=scores[name].__getitem__) for name in CRITERIA}
                for name, among in (("Cross-Val", BLOCKS), ("Cross-Val with head", TARGETS)):
                    chosen[name] = max(among, key=lambda target: runs[target].result["validation"])
                test = {name: run.result["test"] for name, run in runs.items()}
                cells.setdefault((network, task), []).append({"chosen": chosen, "test": test})
    if not cells:
        raise DataError(f"{args.rows} has no task with rows of {', '.join(TARGETS)} for seeds {args.seeds}")
    shown = table(cells, args.seeds)
    shown.show()
    if args.markdown:
        shown.save(args.markdown)


if __name__ == "__main__":
    sys.exit(run_in_words(main))
