r"""How the commands print: to a terminal in its width, into a file or a pipe wide enough that nothing is cut.

Names, targets and texts may come from strangers. Control characters in them, which could move the cursor, hide text or
ask the terminal for something, are shown as what they are: ``\x1b``.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

PIPED_WIDTH = 160


def printable_text(text: str, keep: str = "") -> str:
    """A text with escapes in place of what is not printable, except for the characters in ``keep``."""
    if text.isprintable():
        return text
    shown = (c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)


class SafeConsole(Console):
    """A console that prints no control characters but the ends of lines, and in tables not even these."""

    def print(self, *objects: Any, **how: Any) -> None:
        """See rich."""
        super().print(*map(_safe, objects), **how)


def _safe(shown: Any) -> Any:
    if hasattr(shown, "__rich__"):
        shown = shown.__rich__()
    if isinstance(shown, Table):
        for column in shown.columns:
            column._cells = [printable_text(cell) if isinstance(cell, str) else cell for cell in column._cells]
        if isinstance(shown.title, str):
            shown.title = printable_text(shown.title)
        return shown
    if isinstance(shown, str) or not hasattr(shown, "__rich_console__"):
        return printable_text(str(shown), keep="\n")
    return shown


def console() -> Console:
    """For standard output."""
    found = SafeConsole(highlight=False)
    return found if found.is_terminal else SafeConsole(highlight=False, width=PIPED_WIDTH)


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
