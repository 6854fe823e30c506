"""Options that several commands have, each written once; and those that ``tune`` and ``compare`` share as one class."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand


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
Few = Annotated[Any, typer.Option("--images", parser=count, metavar="N", help="Tune on so many, or such a share.")]
Validation = Annotated[
    Any, typer.Option(parser=count, metavar="N", help="So many to choose with, drawn where not given.")
]
OnBroken = Annotated[str, typer.Option(help="Images that cannot be decoded: raise or skip; later does not look.")]
Head = Annotated[
    str, typer.Option(help="auto keeps MODEL's head where it has DATA's classes; keep asks for it; new draws another.")
]
ImageColumn = Annotated[str | None, typer.Option(help="Column of the images in a table, where names do not tell.")]
LabelColumn = Annotated[str | None, typer.Option(help="The same for the labels.")]
Random = Annotated[bool, typer.Option("--random", help="Random weights: to try the command out.")]
Cpu = Annotated[bool, typer.Option("--cpu", help="Leave an accelerator alone.")]


@dataclass(frozen=True)
class SharedOptions:
    """The options of ``tune`` and ``compare``, in the order of their help: a field of `RunSettings` each."""

    lr: Annotated[
        list[float] | None, typer.Option("--lr", help="One or more to choose from.", show_default="1e-3 1e-4")
    ] = None
    head_lr: Annotated[
        list[float] | None,
        typer.Option(
            "--head-lr", help="The same where the head alone is tuned.", show_default="that of --lr, else 1e-2 1e-3"
        ),
    ] = None
    epochs: Annotated[int, typer.Option(min=1, help="Of each run; the best by validation accuracy counts.")] = 15
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images per training step.",
            show_default="the largest of 64, 32, 16, 8 that makes 16 steps an epoch",
        ),
    ] = None
    optimizer: Annotated[str, typer.Option(help="adam, adamw or sgd.")] = "adam"
    weight_decay: Annotated[float, typer.Option(min=0, help="Pulls towards the pretrained weights.")] = 1e-4
    scheduler: Annotated[str, typer.Option(help="Of the learning rate: constant or cosine.")] = "constant"
    precision: Annotated[str | None, typer.Option(help="bf16 or fp16.", show_default="float32")] = None
    norm_stats: Annotated[
        str | None,
        typer.Option(
            help="Whose normalisation statistics move: frozen, target or all; or estimated, once from the images.",
            show_default="frozen; auto chooses frozen or estimated",
        ),
    ] = None
    effort: Annotated[
        int, typer.Option(min=1, max=5, help="For auto: each candidate trains so many fifths of a run.")
    ] = 1
    delta_dtype: Annotated[
        str | None, typer.Option(help="Of the saved deltas: bfloat16 or float16 halve the file, float64 doubles it.")
    ] = None
    images: Few = None
    validation: Validation = None
    test: Annotated[
        Any, typer.Option(parser=count, metavar="N", help="So many to report on, drawn where not given.")
    ] = None
    image_column: ImageColumn = None
    label_column: LabelColumn = None
    on_broken: OnBroken = "raise"
    head: Head = "auto"
    augment: Annotated[str, typer.Option(help="none, flip or crop.")] = "none"
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Height and width of the network's input, in pixels.", show_default="the network's own"
        ),
    ] = None
    workers: Annotated[int, typer.Option("--workers", min=0, metavar="N", help="Processes that load images.")] = 0
    no_cache: Annotated[
        bool,
        typer.Option("--no-cache", help="Compute what is frozen before the target again in every epoch: same results."),
    ] = False
    cached_views: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --augment: so many fixed views of each image, in turn, so that they can be computed once.",
            show_default="new ones in every epoch",
        ),
    ] = None
    random: Random = False
    cpu: Cpu = False
    engine: Annotated[str, typer.Option(help="What carries out the runs: local, or ray for a Ray cluster.")] = "local"
    report_to: Annotated[
        str | None, typer.Option(help="What follows each run: tensorboard, wandb, trackio, ...", show_default="nothing")
    ] = None

    def settings(self) -> dict[str, Any]:
        """As keyword arguments of `peft_surgical.tune` and `peft_surgical.compare`."""
        given = asdict(self)
        given["tuning"], given["cache"] = given.pop("images"), not given.pop("no_cache")
        given["weights"] = "random" if given.pop("random") else "pretrained"
        return given


def with_shared_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter ``shared`` becomes the options of `SharedOptions`, behind its own."""
    own = [one for one in inspect.signature(command, eval_str=True).parameters.values() if one.name != "shared"]
    types, names = get_type_hints(SharedOptions, include_extras=True), [one.name for one in fields(SharedOptions)]
    options = [
        inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=types[one.name])
        for one in fields(SharedOptions)
    ]

    @functools.wraps(command)
    def called(**values: Any) -> None:
        shared = SharedOptions(**{name: values.pop(name) for name in names})
        command(**values, shared=shared)

    parameters = [*own, *options]
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {one.name: one.annotation for one in parameters}
    return called


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


