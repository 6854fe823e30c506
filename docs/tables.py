"""Puts the measured tables of ``docs/results`` into the texts that show them.

A text marks the place with ``<!-- table: docs/results/NAME.md -->`` and ``<!-- end -->``; between them the table's rows
are replaced. ``NAME.md#2`` is the second table of that file, ``NAME.md rows webcam`` of the first one the rows that
begin with that cell. ``python docs/tables.py`` rewrites the texts, ``--check`` only says what differs.
"""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXTS = ("README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))), "recipes/README.md")
MARK = re.compile(r"(<!-- table: (\S+?)(?:#(\d+))?(?: rows (\w+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def rows(file: str, number: int, first: str | None = None) -> str:
    """One table of a results file, without what is written around it; with ``first``, the rows that begin with it."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    groups = itertools.groupby(lines, lambda line: line.startswith("|"))
    table = [list(group) for is_table, group in groups if is_table][number - 1]
    kept = [line for line in table[2:] if first is None or line.startswith(f"| {first} |")]
    if first is not None and not kept:
        raise ValueError(f"{file}: table {number} has no row that begins with {first!r}")
    if not kept:
        return "Not measured yet: `make bench` does it.\n"
    return "".join(f"{line}\n" for line in [*table[:2], *kept])


def filled(text: str) -> str:
    """The text with all its tables as they are measured now."""
    return MARK.sub(lambda match: f"{match[1]}\n{rows(match[2], int(match[3] or 1), match[4])}\n{match[5]}", text)


def main() -> int:
    """Rewrite the texts, or check them; 1 if a check finds a difference."""
    stale, check = [], "--check" in sys.argv
    for name in TEXTS:
        file = ROOT / name
        text = file.read_text(encoding="utf-8")
        if filled(text) != text:
            stale.append(name)
            if not check:
                file.write_text(filled(text), encoding="utf-8")
    verb = "differs" if check else "rewritten"
    print("\n".join(f"{name} {verb}" for name in stale) or "all tables are as measured")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
