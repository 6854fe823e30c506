"""What ``recipes/criteria.py`` and ``recipes/soups.py`` share: they ask something of runs that are over.

A cell is one network on one task of ``recipes/cifar10c.py --test-images``. What is found for it with a seed is kept in
a ledger, by a key that also names what it was found for.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_surgical.errors import DataError
from peft_surgical.training.ledger import Ledger, Run

from .cifar_networks import NETWORKS, normalise
from .cifar_tasks import read_cifar, task_images
from .rows import reported

Found = list[tuple[dict[str, Run], dict[str, Any]]]
"""For each seed, the runs of a cell by target, and what was found for them."""


def cell_parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that both recipes have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", required=True, help="what recipes/cifar10c.py measured")
    add("--data", help="folder of <corruption>.parquet; needed where a cell is not in --ledger yet")
    add("--models", help="folder with the networks' weights; default: PEFT_SURGICAL_SHARED")
    add("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS), help="default: %(default)s")
    add("--seeds", nargs="+", type=int, default=[0], help="default: 0")
    add("--ledger", help="what was found so far; default: a file beside --rows, named after the recipe")
    add("--markdown", metavar="FILE", help="also write the table to this file")
    return parser


def found_in_cells(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    recipe: str,
    targets: Sequence[str],
    find: Callable[[str, str, Mapping[str, Run]], Mapping[str, Any]],
    *,
    found_for: Callable[[Mapping[str, Run]], Mapping[str, Any]],
    needed: Sequence[str] = ("data",),
) -> dict[tuple[str, str], Found]:
    """(Network, task) -> what is known of its runs, of the cells that have all targets and seeds; finds what is not.

    Args:
        parser: Ends the program where an option is needed that was not given.
        args: The options of `cell_parser`.
        recipe: Its name, in the ledger.
        targets: Those whose runs are looked up.
        find: (network, task, runs by target) -> what is asked.
        found_for: Runs by target -> what the key in the ledger says of them.
        needed: Options without which nothing new can be found.

    Raises:
        DataError: No cell has rows of all targets and seeds.
    """
    rows, ledger = Ledger(args.rows).runs(), Ledger(args.ledger or Path(args.rows).with_name(f"{recipe}.jsonl"))
    cells: dict[tuple[str, str], Found] = {}
    for network in args.networks:
        for task in sorted({run.key["task"] for run in rows}):
            by_seed = [runs for seed in args.seeds if (runs := chosen_runs(rows, network, task, seed, targets))]
            for runs in by_seed if len(by_seed) == len(args.seeds) else ():
                own = next(iter(runs.values())).key
                key = {"recipe": recipe, "network": network, "task": task, "seed": own["seed"], **found_for(runs)}
                if ledger.find(key) is None:
                    if not all(getattr(args, name) for name in needed):
                        options = " and ".join(f"--{name}" for name in needed)
                        parser.error(f"{network} on {task} is not in {ledger.file}: give {options}")
                    ledger.append(key, find(network, task, runs))
                    print(f"{network}, {task}, seed {own['seed']}: {ledger.find(key)}", flush=True)
                cells.setdefault((network, task), []).append((runs, ledger.find(key) or {}))
    if not cells:
        raise DataError(f"{args.rows} has no task with rows of {', '.join(targets)} for seeds {args.seeds}")
    return cells


def chosen_runs(rows: Sequence[Run], network: str, task: str, seed: int, names: Sequence[str]) -> dict[str, Run]:
    """Target -> its run with a seed, at the rate that validates best; empty if a target has none.

    Args:
        rows: Of ``recipes/cifar10c.py``, all with the same numbers of images.
        network: Name of the network.
        task: Corruption, or ``flip``.
        seed: Seed of the run.
        names: Targets.
    """
    found = {}
    for name in names:
        settings = {"recipe": "cifar10c", "network": network, "task": task, "method": name}
        rates = dict.fromkeys(row.key["lr"] for row in rows if settings.items() <= row.key.items())
        for run in reported(rows, settings, tuple(rates) or (None,), [seed]):
            found[name] = run
    return found if len(found) == len(names) else {}


def images_of(data: str, network: str, task: str, run: Run) -> dict[str, tuple[Tensor, Tensor]]:
    """The images of a run: ``tuning``, ``validation``, ``test`` -> input of the network, and labels.

    Args:
        data: Folder of ``<corruption>.parquet``.
        network: Key of `cifar_networks.NETWORKS`.
        task: Corruption, or ``flip``.
        run: Says seed, severity and numbers of images.

    Returns:
        For each part float32 (n, 3, 32, 32) and int64 (n,).
    """
    key = run.key
    sizes = {part: key[f"{part}_images"] for part in ("tuning", "validation", "test")}
    severity = key.get("severity") or 5  # CIFAR-Flip has none
    parts = read_cifar(task, data, severity=severity, seed=key["seed"], **sizes).parts
    images, found = task_images(task, str(data), severity), {}
    for part in sizes:
        at = torch.tensor([int(name.split()[-1]) for name in parts[part]["file"]])
        found[part] = normalise(images.pixels[at], network), images.labels[at]
    return found
