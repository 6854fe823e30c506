"""``peft-surgical list``: the adapters in the cache and in folders, by base."""

from __future__ import annotations

import json as to_json
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.markup import escape

from .stored import adapters_in, by_base, cached_adapters
from .terminal import console, table


def list_command(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Look below these, too.", exists=True, file_okay=False, show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the adapters that are at hand: the Hub's in the cache, and those in folders."""
    found = by_base([*cached_adapters(), *adapters_in(folders or [])])
    if json:
        typer.echo(to_json.dumps({base: [one.to_dict() for one in rows] for base, rows in found.items()}, indent=2))
        return
    out = console()
    for base, rows in found.items():
        shown = table("adapter", "target", "commit", "size", title=escape(base), numbers=("size",))
        for one in rows:
            commit = " ".join([*one.refs, (one.commit or "")[:12]]).strip()
            shown.add_row(
                escape(one.name), escape(one.target), escape(commit), decimal(one.bytes) if one.is_whole else "-"
            )
        out.print(shown)
        out.print()
    if not found:
        out.print("No adapters: pull one, or name folders to look below.")
    elif any(not one.is_whole for rows in found.values() for one in rows):
        out.print("-: not fetched as a whole; pull it again.")
