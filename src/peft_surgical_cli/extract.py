"""``extract``: a fine-tuned checkpoint becomes an adapter of its base. ``export``: adapters for ONNX Runtime."""

from __future__ import annotations

import json as to_json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.markup import escape

from .adapters import BaseOption, Revision
from .options import Cpu, ImageColumn, LabelColumn, OnBroken
from .terminal import console, table

if TYPE_CHECKING:
    from peft_surgical.hub.extracting import Extracted


def extract_command(
    base: Annotated[str, typer.Argument(help="A timm id, a transformers id, or a folder of either.")],
    tuned: Annotated[str, typer.Argument(help="What was fine-tuned from it, in the same way.")],
    output: Annotated[Path, typer.Option(help="A new folder for the adapter.", show_default=False)],
    target: Annotated[
        str | None,
        typer.Option("--blocks", "--target", help="Keep these only: block1, 'block1 + head', ...", show_default="all"),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Or: the fewest blocks with this share of the squared difference.", show_default=False),
    ] = None,
    delta_dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16 make a smaller file and may round.",
            show_default="float32, or float64 where only that is exact",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Labelled images: accuracy with each block's delta taken away.", show_default=False),
    ] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    on_broken: OnBroken = "raise",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    cpu: Cpu = False,
) -> None:
    """Turn a fine-tuned checkpoint into an adapter of its base, exact where all of it is kept."""
    import transformers

    from peft_surgical.hub.extracting import extract_to

    transformers.logging.set_verbosity_error()
    reading = {"image_column": image_column, "label_column": label_column, "on_broken": on_broken}
    found = extract_to(
        base,
        tuned,
        output,
        target=target,
        energy=energy,
        delta_dtype=delta_dtype,
        data=data,
        reading=reading,
        cpu=cpu,
    )
    if json:
        typer.echo(to_json.dumps(found.to_dict(), indent=2))
    else:
        _print_extracted(found, output.expanduser())


def _print_extracted(found: Extracted, output: Path) -> None:
    from peft_surgical.files import shown
    from peft_surgical.keys import WEIGHTS

    out, extraction = console(), found.extraction
    if extraction.blocks:
        numbers = ("tensors", "statistics", "L2 norm", "over the base's", "share")
        rows = table("block", *numbers, "kept", numbers=numbers)
        for block in extraction.blocks:
            moved = (f"{block.norm:.4g}", "new" if block.relative is None else f"{block.relative:.2%}")
            counts = (str(block.tensors), str(block.statistics))
            rows.add_row(block.name, *counts, *moved, f"{block.share:.1%}", "yes" if block.kept else "no")
        out.print(rows)
        out.print()
    if found.curve:
        shares = ("%", "95% interval", "change", "95% interval of the change")
        curve = table("deltas", *shares, numbers=shares, title=f"Accuracy on {found.curve[0].n} {found.part}")
        names = {"": "all kept", "all": "none: the base"}
        for row in found.curve:
            own, change = ([100 * value for value in one] for one in (row.accuracy, row.change))
            curve.add_row(
                names.get(row.without, f"without {row.without}"),
                *(f"{own[0]:.1f}", f"{own[1]:.1f} to {own[2]:.1f}"),
                *(f"{change[0]:+.1f}", f"{change[1]:+.1f} to {change[2]:+.1f}"),
            )
        out.print(curve)
        out.print()
    dtype = next(iter({str(delta.dtype).removeprefix("torch.") for delta in extraction.adapter.deltas.values()}), "-")
    out.print(f"{decimal((output / WEIGHTS).stat().st_size)}; deltas in {dtype}")
    if extraction.left_out:
        out.print(escape(f"left out: {shown(extraction.left_out)}"), soft_wrap=True)
    if extraction.inexact:
        worst = max(extraction.inexact.values())
        out.print(f"base + delta misses values of {len(extraction.inexact)} tensors, by at most {worst:.2g}")
    if extraction.exact:
        out.print("exact: loaded from there onto the base, it is the tuned network, value for value")
    out.print(escape(str(output)), soft_wrap=True)


def export_command(
    adapters: Annotated[list[str], typer.Argument(help="Folders, or owner/name on the Hub, of one base.")],
    output: Annotated[Path, typer.Option(help="A new folder.", show_default=False)],
    format: Annotated[str, typer.Option("--format", help="onnx.")] = "onnx",
    merged: Annotated[bool, typer.Option("--merged", help="Each adapter as a graph of its own, too.")] = False,
    revision: Revision = None,
    base: BaseOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a base as one graph for ONNX Runtime, and each adapter as a small file that is swapped into it."""
    from peft_surgical.hub.exporting import export_to

    found = export_to(adapters, output, format=format, merged=merged, revision=revision, base=base)
    if json:
        typer.echo(to_json.dumps(found.to_dict(), indent=2))
        return
    out = console()
    numbers = ("size", "largest difference from PyTorch")
    rows = table("file", "adapter", *numbers, numbers=numbers)
    for one in found.files:
        rows.add_row(escape(one.file), escape(one.site), decimal(one.bytes), f"{one.difference:.1e}")
    out.print(rows)
    out.print()
    out.print(f"{len(found.inputs)} tensors can be swapped; differences are relative to the largest logit")
    out.print(escape(str(output)), soft_wrap=True)
