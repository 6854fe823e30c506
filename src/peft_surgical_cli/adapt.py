"""``peft-surgical adapt MODEL DATA --output DIR``: adapt to a stream of unlabelled images, and predict it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from .options import Cpu, Head, ImageColumn, LabelColumn, Model, OnBroken, Output, Random
from .terminal import console, table

if TYPE_CHECKING:
    from peft_surgical.evaluation import Report
    from peft_surgical.experiment.adapting import AdaptResult

StreamArgument = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="A folder of images; or of class folders, parquet, a dataset's Hub id: then accuracy is reported, too.",
        show_default=False,
    ),
]


def adapt_command(
    model: Model,
    data: StreamArgument,
    output: Output,
    lr: Annotated[float, typer.Option(help="Learning rate. Without labels nothing can choose it: see the docs.")],
    method: Annotated[str, typer.Option(help="memo, image by image; or tent, batch by batch.")] = "memo",
    target: Annotated[
        str | None,
        typer.Option(
            help="What moves: stem, block1, all, ...; norm for scale and shift of every normalisation.",
            show_default="stem, for tent norm",
        ),
    ] = None,
    mode: Annotated[str, typer.Option(help="online keeps what was learnt, episodic starts anew each time.")] = "online",
    optimizer: Annotated[
        str | None,
        typer.Option(help="sgd, adam or adamw.", show_default="memo: sgd online, adamw episodic; tent: adam"),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps per image, for tent per batch.")] = 1,
    views: Annotated[int, typer.Option(min=1, help="Augmented views per image, for memo.")] = 32,
    crop: Annotated[
        str,
        typer.Option(help="Of the views: pad for small images, resize for networks trained on ImageNet."),
    ] = "pad",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch, for tent.")] = 64,
    prior_strength: Annotated[
        float | None, typer.Option(help="For memo with BatchNorm: source statistics count as so many images.")
    ] = None,
    norm_stats: Annotated[
        str | None,
        typer.Option(
            help="Whose normalisation statistics move, and are saved: frozen, target or all.",
            show_default="frozen, for tent all",
        ),
    ] = None,
    reset_on_collapse: Annotated[
        bool, typer.Option("--reset-on-collapse", help="Start anew when 100 predictions in a row are one class.")
    ] = False,
    unlabelled: Annotated[bool, typer.Option("--unlabelled", help="Subfolders of DATA are not classes.")] = False,
    in_order: Annotated[
        bool,
        typer.Option("--in-order", help="Keep the order of labelled data; else it is shuffled, as it is often sorted."),
    ] = False,
    images: Annotated[int | None, typer.Option(min=1, help="Stop after so many images.")] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    on_broken: OnBroken = "raise",
    head: Head = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the views and of the order.")] = 0,
    random: Random = False,
    cpu: Cpu = False,
) -> None:
    """Adapt a network to a stream of images without labels, and predict each; online, what was learnt is an adapter.

    Exit code 3: predictions became worse, as far as the labels of DATA tell.
    """
    import transformers
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from peft_surgical.data.incoming import read_incoming
    from peft_surgical.errors import HARMED
    from peft_surgical.experiment.adapting import (
        ADAPTED_FILES,
        AdaptSettings,
        adapt,
        numbered_as,
        open_base,
        write_adapted,
    )
    from peft_surgical.extras import accelerator_or_cpu
    from peft_surgical.results import claim

    settings = AdaptSettings(
        method=method,
        target=target or ("norm" if method == "tent" else "stem"),
        mode=mode,
        lr=lr,
        optimizer=optimizer,
        steps=steps,
        views=views,
        crop=crop,
        batch_size=batch_size,
        prior_strength=prior_strength,
        norm_stats=norm_stats,
        seed=seed,
        reset_on_collapse=reset_on_collapse,
    )
    output = claim(output, ADAPTED_FILES)
    transformers.logging.set_verbosity_error()
    columns: dict[str, Any] = {} if unlabelled else {"image_column": image_column, "label_column": label_column}
    order = None if in_order else seed
    found = read_incoming(data, unlabelled=unlabelled, seed=order, limit=images, on_broken=on_broken, **columns)
    weights = "random" if random else "pretrained"
    base = open_base(model, found, weights, head)
    found = numbered_as(base, found)
    bar = Console(stderr=True, highlight=False)
    columns_shown = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns_shown, console=bar, transient=True, disable=not bar.is_terminal) as progress:
        task = progress.add_task("", total=len(found))

        def tell(done: int, total: int, now: float | None, before: float | None) -> None:
            text = "" if now is None or before is None else f"accuracy {now:.1%}, without adaptation {before:.1%}"
            progress.update(task, completed=done, description=text)

        adapted = adapt(base, found, settings, accelerator_or_cpu(cpu), tell)
    report = write_adapted(output, model, found, settings, adapted, weights)
    _print(report, adapted, output)
    if report.settings["worse"]:
        raise typer.Exit(HARMED)


def _print(report: Report, adapted: AdaptResult, output: object) -> None:
    from peft_surgical.experiment.adapting import PREDICTIONS, STREAM
    from peft_surgical.keys import FIGURE, REPORT

    out, settings, record = console(), report.settings, adapted.record
    title = f"{report.model}: {settings['method']}, {settings['mode']}, {report.target}, lr {settings['lr']:g}"
    if report.measurements:
        numbers = ("%", "95% interval", "n")
        rows = table("", *numbers, title=escape(title), numbers=numbers)
        for one in report:
            name = one.name if one.dataset == STREAM else f"{one.name}, {one.dataset}"
            rows.add_row(name, f"{100 * one.value:.1f}", f"{100 * one.low:.1f} to {100 * one.high:.1f}", str(one.n))
        out.print(rows)
    else:
        out.print(escape(f"{title}: {settings['images']} images"), soft_wrap=True)
    said = f"{settings['changed']} of {settings['images']} predictions changed; {record.steps} steps"
    said += f", {record.skipped} skipped for NaN" if record.skipped else ""
    said += f", predictions collapsed to one class at image {record.collapses[0]}" if record.collapses else ""
    out.print(said, soft_wrap=True)
    kept = "the adapter (adapter_model.safetensors, adapter_config.json), " if settings["saved"] else ""
    out.print(escape(f"In {output}: {kept}{PREDICTIONS}, {REPORT}, {FIGURE}"), soft_wrap=True)
