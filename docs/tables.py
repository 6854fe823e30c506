"""Puts the measured tables of ``docs/results`` into the texts that show them.

A text marks the place with ``<!-- table: docs/results/NAME.md -->`` and ``<!-- end -->``; between them the table's rows are
replaced, its caption is not shown. ``python docs/tables.py`` rewrites the texts, ``--check`` only says what differs.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXTS = ("README.md", "docs/selection.md")
MARK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rows(file: str) -> str:
    """The table of a results file, without what is written around it."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return "".join(f"{line}\n" for line in lines if line.startswith("|"))


def filled(text: str) -> str:
    """The text with all its tables as they are measured now."""
    return MARK.sub(lambda match: f"{match[1]}\n{rows(match[2])}\n{match[3]}", text)


def main() -> int:
    stale = []
    for name in TEXTS:
        file = ROOT / name
        if file.exists() and filled(text := file.read_text(encoding="utf-8")) != text:
            stale.append(name)
            if "--check" not in sys.argv:
                file.write_text(filled(text), encoding="utf-8")
    verb = "differs" if "--check" in sys.argv else "rewritten"
    print("\n".join(f"{name} {verb}" for name in stale) or "all tables are as measured")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