OPTIONS_OF_TRANSFORMERS: dict[str, str] = {
    "output_dir": "--output",
    "learning_rate": "--lr",
    "num_train_epochs": "--epochs",
    "per_device_train_batch_size": "--batch-size",
    "weight_decay": "--weight-decay",
    "lr_scheduler_type": "--scheduler",
    "max_train_samples": "--images",
    "max_eval_samples": "--validation",
    "train_val_split": "--validation",
    "image_column_name": "--image-column",
    "label_column_name": "--label-column",
    "dataloader_num_workers": "--workers",
    "report_to": "--report-to",
    "hub_model_id": "--push",
    "use_cpu": "--cpu",
    "bf16": "--precision=bf16",
    "fp16": "--precision=fp16",
}
"""Option of transformers' example script for image classification -> the option of ``tune`` that does the same."""
_ALWAYS = ("do_train", "do_eval", "ignore_mismatched_sizes", "push_to_hub", "overwrite_output_dir")
_FLAGS = ("use_cpu", "bf16", "fp16", *_ALWAYS)
_PLACES = {"model_name_or_path": 0, "dataset_name": 1, "train_dir": 1}
TAKEN_FROM_TRANSFORMERS = frozenset({*OPTIONS_OF_TRANSFORMERS, *_ALWAYS, *_PLACES})
"""All of that script's options that ``tune`` takes."""


class NamesOfTransformers(ManyValues):
    """``tune``, which also takes the options of transformers' script, with underscores as there; its help hides them.

    Flags for what is always done here have no effect.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write such options as those of ``tune``; MODEL and DATA become arguments."""
        written: list[str] = []
        places: dict[int, str] = {}
        given = list(args)
        while given:
            argument = given.pop(0)
            name, equals, value = argument.removeprefix("--").partition("=")
            flag = name in _FLAGS and argument.startswith("--")
            if not argument.startswith("--") or not (flag or name in _PLACES or name in OPTIONS_OF_TRANSFORMERS):
                written.append(argument)
                continue
            if flag:  # as transformers reads them: alone, or with True or False
                said = value or (given.pop(0) if given and given[0].lower() in ("true", "false") else "true")
                on = said.lower() == "true"
                if on and name == "push_to_hub" and not any(one.startswith("--hub_model_id") for one in args):
                    raise typer.BadParameter("--push_to_hub: say where with --hub_model_id OWNER/NAME")
                written += [OPTIONS_OF_TRANSFORMERS[name]] if on and name not in _ALWAYS else []
                continue
            if not equals and not given:
                raise typer.BadParameter(f"--{name}: give it a value")
            value = value if equals else given.pop(0)
            if name in _PLACES:
                places[_PLACES[name]] = value
            elif (name, value) != ("report_to", "none"):
                written += [OPTIONS_OF_TRANSFORMERS[name], value]
        if len(places) == 1:
            raise typer.BadParameter("give --model_name_or_path and --train_dir both, or both as MODEL and DATA")
        return super().parse_args(ctx, [*(places[i] for i in sorted(places)), *written])
