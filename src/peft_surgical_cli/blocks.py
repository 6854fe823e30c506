"""``peft-surgical blocks MODEL``: the blocks of a network, which are what a target names."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from .terminal import console, table


def blocks_command(
    model: Annotated[str, typer.Argument(help="A timm id, a transformers id, or a folder of either.")],
    num_classes: Annotated[int | None, typer.Option(help="Give it a new head of this size.")] = None,
    random: Annotated[bool, typer.Option("--random", help="Read the architecture only, no weights.")] = False,
) -> None:
    """Print the blocks of a network, in the order in which data flows."""
    from peft_surgical.bases.load import load_model
    from peft_surgical.blocks import anatomy_of

    anatomy = anatomy_of(load_model(model, num_classes, weights="random" if random else "pretrained"))
    total = sum(block.num_parameters for block in anatomy)
    rows = table("block", "modules", "tensors", "parameters", "share", numbers=("tensors", "parameters", "share"))
    for block in anatomy:
        share = f"{block.num_parameters / max(total, 1):.1%}"
        rows.add_row(block.name, escape(block.outline), str(len(block.tensors)), f"{block.num_parameters:,}", share)
    rows.add_section()
    rows.add_row("total", "", str(len(anatomy.tensors)), f"{total:,}", "100.0%")
    out = console()
    out.print(rows)
    out.print(f"{escape(model)}: blocks by {anatomy.source}")
