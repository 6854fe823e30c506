"""Damaged and hostile adapter files: every one is refused clearly, or loads as what it says.

::

    python benchmarks/fuzz.py --minutes 10                     # goes on where it stopped; --fresh begins again
    python benchmarks/fuzz.py --seeds 12345 12346              # single mutations, and what becomes of them

A mutation is made from its number alone (`fuzzing.mutations`): a whole adapter of one of several kinds, of which the
safetensors file or the config is changed, and now and then both. Of the changed safetensors files, two of three have
the SHA-256 in their config changed to fit, or none there. Then (`fuzzing.judge`)

- it is loaded onto a base or beside another adapter, and read without a base;
- what loads must equal a reading of the files by other code (`fuzzing.honest`), bit for bit, and else the base;
- what is refused must be refused by an error of this package, or by one of ``LIBRARY_ERRORS``, and must leave the model
  bit for bit, with its classes and flags;
- either must take less than a second of CPU time (``--limit``), ten of them on the clock, and less than 256 MiB more
  than the first one took.

Workers are processes of their own, so that a crash is a finding like any other.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from fuzzing.judge import Bench
from fuzzing.mutations import mutated

from peft_surgical.evaluation import TextTable

MEMORY = 256 * 2**20
CHUNK = 2000
STARTUP = 120.0  # seconds for a worker to import and to make its adapters


# --- in a worker ---


def work(first: int, count: int, limit: float, results: Path) -> None:
    """Judge so many mutations, and write what became of them; the number of the last one begun lies beside it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), limit)
        bench.run(first)  # warms up
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        virtual = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (virtual + MEMORY, resource.RLIM_INFINITY))
        found: dict[str, Any] = {"counts": Counter(), "errors": Counter(), "findings": [], "slowest": [0.0, -1]}
        with open(results.with_suffix(".seed"), "w", encoding="utf-8") as at:
            for seed in range(first, first + count):
                at.seek(0)
                at.write(f"{seed:020d}")
                at.flush()
                outcome = bench.run(seed)
                found["counts"][f"{outcome.mutation} {outcome.result}"] += 1
                found["slowest"] = max(found["slowest"], [outcome.seconds, seed])
                if outcome.result == "refused":
                    found["errors"][outcome.detail] += 1
                if outcome.result == "finding":
                    found["findings"].append([seed, outcome.mutation, outcome.detail])
        found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    results.write_text(json.dumps(found), encoding="utf-8")


# --- around the workers ---


def judged(first: int, count: int, limit: float) -> dict[str, Any]:
    """What became of so many mutations; a worker that dies is a finding at the mutation that it died of."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.json")
        command = [sys.executable, __file__, "--worker", str(first), str(count), str(results), "--limit", str(limit)]
        try:
            code = subprocess.run(command, check=False, timeout=STARTUP + count * limit).returncode
        except subprocess.TimeoutExpired:
            code = None
        if code == 0:
            return json.loads(results.read_text(encoding="utf-8"))
        at = results.with_suffix(".seed")
        if not at.is_file():
            raise SystemExit(f"the worker ended with {code} before it began")
        died = int(at.read_text(encoding="utf-8"))
    how = "hung" if code is None else f"ended the process with {code}"
    parts = [judged(first, died - first, limit)] if died > first else []
    parts.append({"counts": {"process finding": 1}, "errors": {}, "findings": [[died, "process", how]]})
    if died + 1 < first + count:
        parts.append(judged(died + 1, first + count - died - 1, limit))
    return merge(parts)


def merge(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "counts": sum((Counter(part["counts"]) for part in parts), Counter()),
        "errors": sum((Counter(part["errors"]) for part in parts), Counter()),
        "findings": [finding for part in parts for finding in part["findings"]],
        "slowest": max(part.get("slowest", [0.0, -1]) for part in parts),
        "memory": max(part.get("memory", 0) for part in parts),
    }


HEADER = ["mutation", "tried", "refused", "loaded as it says", "findings"]


def rows(found: dict[str, Any]) -> list[list[str]]:
    """One row per mutation, and their sum, in the order of HEADER."""
    counts = {tuple(key.split()): number for key, number in found["counts"].items()}
    lines = []
    for name in [*sorted({name for name, _ in counts}), "all"]:
        by = Counter()
        for (mutation, result), number in counts.items():
            by[result] += number if name in (mutation, "all") else 0
        numbers = (sum(by.values()), by["refused"], by["loaded"], by["finding"])
        lines.append([name.replace("_", " "), *(f"{number:,}" for number in numbers)])
    return lines


def caption(found: dict[str, Any], limit: float) -> str:
    errors = ", ".join(f"{name} {number:,}" for name, number in Counter(found["errors"]).most_common())
    seconds, seed = found["slowest"]
    return (
        f"Mutations 0 to {found['next'] - 1:,}, each made from its number; {found['minutes']:.0f} minutes on one CPU "
        f"thread in all. Refused by {errors}; every ValueError is one of PEFT's own, in LIBRARY_ERRORS. The slowest "
        f"took {seconds:.2f} s (number {seed}; limit {limit:g} s); the memory of a worker grew by at most "
        f"{found['memory'] / 2**20:.0f} MiB over {CHUNK} mutations (limit {MEMORY / 2**20:.0f} MiB)."
    )


def show(found: dict[str, Any], limit: float, markdown: str | None) -> None:
    table = TextTable(HEADER, rows(found), caption(found, limit))
    table.show()
    for seed, mutation, detail in found["findings"]:
        print(f"{seed} {mutation}: {detail}")
    if markdown:
        table.save(markdown)


def single(seeds: Sequence[int], limit: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), limit)
        for seed in seeds:
            _, _, files = mutated(seed, bench.sources)
            print(bench.run(seed))
            print(f"  config: {files.config[:2000]!r}\n  weights: {files.weights[:600]!r}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=1.0, help="go on for so long (default: 1)")
    add("--limit", type=float, default=1.0, help="seconds that one mutation may take (default: 1)")
    add("--fresh", action="store_true", help="begin at 0 again")
    add("--seeds", type=int, nargs="+", help="only these, with their files")
    add("--json", default="outputs/benchmarks/fuzz.json", help="what was found so far, and where to go on")
    add("--markdown", help="also write the table to this file")
    add("--worker", nargs=3, metavar=("FIRST", "COUNT", "RESULTS"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Judge mutations for so long; 1 if there is a finding."""
    args = parse_arguments(argv)
    if args.worker:
        work(int(args.worker[0]), int(args.worker[1]), args.limit, Path(args.worker[2]))
        return 0
    if args.seeds:
        single(args.seeds, args.limit)
        return 0
    state = Path(args.json)
    if state.is_file() and not args.fresh:
        found = json.loads(state.read_text(encoding="utf-8"))
    else:
        found = {
            "next": 0,
            "minutes": 0.0,
            "counts": {},
            "errors": {},
            "findings": [],
            "slowest": [0.0, -1],
            "memory": 0,
        }
    state.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    while time.monotonic() < end:
        start = time.monotonic()
        merged = merge([found, judged(found["next"], CHUNK, args.limit)])
        minutes = found["minutes"] + (time.monotonic() - start) / 60
        found = {**merged, "next": found["next"] + CHUNK, "minutes": minutes}
        state.write_text(json.dumps(found), encoding="utf-8")
        print(f"{found['next']:,} mutations, {len(found['findings'])} findings", flush=True)
    show(found, args.limit, args.markdown)
    return int(bool(found["findings"]))


if __name__ == "__main__":
    sys.exit(main())
