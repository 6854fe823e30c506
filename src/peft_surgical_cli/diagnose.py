"""``peft-surgical diagnose MODEL DATA``: what has shifted at a new place, and what to do about it."""

from __future__ import annotations

import json as to_json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from .adapt import StreamArgument
from .options import Cpu, Head, ImageColumn, LabelColumn, Model, OnBroken, Random
from .terminal import console, table

if TYPE_CHECKING:
    from peft_surgical.diagnosis.verdict import Diagnosis


def diagnose_command(
    model: Model,
    data: StreamArgument,
    source: Annotated[
        str | None,
        typer.Option(help="Images that MODEL was made for, or a file that --save-reference wrote.", show_default=False),
    ] = None,
    save_reference: Annotated[
        Path | None,
        typer.Option(help="Keep what is needed of them in this .safetensors file.", show_default=False),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page that stands alone.", show_default=False)] = None,
    images: Annotated[int, typer.Option(min=20, help="Use so many of each at most.")] = 300,
    label_next: Annotated[int, typer.Option(min=1, help="How many unlabelled images to name for labelling.")] = 20,
    unlabelled: Annotated[bool, typer.Option("--unlabelled", help="Subfolders are not classes.")] = False,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    on_broken: OnBroken = "raise",
    head: Head = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of draws.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    random: Random = False,
    cpu: Cpu = False,
) -> None:
    """Say what has shifted, how sure that is, and which block to tune; nothing is trained."""
    import transformers

    from peft_surgical.diagnosis.diagnose import diagnose
    from peft_surgical.diagnosis.page import to_html

    transformers.logging.set_verbosity_error()
    columns: dict[str, Any] = {} if unlabelled else {"image_column": image_column, "label_column": label_column}
    found, seen = diagnose(
        model,
        data,
        source=source,
        save_reference=save_reference,
        images=images,
        label_next=label_next,
        unlabelled=unlabelled,
        on_broken=on_broken,
        head=head,
        weights="random" if random else "pretrained",
        seed=seed,
        cpu=cpu,
        **columns,
    )
    if html is not None:
        html.write_text(to_html(found, seen), encoding="utf-8")
    if json:
        typer.echo(to_json.dumps(found.to_dict(), indent=2))
    else:
        _print_diagnosis(found)


def _print_diagnosis(found: Diagnosis) -> None:
    from peft_surgical.diagnosis.page import points, share
    from peft_surgical.diagnosis.verdict import KINDS

    out = console()
    sure = "" if found.sure is None else f"; {found.sure:.0%} of random halves of the images say the same"
    out.print(f"{KINDS[found.kind]}{sure}", soft_wrap=True)
    if found.target:
        out.print(f"suggested target: {found.target}")
    out.print()
    if found.drift:
        rows = table("block", "drift", "p", *(["RGN"] if found.scores else []), numbers=("drift", "p", "RGN"))
        for one in found.drift:
            score = [f"{found.scores[one.name]:.3g}" if one.name in found.scores else "-"] if found.scores else []
            rows.add_row(one.name, f"{one.effect:.3f}", f"{one.p:.3f}", *score)
        out.print(rows)
        out.print()
    facts = table("", "here", "source")
    facts.add_row("images", str(found.images), str(found.source_images or "-"))
    facts.add_row("confidence", *("-" if one is None else f"{100 * one:.1f}%" for one in found.confidence))
    facts.add_row("accuracy", share(found.accuracy), share(found.source_accuracy))
    facts.add_row("probe on the last features", share(found.probe), "-")
    out.print(facts)
    for point in found.curve:
        out.print(f"with {point.images} labels the probe reaches {share(point.accuracy)}")
    for count, gain in found.gain.items():
        out.print(f"{count} labels chosen by clusters rather than at random: {points(gain)} points")
    for note in found.notes:
        out.print(f"note: {note}", soft_wrap=True)
    if found.label_next:
        out.print("label these next:")
        for file in found.label_next:
            out.print(f"  {escape(file)}", soft_wrap=True)
