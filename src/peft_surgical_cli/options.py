"""What the commands on one's own data have in common: their options, and the experiment that these describe."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from peft_surgical.experiment.experiment import Experiment
    from peft_surgical.experiment.progress import Bar
    from peft_surgical.training.engines import Workers

SCHEDULERS = ("constant", "cosine")


def count(text: str) -> int | float:
    """A number of images, or a share of them."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    raise typer.BadParameter(f"{text!r}: give a number of images, such as 200, or a share, such as 0.2")


Model = Annotated[str, typer.Argument(help="A timm id, a transformers id, or a folder of either.", show_default=False)]
ImagesArgument = Annotated[
    str,
    typer.Argument(metavar="DATA", help="A folder of class folders, parquet, a dataset's Hub id.", show_default=False),
]
Output = Annotated[Path, typer.Option(help="Folder for the results; run again with it to go on.", show_default=False)]
Lrs = Annotated[list[float] | None, typer.Option("--lr", help="One or more to choose from.", show_default="1e-3 1e-4")]
HeadLrs = Annotated[
    list[float] | None,
    typer.Option(
        "--head-lr", help="The same where the head alone is tuned.", show_default="that of --lr, else 1e-2 1e-3"
    ),
]
EpochsOption = Annotated[int, typer.Option(min=1, help="Of each run; the best by validation accuracy counts.")]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Images per training step.",
        show_default="the largest of 64, 32, 16, 8 that makes 16 steps an epoch",
    ),
]
Optimizer = Annotated[str, typer.Option(help="adam, adamw or sgd.")]
WeightDecay = Annotated[float, typer.Option(min=0, help="Pulls towards the pretrained weights.")]
Scheduler = Annotated[str, typer.Option(help="constant or cosine.")]
Precision = Annotated[str | None, typer.Option(help="bf16 or fp16.", show_default="float32")]
NormStats = Annotated[str, typer.Option(help="Whose normalisation statistics move: frozen, target or all.")]
DeltaDtype = Annotated[str | None, typer.Option(help="Of the saved deltas: bfloat16 or float16 halve the file.")]
Few = Annotated[Any, typer.Option("--images", parser=count, metavar="N", help="Tune on so many, or such a share.")]
Validation = Annotated[
    Any, typer.Option(parser=count, metavar="N", help="So many to choose with, drawn where not given.")
]
TestOption = Annotated[
    Any, typer.Option(parser=count, metavar="N", help="So many to report on, drawn where not given.")
]
OnBroken = Annotated[str, typer.Option(help="Images that cannot be decoded: raise or skip; later does not look.")]
Head = Annotated[
    str, typer.Option(help="auto keeps MODEL's head where it has DATA's classes; keep asks for it; new draws another.")
]
ImageColumn = Annotated[str | None, typer.Option(help="Of a table, where names do not tell.")]
LabelColumn = Annotated[str | None, typer.Option(help="The same for the labels.")]
Augment = Annotated[str, typer.Option(help="none, flip or crop.")]
ImageSize = Annotated[
    int | None,
    typer.Option(min=1, help="Height and width of the network's input, in pixels.", show_default="the network's own"),
]
NumWorkers = Annotated[int, typer.Option("--workers", min=0, metavar="N", help="Processes that load images.")]
Random = Annotated[bool, typer.Option("--random", help="Random weights: to try the command out.")]
Cpu = Annotated[bool, typer.Option("--cpu", help="Leave an accelerator alone.")]


class ManyValues(TyperCommand):
    """A command whose repeatable options take several values: ``--lr 1e-3 1e-4``, and numbers also ``1e-3,1e-4``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write ``--lr 1 2`` and ``--lr 1,2`` as ``--lr 1 --lr 2``; the values end at the next option."""
        many = {name for parameter in self.params if getattr(parameter, "multiple", False) for name in parameter.opts}
        written: list[str] = []
        option: str | None = None
        for argument in args:
            name, equals, value = argument.partition("=")
            if argument in many:
                option = argument
                written.append(argument)
            elif equals and name in many:
                option = None
                written += [f"{name}={part}" for part in _parts(value)]
            elif option is None or argument.startswith("--"):
                option = None
                written.append(argument)
            else:
                for part in _parts(argument):
                    written += [part] if written[-1] is option else [option, part]
        return super().parse_args(ctx, written)


