"""Tables as recipes and benchmarks show them: on the terminal through rich, and as Markdown with a caption."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..extras import require
from .intervals import interval_of_runs


def plus_minus(values: Sequence[float], n: int | None = None, sign: str = "") -> str:
    """Mean of fractions in percent ± half its 95% interval, such as ``80.1 ± 1.8``.

    Args:
        values: One fraction for each seed: Student's t over them. A single one has Wilson's interval over ``n`` test
            examples, and without ``n`` none; no value at all is ``-``.
        n: Test examples of one seed.
        sign: ``"+"`` shows the sign of differences.
    """
    if not values:
        return "-"
    if len(values) == 1 and n is None:
        return f"{100 * values[0]:{sign}.1f}"
    value, low, high = interval_of_runs(values, n or 0)
    return f"{100 * value:{sign}.1f} ± {50 * (high - low):.1f}"


@dataclass(frozen=True)
class TextTable:
    """A table of texts with what has to be said below it.

    Raises:
        DataError: If a row has another number of cells than the header.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise DataError(
                    f"a row of {len(row)} cells under {len(self.header)} columns: {', '.join(row)}; give each row "
                    "a cell for each column, '-' where there is nothing"
                )

    def markdown(self) -> str:
        """A Markdown table, an empty line, and the caption."""
        lines = [f"| {' | '.join(row)} |" for row in (self.header, ["---"] * len(self.header), *self.rows)]
        return "\n".join([*lines, *(["", self.caption] if self.caption else [])]) + "\n"

    def save(self, file: str | Path) -> None:
        """Write `markdown` to a file."""
        Path(file).write_text(self.markdown(), encoding="utf-8")

    def show(self, **options: Any) -> None:
        """Print it through rich, in 150 columns where the output is no terminal; options are those of rich's table."""
        rich_table, console = require("rich.table", "showing a table"), require("rich.console", "showing a table")
        text = require("rich.text", "showing a table").Text
        table = rich_table.Table(caption=text(self.caption), **options)
        for name in self.header:
            table.add_column(text(name))
        for row in self.rows:
            table.add_row(*map(text, row))
        console.Console(width=None if sys.stdout.isatty() else 150).print(table)
