"""What the commands on one's own data have in common: their options, and the experiment that these describe."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from typer.core import TyperCommand

from ..errors import ConfigError
from ..experiments.experiment import Experiment
from ..training.engines import workers
from ..training.fitting import FitSettings
from .progress import Bar

SCHEDULERS = ("constant", "cosine")


def size(text: str) -> int | float:
    """A number of images, or a share of them."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    raise typer.BadParameter(f"{text!r}: give a number of images, such as 200, or a share, such as 0.2")


Model = Annotated[str, typer.Argument(help="A timm id, a transformers id, or a folder of either.", show_default=False)]
Images = Annotated[
    str,
    typer.Argument(metavar="DATA", help="A folder of class folders, parquet, a dataset's Hub id.", show_default=False),
]
Output = Annotated[Path, typer.Option(help="Folder for the results; run again with it to go on.", show_default=False)]
Lrs = Annotated[list[float] | None, typer.Option("--lr", help="One or more to choose from.", show_default="1e-3 1e-4")]
HeadLrs = Annotated[
    list[float] | None,
    typer.Option("--head-lr", help="The same where the head alone is tuned.", show_default="1e-2 1e-3"),
]
Epochs = Annotated[int, typer.Option(min=1, help="Of each run; the best by validation accuracy counts.")]
BatchSize = Annotated[int, typer.Option(min=1)]
Optimizer = Annotated[str, typer.Option(help="adam, adamw or sgd.")]
WeightDecay = Annotated[float, typer.Option(min=0, help="Pulls towards the pretrained weights.")]
Scheduler = Annotated[str, typer.Option(help="constant or cosine.")]
Precision = Annotated[str | None, typer.Option(help="bf16 or fp16.", show_default="float32")]
NormStats = Annotated[str, typer.Option(help="Whose normalisation statistics move: frozen, target or all.")]
DeltaDtype = Annotated[str | None, typer.Option(help="Of the saved deltas: bfloat16 or float16 halve the file.")]
Few = Annotated[Any, typer.Option("--images", parser=size, metavar="N", help="Tune on so many, or such a share.")]
Validation = Annotated[
    Any, typer.Option(parser=size, metavar="N", help="So many to choose with, drawn where not given.")
]
Test = Annotated[Any, typer.Option(parser=size, metavar="N", help="So many to report on, drawn where not given.")]
OnBroken = Annotated[str, typer.Option(help="Images that cannot be decoded: raise or skip; later does not look.")]
Head = Annotated[
    str, typer.Option(help="auto keeps MODEL's head where it has DATA's classes; keep asks for it; new draws another.")
]
ImageColumn = Annotated[str | None, typer.Option(help="Of a table, where names do not tell.")]
LabelColumn = Annotated[str | None, typer.Option(help="The same for the labels.")]
Augment = Annotated[str, typer.Option(help="none, flip or crop.")]
Random = Annotated[bool, typer.Option("--random", help="Random weights: to try the command out.")]
Cpu = Annotated[bool, typer.Option("--cpu", help="Leave an accelerator alone.")]


class ManyValues(TyperCommand):
    """A command whose repeatable options also take several values at once: ``--lr 1e-3 1e-4``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write ``--lr 1 2`` as ``--lr 1 --lr 2``; the values end at the next option."""
        many = {name for parameter in self.params if getattr(parameter, "multiple", False) for name in parameter.opts}
        written: list[str] = []
        option: str | None = None
        for argument in args:
            if argument in many:
                option = argument
                written.append(argument)
            elif option is None or argument.startswith("--"):
                option = None
                written.append(argument)
            else:
                written += [argument] if written[-1] is option else [option, argument]
        return super().parse_args(ctx, written)


def experiment_of(
    model: str,
    data: str,
    output: Path,
    *,
    watch: Bar,
    seed: int,
    lr: list[float] | None,
    head_lr: list[float] | None,
    scheduler: str,
    config: Mapping[str, Any],
    reading: Mapping[str, Any],
    augment: str,
    head: str,
    random: bool,
    **fitting: Any,
) -> Experiment:
    """The experiment that the options describe.

    Raises:
        ConfigError: A choice that does not exist.
    """
    if scheduler not in SCHEDULERS:
        raise ConfigError(f"--scheduler {scheduler!r}: choose one of {', '.join(SCHEDULERS)}")
    engine = workers()
    lrs, head_lrs = tuple(lr or (1e-3, 1e-4)), tuple(head_lr or (1e-2, 1e-3))
    watch.first = engine.rank == 0
    transformers.logging.set_verbosity_error()
    return Experiment(
        model,
        data,
        output,
        FitSettings(lrs[0], lr_scheduler=scheduler, **fitting),
        lrs=lrs,
        head_lrs=head_lrs,
        reading=reading,
        config=config,
        augment=augment,
        head=head,
        weights="random" if random else "pretrained",
        seed=seed,
        engine=engine,
        watch=watch,
    )
