"""``peft-surgical compare MODEL DATA --output DIR``: methods side by side on one's own images, over seeds."""

from __future__ import annotations

from typing import Annotated

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

COMPARED_METHODS = ("none", "all", "head", "block1", "auto-rgn", "race")


def compare_command(
    model: Model,
    data: ImagesArgument,
    output: Output,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="none, targets (block1, 'block1 + head', all), methods (auto-rgn, lp-ft, l2-sp, ...) and searches "
            "(race, cross-val, greedy, auto).",
            show_default=" ".join(COMPARED_METHODS),
        ),
    ] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="One or more.", show_default="0 1 2")] = None,
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
    random: Random = False,
    cpu: Cpu = False,
) -> None:
    """Compare methods on one's own images, over seeds; learning rates are chosen on the validation images of seed 0.

    Run again after Ctrl-C, the same command goes on from where it was. Under
    `accelerate launch --num_processes N -m peft_surgical compare ...` processes share the runs.
    """
    from peft_surgical.errors import RowsFailedError
    from peft_surgical.experiment.choosing import compare
    from peft_surgical.experiment.outputs import COMPARED, TABLE, compared, write_compared
    from peft_surgical.experiment.progress import watched
    from peft_surgical.keys import FIGURE, REPORT
    from peft_surgical.training.engines import separated

    methods, seeds = methods or list(COMPARED_METHODS), seeds or [0, 1, 2]
    failure: RowsFailedError | None = None
    with watched() as watch, separated() as engine:
        experiment = experiment_of(
            model,
            data,
            output,
            watch=watch,
            engine=engine,
            asked=methods,
            seed=0,
            lr=lr,
            head_lr=head_lr,
            scheduler=scheduler,
            config={"norm_stats": norm_stats, "delta_dtype": delta_dtype},
            reading={
                "tuning": images,
                "validation": validation,
                "test": test,
                "image_column": image_column,
                "label_column": label_column,
                "on_broken": on_broken,
            },
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
        try:
            rows = compare(experiment, methods, seeds)
        except RowsFailedError as error:
            if not error.done:
                raise
            rows, failure = error.done, error
        if not watch.first:
            return
        report = write_compared(experiment, rows, seeds, failure.failed if failure else {})
    out = console()
    shown = table(*COMPARED, numbers=tuple(COMPARED[1:-1]))
    for cells in compared(report):
        shown.add_row(*map(escape, cells))
    out.print(shown)
    out.print()
    out.print(escape(report.settings["caption"]), soft_wrap=True)
    files = ", ".join((REPORT, TABLE, FIGURE, experiment.ledger.file.name))
    out.print(escape(f"In {output}: {files}"), soft_wrap=True)
    if failure is not None:
        raise failure
