"""Runs PEFT's tests and writes docs/conformance.md: ``python -m conformance.report`` in the folder ``tests``."""

from __future__ import annotations

import platform
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from . import runner
from .expected import ANY_BASE, EXPECTED, GROUPS, MODULES, OUT_OF_SCOPE, Row

DOCUMENT = Path(__file__).parents[2] / "docs" / "conformance.md"
_HEAD = """# Conformance with PEFT's own tests

PEFT tests every method by the same generic tests: attaching, training, saving, loading, merging, switching, deleting,
combining, mixed batches, generating, status, state dicts. `tests/conformance` fetches the tests of the installed PEFT,
puts surgical adapters in the place of its lists of methods, and tiny random models in the place of those it loads from
the Hub. Deltas start away from zero where PEFT asks for it (`init_weights=False`); a fresh surgical adapter is the
identity, and "merging changes nothing" would prove nothing.

`make test-all` runs it and fails if a test fails that is not in the table below, or if one of the table passes.
This page is written by `python -m conformance.report`, in the folder `tests`.
"""


def main() -> int:
    """Measure and write the page; 1 if something is not as `expected` says."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = runner.stage(runner.fetch_tests(Path(scratch)), Path(scratch, "stage"))
        outcomes = [one for modules in GROUPS for one in runner.run(folder, modules)]
    problems = runner.judge(tuple(MODULES), outcomes)
    sys.stderr.write("\n".join(problems) + "\n")
    if not problems:
        DOCUMENT.write_text(page(outcomes), encoding="utf-8")
    return int(bool(problems))


def page(outcomes: list[runner.Outcome]) -> str:
    """The text of docs/conformance.md."""
    libraries = ("peft", "torch", "transformers", "accelerate", "safetensors")
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    parts = [_HEAD, f"Measured with {versions}, Python {platform.python_version()}, on the CPU.", ""]
    parts += ["| PEFT's tests | pass | cannot pass | skipped by PEFT |", "|---|---:|---:|---:|"]
    total: Counter[str] = Counter()
    for module in MODULES:
        counts = runner.count(outcomes, module)
        total += counts
        parts.append(f"| `{module}` | {counts['passed']} | {counts['failed']} | {counts['skipped']} |")
    parts.append(f"| all | {total['passed']} | {total['failed']} | {total['skipped']} |")
    parts += ["", "A test counts when it touches a surgical adapter; PEFT's tests of its other methods do not.", ""]
    parts += ["## What cannot pass", "", "| tests | reason |", "|---:|---|", *_by_reason(EXPECTED, outcomes)]
    parts += ["", "## What is not run", "", *_rows(OUT_OF_SCOPE)]
    parts += ["", "## What runs with `strict_base=False`", "", *_rows(ANY_BASE)]
    return "\n".join(parts) + "\n"


def _by_reason(rows: list[Row], outcomes: list[runner.Outcome]) -> list[str]:
    failed = Counter(row.reason for one in outcomes if one.ended == "failed" and (row := runner.reason_of(one)))
    return [f"| {number} | {reason} |" for reason, number in failed.most_common()]


def _rows(rows: list[Row]) -> list[str]:
    return [f"- `{row.module}`, tests that match `{row.pattern}`: {row.reason}." for row in rows]


if __name__ == "__main__":
    sys.exit(main())
