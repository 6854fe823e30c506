"""``peft-surgical score MODEL DATA``: what a criterion says about each block on one's own images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Cpu, Few, Head, ImageColumn, ImagesArgument, LabelColumn, Model, OnBroken, Random, Validation
from .terminal import console


def score_command(
    model: Model,
    data: ImagesArgument,
    criterion: Annotated[str, typer.Option(help="rgn, snr, snr-reference or fisher.")] = "rgn",
    batches: Annotated[int, typer.Option(min=1, help="How many to score on.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    json: Annotated[Path | None, typer.Option("--json", help="Write the scores to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them into this file.")] = None,
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
