"""Texts of strangers (names, targets, whatever is in a file) in messages, on terminals and in Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_VALUE = r"""\"[^\"]*\"|'[^']*'|\[[^\]]*\]|\{[^}]*\}|[\w.+-]*\w|"""
_ARGUMENT = re.compile(rf"(?<![\w./\\-])([a-z_]+)=({_VALUE})")


def escaped(text: str, keep: str = "") -> str:
    """A text with escapes in place of characters that a terminal might obey, except for those in ``keep``."""
    shown = (c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
    return text if text.isprintable() else "".join(shown)


def markdown_text(value: Any) -> str:
    """A value as text on one line of Markdown, in which it makes no HTML, no link, no image and no cell of a table."""
    text = escaped(" ".join(str(value).split())).replace("<", "&lt;").replace("](", "]\\(")
    return re.sub(r"(?<!\\)\|", r"\\|", text)


def markdown_code(value: Any) -> str:
    """A value as code in Markdown, also within a table."""
    return f"`{escaped(' '.join(str(value).split())).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def csv_cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else text


def with_arguments(message: str, written: Callable[[str, str], str | None]) -> str:
    """A message with the arguments of Python in it, such as ``lr=1e-3``, in the words of another place.

    Args:
        message: What an exception or a warning says.
        written: Name and value of an argument -> what to write instead; None leaves it.
    """
    return _ARGUMENT.sub(lambda found: written(*found.groups()) or found.group(), message)
