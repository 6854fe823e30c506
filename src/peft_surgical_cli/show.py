"""``peft-surgical show ADAPTER``: what an adapter in a folder or on the Hub holds, verified, without its base."""

from __future__ import annotations

import json as to_json
from typing import Annotated, Any

import typer
from rich.filesize import decimal
from rich.markup import escape

from .pull import Revision
from .terminal import console, table


def show_command(
    adapter: Annotated[str, typer.Argument(help="A folder that save_pretrained wrote, or owner/name on the Hub.")],
    revision: Revision = None,
    top: Annotated[int, typer.Option(min=0, help="How many of the largest deltas to list.")] = 10,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Verify an adapter's file and print what was tuned, and how far it moved."""
    from peft_surgical.adapters.adapter import read_adapter

    found = read_adapter(adapter, revision=revision)
    summary = found.summary()
    summary["largest"] = summary["largest"][:top]
    if json:
        typer.echo(to_json.dumps(summary, indent=2))
    else:
        _print(summary, f"{adapter}, commit {found.commit}" if found.commit else summary["folder"])


def _print(summary: dict[str, Any], place: str) -> None:
    out = console()
    facts = table("", "")
    facts.show_header = False
    target, statistics = summary["target"], summary["statistics"]
    for name, value in (
        ("adapter", place),
        ("base", summary["base"] or "not named in its config"),
        ("target", target if isinstance(target, str) else " + ".join(target or ["modules"])),
        ("norm policy", summary["norm_stats"] + (f", {statistics} statistics" if statistics else "")),
        ("scale", f"{summary['scale']:g}"),
        ("size", f"{decimal(summary['bytes'])}, {', '.join(summary['dtypes'])}"),
        ("SHA-256", summary["sha256"]),
        ("saved whole", ", ".join(summary["modules_to_save"])),
        ("file", "verified: whole, unaltered, finite"),
    ):
        if value:
            facts.add_row(name, escape(value))
    out.print(facts)
    out.print()
    numbers = ("tensors", "parameters", "L2 norm")
    kind = "block" if "blocks" in summary else "module"
    parts = table(kind, *numbers, numbers=numbers)
    for part in summary[f"{kind}s"]:
        parts.add_row(escape(part["name"]), str(part["tensors"]), f"{part['parameters']:,}", f"{part['norm']:.4g}")
    out.print(parts)
    if summary["largest"]:
        out.print()
        largest = table("largest deltas", "parameters", "L2 norm", numbers=("parameters", "L2 norm"))
        for delta in summary["largest"]:
            largest.add_row(escape(delta["name"]), f"{delta['parameters']:,}", f"{delta['norm']:.4g}")
        out.print(largest)
