"""``peft-surgical tune MODEL DATA --output DIR``: choose what to tune, tune it, save it, and report."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from ..errors import ConfigError
from ..evaluation import Report
from ..experiments.choosing import choose
from ..experiments.experiment import Experiment
from ..experiments.outputs import FIGURE, LOADING, REPORT, read_source, write_tuned
from ..training.search import NONE
from .options import (
    Augment,
    BatchSize,
    Cpu,
    DeltaDtype,
    Epochs,
    Few,
    Head,
    HeadLrs,
    ImageColumn,
    Images,
    LabelColumn,
    Lrs,
    Model,
    NormStats,
    OnBroken,
    Optimizer,
    Output,
    Precision,
    Random,
    Scheduler,
    Test,
    Validation,
    WeightDecay,
    experiment_of,
)
from .progress import watched
from .terminal import console, table


def tune(
    model: Model,
    data: Images,
    output: Output,
    target: Annotated[
        str | None,
        typer.Option(
            help="What to tune: block2, 'block1 + head', all; auto-rgn, auto-snr or auto-fisher, which tune the blocks "
            "that score best (as a method, auto-rgn trains all tensors, each at its own rate: --method auto-rgn); or a "
            "search that trains candidates: race, cross-val, greedy, and auto, which races the head, all and the three "
            "blocks with the highest RGN.",
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
    epochs: Epochs = 15,
    batch_size: BatchSize = 64,
    optimizer: Optimizer = "adam",
    weight_decay: WeightDecay = 1e-4,
    scheduler: Scheduler = "constant",
    precision: Precision = None,
    norm_stats: NormStats = "frozen",
    delta_dtype: DeltaDtype = None,
    images: Few = None,
    validation: Validation = None,
    test: Test = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    on_broken: OnBroken = "raise",
    head: Head = "auto",
    augment: Augment = "none",
    seed: Annotated[int, typer.Option(help="Of drawn parts, training order and a new head.")] = 0,
    random: Random = False,
    cpu: Cpu = False,
) -> None:
    """Tune a part of a network on one's own images; the adapter, a report and a figure are written to a folder.

    Run again after Ctrl-C, the same command goes on from where it was.
    """
    if target is not None and method is not None:
        raise ConfigError(f"--target {target} and --method {method} both say what to tune: give one of them")
    columns = {"image_column": image_column, "label_column": label_column, "on_broken": on_broken}
    with watched() as watch:
        experiment = experiment_of(
            model,
            data,
            output,
            watch=watch,
            seed=seed,
            lr=lr,
            head_lr=head_lr,
            scheduler=scheduler,
            config={"norm_stats": norm_stats, "delta_dtype": delta_dtype},
            reading={"tuning": images, "validation": validation, "test": test, **columns},
            augment=augment,
            head=head,
            random=random,
            epochs=epochs,
            batch_size=batch_size,
            optimizer=optimizer,
            weight_decay=weight_decay,
            precision=precision,
            use_cpu=cpu,
        )
        watch.plan(experiment.plan())
        old = None if source is None else read_source(experiment, source, **columns)
        choice = choose(
            experiment,
            method or target or "auto",
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