def _parts(text: str) -> list[str]:
    """Numbers with commas between them, one by one; a comma in a name or a pattern is its own."""
    parts = [part for part in (one.strip() for one in text.split(",")) if part]
    try:
        [float(part) for part in parts]
    except ValueError:
        return [text]
    return parts or [text]


def experiment_of(
    model: str,
    data: str,
    output: Path,
    *,
    watch: Bar,
    engine: Workers,
    asked: Sequence[str],
    is_method: bool = False,
    seed: int,
    lr: list[float] | None,
    head_lr: list[float] | None,
    batch_size: int | None,
    scheduler: str,
    config: Mapping[str, Any],
    reading: Mapping[str, Any],
    augment: str,
    image_size: int | None,
    workers: int,
    head: str,
    random: bool,
    **fitting: Any,
) -> Experiment:
    """The experiment that the options describe, whose plan is printed.

    Raises:
        ConfigError: A choice that does not exist, or a learning rate that nothing would use.
    """
    import transformers

    from peft_surgical.errors import ConfigError
    from peft_surgical.experiment.experiment import Experiment
    from peft_surgical.experiment.planning import BATCH_SIZES, batch_size_for, plan_of
    from peft_surgical.training.fitting import FitSettings

    if scheduler not in SCHEDULERS:
        raise ConfigError(f"--scheduler {scheduler!r}: choose one of {', '.join(SCHEDULERS)}")
    lrs, head_lrs = tuple(lr or (1e-3, 1e-4)), tuple(head_lr or lr or (1e-2, 1e-3))
    watch.first = engine.rank == 0
    transformers.logging.set_verbosity_error()
    # Without persistent workers, the images that they keep in memory would be lost after each epoch.
    loading = {"dataloader_num_workers": workers, "dataloader_persistent_workers": True} if workers else {}
    experiment = Experiment(
        model,
        data,
        output,
        FitSettings(lrs[0], lr_scheduler=scheduler, batch_size=batch_size or BATCH_SIZES[0], **fitting),
        lrs=lrs,
        head_lrs=head_lrs,
        reading=reading,
        config=config,
        augment=augment,
        image_size=image_size,
        arguments=loading,
        head=head,
        weights="random" if random else "pretrained",
        seed=seed,
        engine=engine,
        watch=watch,
    )
    if batch_size is None:
        images = len(experiment.data(seed).tuning)
        experiment.fitting = replace(experiment.fitting, batch_size=batch_size_for(images))
    _refuse_unused_rates(experiment, asked, is_method, lr, head_lr)
    watch.note(f"{experiment.plan()}\n{plan_of(experiment, asked, is_method)}")
    return experiment


def _refuse_unused_rates(
    experiment: Experiment, asked: Sequence[str], is_method: bool, lr: list[float] | None, head_lr: list[float] | None
) -> None:
    from peft_surgical.errors import ConfigError
    from peft_surgical.experiment.planning import uses_rates

    if lr is None and head_lr is None:
        return
    used = [uses_rates(experiment, one, is_method) for one in asked]
    others, head = any(one for one, _ in used), any(one for _, one in used)
    what = ", ".join(asked)
    if head_lr is not None and not head:
        way = "give --lr" if others else "leave it out"
        raise ConfigError(f"--head-lr is for the head tuned alone, which {what} does not do: {way}")
    if lr is not None and not others and not (head and head_lr is None):
        way = "--head-lr says at which rate: leave --lr out" if head else "leave it out"
        raise ConfigError(f"--lr is not used by {what}: {way}")
