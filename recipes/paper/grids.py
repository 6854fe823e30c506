"""The command line of recipes that fill a grid of runs of the CIFAR networks, by processes that share a ledger."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from .cifar_networks import NETWORKS


def grid_parser(description: str | None, *, output: str, data: str, seeds: Sequence[int]) -> argparse.ArgumentParser:
    """A parser with the options that all of these recipes have; a recipe adds its own.

    Args:
        description: The recipe's docstring.
        output: Default folder of what the recipe leaves.
        data: What ``--data`` is.
        seeds: Default seeds.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--network", choices=list(NETWORKS), default="resnet26")
    add("--models", help="folder with the networks' weights (default: PEFT_SURGICAL_SHARED)")
    add("--data", help=data)
    add("--seeds", type=int, nargs="+", default=list(seeds), help="seed 0 also chooses among candidates")
    add("--output", default=output, help=f"what is left there (default: {output})")
    add("--ledger", help="finished runs, may be shared by processes (default: OUTPUT/ledger.jsonl)")
    add("--shard", default="1/1", help="i/n: only the i-th of n parts of the grid")
    add("--threads", type=int, help="torch threads; 1 where several processes share the machine")
    add("--table", action="store_true", help="only draw from the ledger, train nothing")
    add("--markdown", help="also write the table to this file")
    return parser


def parse_grid(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; ``ledger`` becomes a path, ``shard`` a pair of numbers. Sets torch's threads, and transformers silent."""
    args = parser.parse_args(argv)
    args.ledger = Path(args.ledger or Path(args.output, "ledger.jsonl"))
    if not args.data and not args.table:
        parser.error("--data is needed to train; without it --table draws what the ledger holds")
    parts = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", args.shard)
    if not parts or int(parts[1]) > int(parts[2]):
        parser.error(f"--shard {args.shard}: write i/n with i from 1 to n, such as 1/2 and 2/2")
    args.shard = int(parts[1]), int(parts[2])
    transformers.logging.set_verbosity_error()
    if args.threads:
        torch.set_num_threads(args.threads)
    return args
