"""``peft-surgical show ADAPTER``: what an adapter in a folder or on the Hub holds, verified, without its base."""

from __future__ import annotations

import json as to_json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.markup import escape

from .pull import Revision
from .terminal import console, table

if TYPE_CHECKING:
    from peft_surgical.adapters.contents import Contents


def show_command(
    adapter: Annotated[str, typer.Argument(help="A folder that save_pretrained wrote, or owner/name on the Hub.")],
    revision: Revision = None,
    top: Annotated[int, typer.Option(min=0, help="How many of the largest deltas to list.")] = 10,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Verify an adapter's file and print what was tuned, and how far it moved."""
    from peft_surgical.adapters.contents import contents_of
    from peft_surgical.hub.pulling import locate

    folder, is_remote = locate(adapter, revision=revision)
    contents = contents_of(folder)
    if json:
        typer.echo(to_json.dumps(contents.to_dict(top), indent=2))
    else:
        _print(contents, top, f"{adapter}, commit {folder.name}" if is_remote else contents.folder)


def _print(contents: Contents, top: int, place: str) -> None:
    out = console()
    facts = table("", "")
    facts.show_header = False
    for name, value in (
        ("adapter", place),
        ("base", contents.base or "not named in its config"),
        ("target", contents.target if isinstance(contents.target, str) else " + ".join(contents.target or ["modules"])),
        ("norm policy", contents.norm_stats + (f", {contents.statistics} statistics" if contents.statistics else "")),
        ("scale", f"{contents.scale:g}"),
        ("size", f"{decimal(contents.bytes)}, {', '.join(contents.dtypes)}"),
        ("SHA-256", contents.sha256),
        ("saved whole", ", ".join(contents.modules_to_save)),
        ("file", "verified: whole, unaltered, finite"),
    ):
        if value:
            facts.add_row(name, escape(value))
    out.print(facts)
    out.print()
    numbers = ("tensors", "parameters", "L2 norm")
    parts = table(contents.parts_are, *numbers, numbers=numbers)
    for part in contents.parts:
        parts.add_row(escape(part.name), str(len(part.deltas)), f"{part.parameters:,}", f"{part.norm:.4g}")
    out.print(parts)
    if top:
        out.print()
        largest = table("largest deltas", "parameters", "L2 norm", numbers=("parameters", "L2 norm"))
        for delta in contents.deltas[:top]:
            largest.add_row(escape(delta.name), f"{delta.parameters:,}", f"{delta.norm:.4g}")
        out.print(largest)
