"""HTML of plain values: elements, tables, and pictures that stand in the page itself. Texts are escaped."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

_VOID = ("meta", "img")
_SIDE = 96  # pixels of the longer side of a thumbnail


def html_tag(name: str, content: str = "", /, **attributes: Any) -> str:
    """An element.

    Args:
        name: Its name.
        content: HTML, which is taken as it is.
        attributes: Plain values, which are escaped. In names, ``_`` stands for ``-``, and one at the end for nothing;
            floats are written to a tenth.
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    texts = {key: f"{value:.1f}" if isinstance(value, float) else str(value) for key, value in given.items()}
    opened = " ".join([name, *(f'{key}="{html.escape(value)}"' for key, value in texts.items())])
    return f"<{opened}>" if name in _VOID else f"<{opened}>{content}</{name}>"


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain texts, which can be scrolled sideways where the page is narrower."""

    def row(cells: Sequence[str], tag: str) -> str:
        attributes = {"scope": "col"} if tag == "th" else {}
        return html_tag("tr", "".join(html_tag(tag, html.escape(cell), **attributes) for cell in cells))

    table = html_tag("table", row(header, "th") + "".join(row(cells, "td") for cells in rows))
    return html_tag("div", table, class_="wide")


def jpeg_address(image: Any) -> str:
    """A PIL image as a thumbnail in a ``data:`` address."""
    small = image.copy()
    small.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
