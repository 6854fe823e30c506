"""``peft-surgical diff A B``: how two adapters differ, tensor by tensor."""

from __future__ import annotations

import dataclasses
import json as to_json
from typing import TYPE_CHECKING, Annotated

import typer

from .terminal import console

if TYPE_CHECKING:
    from peft_surgical.adapters.difference import Difference


def diff_command(
    a: Annotated[str, typer.Argument(help="A folder that save_pretrained wrote, or an id on the Hub.")],
    b: Annotated[str, typer.Argument(help="The other.")],
    top: Annotated[int | None, typer.Option(min=0, help="Only so many tensors, the most distant first.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare the deltas of two adapters: norms, distance, cosine, share of equal signs."""
    from peft_surgical.adapters.difference import diff

    found = diff(a, b)
    if top is not None:
        farthest = sorted(found.tensors, key=lambda row: -row.distance)[:top]
        found = dataclasses.replace(found, tensors=tuple(farthest))
    if json:
        typer.echo(to_json.dumps(found.to_dict(), indent=2))
    else:
        _print(found)


def _print(found: Difference) -> None:
    from peft_surgical.files import shown

    out = console()
    out.print(found)
    out.print()
    if found.other_bases:
        out.print(f"of different bases: {shown(found.other_bases)}; their deltas do not compare", markup=False)
    if found.values:
        rows = (f"{name} ({'only one has it' if by is None else f'by {by:.4g}'})" for name, by in found.values.items())
        out.print(f"values that differ: {shown(rows)}", markup=False)
    for name, (one, other) in found.settings.items():
        out.print(f"{name}: {one} and {other}", markup=False)
    if found.same:
        out.print("they change a base in the same way")
