"""Commands that look and change nothing: ``blocks`` and ``score`` of a network, ``show`` and ``diff`` of adapters."""

from __future__ import annotations

import dataclasses
import json as to_json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal
from rich.markup import escape

from .adapters import Revision
from .options import Cpu, Few, Head, ImageColumn, ImagesArgument, LabelColumn, Model, OnBroken, Random, Validation
from .terminal import console, table

if TYPE_CHECKING:
    from peft_surgical.adapters.difference import Difference


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


def score_command(
    model: Model,
    data: ImagesArgument,
    criterion: Annotated[
        str, typer.Option(help="rgn, snr, snr-reference, fisher, rgn-residual or sensitivity.")
    ] = "rgn",
    batches: Annotated[int, typer.Option(min=1, help="How many batches to score on.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 32,
    json: Annotated[Path | None, typer.Option("--json", help="Write the scores to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the scores into this file.")] = None,
    images: Few = None,
    validation: Validation = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    on_broken: OnBroken = "raise",
    head: Head = "auto",
    seed: Annotated[int, typer.Option(help="Of the draw of images, and of a new head.")] = 0,
    random: Random = False,
    cpu: Cpu = False,
) -> None:
    """Score every block on tuning images: a higher score means, tune this."""
    import torch
    import transformers
    from torch.utils.data import DataLoader

    from peft_surgical.bases.load import load_base
    from peft_surgical.choosing.resolve import score_blocks
    from peft_surgical.choosing.scores import criterion_of
    from peft_surgical.data.labelled import collate, items, read_data
    from peft_surgical.extras import accelerator_or_cpu, require

    criterion_of(criterion)
    transformers.logging.set_verbosity_error()
    found = read_data(
        data,
        image_column=image_column,
        label_column=label_column,
        seed=seed,
        tuning=images,
        validation=validation,
        on_broken=on_broken,
    )
    weights = "random" if random else "pretrained"
    base = load_base(model, label_names=found.label_names, head=head, weights=weights, seed=seed)
    loader = DataLoader(
        items(found.tuning, base.transform_eval, base.outputs),
        batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=collate,
    )
    network = base.model.to(accelerator_or_cpu(cpu))
    scores = score_blocks(network, loader, criterion, batches)
    console().print(scores)
    if base.head_is_new:
        typer.echo("The head is new, its values a random draw: its own score says nothing, the others are rough.")
    if json is not None:
        json.write_text(scores.to_json(), encoding="utf-8")
    if plot is not None:
        figure = require("matplotlib.figure", "drawing a figure", "plots").Figure(layout="constrained")
        scores.plot(figure.add_subplot())
        figure.savefig(plot, dpi=120)


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
        _print_summary(summary, f"{adapter}, commit {found.commit}" if found.commit else summary["folder"])


def _print_summary(summary: dict[str, Any], place: str) -> None:
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


def diff_command(
    a: Annotated[str, typer.Argument(help="A folder that save_pretrained wrote, or an id on the Hub.")],
    b: Annotated[str, typer.Argument(help="The other adapter, in the same way.")],
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
        _print_difference(found)


def _print_difference(found: Difference) -> None:
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
