"""Kills, full disks, too little memory and many processes: what is saved is whole, and what was begun goes on.

::

    python benchmarks/stress.py saves ledger --minutes 10      # these, ten minutes each; goes on where it stopped
    python benchmarks/stress.py all --minutes 5                # each of them
    python benchmarks/stress.py all --minutes 0 --markdown docs/results/stress.md       # the table of what there is

Each is a function in `stressing.rounds`: a round from a number, so that a finding can be looked at again
(``--seed NUMBER``), with its counts and its findings. What a round promises is the first line of its docstring.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from stressing.rounds import ROUNDS
from stressing.soak import growth

from peft_surgical.evaluation import TextTable

EMPTY: dict[str, Any] = {"rounds": 0, "minutes": 0.0, "counts": {}, "findings": [], "memory": []}


def run(name: str, seed: int) -> dict[str, Any]:
    """One round in a folder of its own: its counts, findings and, of a soak, the memory over time."""
    with tempfile.TemporaryDirectory(prefix="peft-surgical-stress-") as place:
        try:
            return ROUNDS[name](seed, Path(place))
        except Exception as error:  # nothing of a round may end the others
            return {"counts": {}, "findings": [f"{type(error).__name__}: {error}"]}


def added(state: dict[str, Any], seed: int, found: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What is known after one more round."""
    return {
        "rounds": state["rounds"] + 1,
        "minutes": state["minutes"] + seconds / 60,
        "counts": dict(Counter(state["counts"]) + Counter(found["counts"])),
        "findings": [*state["findings"], *(f"round {seed}: {text}" for text in found["findings"])],
        "memory": max(state["memory"], found.get("memory", []), key=len),
    }


def table(states: dict[str, dict[str, Any]]) -> TextTable:
    """A row for each kind of round: its promise, what was counted, and the findings."""
    rows = []
    for name, work in ROUNDS.items():
        if state := states.get(name):
            counts = "; ".join(f"{key} {number:,}" for key, number in state["counts"].items())
            if state["memory"]:
                counts += f"; {growth(state['memory'])}"
            promise = (work.__doc__ or "").splitlines()[0].rstrip(".")
            rows.append([name, promise, counts, f"{state['minutes']:.0f}", str(len(state["findings"]))])
    header = ["round", "what is promised", "what was done", "minutes", "findings"]
    return TextTable(header, rows, "On 2 CPU cores that other work shared.")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("rounds", nargs="+", choices=[*ROUNDS, "all"], metavar="ROUND", help=f"{', '.join(ROUNDS)}, or all")
    add("--minutes", type=float, default=1.0, help="go on for so long with each (default: 1)")
    add("--fresh", action="store_true", help="forget what these rounds found before")
    add("--seed", type=int, help="only the round of this number")
    add("--json", default="outputs/benchmarks/stress.json", help="what was found so far, and where to go on")
    add("--markdown", help="also write the table to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run rounds for so long; 1 if there is a finding."""
    args = parse_arguments(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names = [*ROUNDS] if "all" in args.rounds else args.rounds
    if args.seed is not None:
        found = [run(name, args.seed) for name in names]
        print(json.dumps(found, indent=2))
        return int(any(one["findings"] for one in found))
    file = Path(args.json)
    states = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        state = EMPTY if args.fresh else states.get(name, EMPTY)
        end = time.monotonic() + 60 * args.minutes
        while time.monotonic() < end:
            start, seed = time.monotonic(), state["rounds"]
            state = added(state, seed, run(name, seed), time.monotonic() - start)
            states[name] = state
            file.write_text(json.dumps(states), encoding="utf-8")
            print(f"{name}: round {seed}: {state['counts']}, {len(state['findings'])} findings", flush=True)
    shown = table(states)
    shown.show()
    for name, state in states.items():
        for text in state["findings"]:
            print(f"{name}, {text}")
    if args.markdown:
        shown.save(args.markdown)
    return int(any(state["findings"] for state in states.values()))


if __name__ == "__main__":
    sys.exit(main())
