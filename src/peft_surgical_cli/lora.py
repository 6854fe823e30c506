"""``peft-surgical to-lora ADAPTER --rank N --output DIR``: an adapter as LoRA, for what knows nothing else."""

from __future__ import annotations

import dataclasses
import json as to_json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.markup import escape

from .pull import AdapterArgument, BaseOption, Revision
from .terminal import console, table

if TYPE_CHECKING:
    from peft_surgical.adapters.lora import LoraConversion


def to_lora_command(
    adapter: AdapterArgument,
    output: Annotated[Path, typer.Option(help="A new folder for the LoRA adapter.", show_default=False)],
    rank: Annotated[int | None, typer.Option(help="Of all factors.", show_default=False)] = None,
    energy: Annotated[
        float | None, typer.Option(help="Or: keep this share of each delta's squared norm.", show_default=False)
    ] = None,
    factors_only: Annotated[
        bool, typer.Option("--factors-only", help="Leave out norms, biases and grouped convolutions.")
    ] = False,
    revision: Revision = None,
    base: BaseOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write an adapter as a LoRA adapter that PEFT loads without this package."""
    from peft_surgical.adapters.adapter import new_folder, read_adapter
    from peft_surgical.adapters.lora import to_lora
    from peft_surgical.hub.pulling import open_adapted

    new_folder(output)  # before a base is fetched
    opened = open_adapted(adapter, revision=revision, base=base)
    source = dataclasses.replace(read_adapter(opened.folder), name=adapter)  # of a repository, the same commit
    network = opened.model.unload()
    found = to_lora(source, network, rank=rank, energy=energy, keep=not factors_only, output=output)
    if json:
        typer.echo(to_json.dumps(found.to_dict(), indent=2))
    else:
        _print(found, output)


def _print(found: LoraConversion, output: Path) -> None:
    from peft_surgical.files import shown

    out = console()
    numbers = ("rank", "of", "L2 norm", "relative error")
    rows = table("tensor", "kept as", *numbers, numbers=numbers)
    for row in found.rows:
        rank, full = ("" if value is None else str(value) for value in (row.rank, row.full_rank))
        rows.add_row(escape(row.name), row.kept, rank, full, f"{row.norm:.4g}", f"{row.error:.2%}")
    out.print(rows)
    out.print()
    out.print(f"relative error of all deltas: {found.error:.2%}")
    if found.left_out:
        out.print(escape(f"left out: {shown(found.left_out)}"))
    out.print(f"{decimal(found.bytes_before)} before, {decimal(found.bytes)} as LoRA")
    out.print(escape(str(output)), soft_wrap=True)
