"""``peft-surgical tune MODEL DATA --output DIR``: choose what to tune, tune it, save it, and report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from .options import (
    Augment,
    BatchSize,
    Cpu,
    DeltaDtype,
    EpochsOption,
    Few,
    Head,
    HeadLrs,
    ImageColumn,
    ImagesArgument,
    ImageSize,
    LabelColumn,
    Lrs,
    Model,
    NormStats,
    NumWorkers,
    OnBroken,
    Optimizer,
    Output,
    Precision,
    Random,
    Scheduler,
    TestOption,
    Validation,
    WeightDecay,
    experiment_of,
)
from .terminal import console, table

if TYPE_CHECKING:
    from peft_surgical.evaluation import Report
    from peft_surgical.experiment.experiment import Experiment


def tune_command(
    model: Model,
    data: ImagesArgument,
    output: Output,
    target: Annotated[
        str | None,
        typer.Option(
            help="What to tune: block2, 'block1 + head', all; auto-rgn, auto-snr or auto-fisher, which tune the blocks "
            "that score best (as a method, auto-rgn trains all tensors, each at its own rate: --method auto-rgn); or a "
            "search that trains candidates: race, cross-val, greedy, and auto, which races the "
            "2 blocks with the highest RGN, the head, all, and, unless the head is new, no tuning.",
            show_default="auto",
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(help="Instead: a method, such as auto-rgn, lp-ft or full.")] = None,
    num_blocks: Annotated[
        int | None, typer.Option(min=1, help="With auto-rgn and the like: so many neighbours.", show_default="1")
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Or: at most this share of the parameters.")] = None,
    source: Annotated[str | None, typer.Option(help="Data to measure forgetting on.")] = None,
    lr: Lrs = None,
    head_lr: HeadLrs = None,
    epochs: EpochsOption = 15,
    batch_size: BatchSize = None,
    optimizer: Optimizer = "adam",
    weight_decay: WeightDecay = 1e-4,
    scheduler: Scheduler = "constant",
    precision: Precision = None,
    norm_stats: NormStats = "frozen",
    delta_dtype: DeltaDtype = None,
    images: Few = None,
    validation: Validation = None,
    test: TestOption = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    on_broken: OnBroken = "raise",
    head: Head = "auto",
    augment: Augment = "none",
    image_size: ImageSize = None,
    workers: NumWorkers = 0,
    seed: Annotated[int, typer.Option(help="Of drawn parts, training order and a new head.")] = 0,
    random: Random = False,
    cpu: Cpu = False,
) -> None:
    """Tune a part of a network on one's own images; the adapter, a report and a figure are written to a folder.

    Run again after Ctrl-C, the same command goes on from where it was.
    """
    from peft_surgical.errors import ConfigError
    from peft_surgical.experiment.choosing import choose
    from peft_surgical.experiment.outputs import read_source, write_tuned
    from peft_surgical.experiment.progress import watched
    from peft_surgical.training.engines import separated

    if target is not None and method is not None:
        raise ConfigError(f"--target {target} and --method {method} both say what to tune: give one of them")
    asked = method or target or "auto"
    columns = {"image_column": image_column, "label_column": label_column, "on_broken": on_broken}
    with watched() as watch, separated() as engine:
        experiment = experiment_of(
            model,
            data,
            output,
            watch=watch,
            engine=engine,
            asked=[asked],
            is_method=method is not None,
            seed=seed,
            lr=lr,
            head_lr=head_lr,
            scheduler=scheduler,
            config={"norm_stats": norm_stats, "delta_dtype": delta_dtype},
            reading={"tuning": images, "validation": validation, "test": test, **columns},
            augment=augment,
            image_size=image_size,
            workers=workers,
            head=head,
            random=random,
            epochs=epochs,
            batch_size=batch_size,
            optimizer=optimizer,
            weight_decay=weight_decay,
            precision=precision,
            use_cpu=cpu,
        )
        old = None if source is None else read_source(experiment, source, **columns)
        choice = choose(
            experiment,
            asked,
            seed,
            is_method=method is not None,
            num_blocks=num_blocks,
            budget=budget,
        )
        if not watch.first:
            return
        report = write_tuned(experiment, choice, seed, old)
    _print(experiment, report)


def _print(experiment: Experiment, report: Report) -> None:
    from peft_surgical.experiment.outputs import LOADING
    from peft_surgical.keys import FIGURE, REPORT
    from peft_surgical.training.search import NONE

    out = console()
    what, settings = report.target, report.settings
    rate = "" if settings["lr"] is None else f", learning rate {settings['lr']:g}"
    title = f"{report.model}: {what}{rate}; cost {settings['cost']:.0f} training steps, all runs together"
    numbers = ("%", "95% interval", "n")
    rows = table("", "data", *numbers, "selection", title=escape(title), numbers=numbers)
    for one in report:
        ends = f"{100 * one.low:.1f} to {100 * one.high:.1f}"
        cells = (one.name, one.dataset, f"{100 * one.value:.1f}", ends, str(one.n), one.selection)
        rows.add_row(*map(escape, cells))
    out.print(rows)
    out.print()
    if settings["head"] != "kept":
        out.print(f"The head is {settings['head']}.", soft_wrap=True)
    folder = experiment.folder
    if what == NONE:
        out.print("Not to tune validates best: there is no adapter. The model stays as it is.", soft_wrap=True)
    others = f"{REPORT} (these numbers), {FIGURE}, {experiment.ledger.file.name} ({len(experiment.ledger)} runs)"
    adapter = "" if what == NONE else "the adapter (adapter_model.safetensors, adapter_config.json), "
    out.print(escape(f"In {folder}: {adapter}{others}"), soft_wrap=True)
    if what != NONE:
        out.print("Reloaded from there, it gives the same logits bit for bit. To load it:\n")
        out.print(escape(LOADING.format(report=str(folder / REPORT), folder=str(folder))), soft_wrap=True)
