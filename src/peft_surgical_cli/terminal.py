"""How the commands print: to a terminal in its width, into a file or a pipe wide enough that nothing is cut."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

PIPED_WIDTH = 160


def console() -> Console:
    """For standard output."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=PIPED_WIDTH)


def table(*columns: str, title: str | None = None, numbers: tuple[str, ...] = ()) -> Table:
    """An empty table.

    Args:
        columns: Their headings.
        title: Title of the table.
        numbers: The headings of those that hold numbers.
    """
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        if column in numbers:
            made.add_column(column, justify="right", no_wrap=True)
        else:
            made.add_column(column, overflow="fold")
    return made
