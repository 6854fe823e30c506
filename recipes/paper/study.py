"""What a recipe does: the source step, the comparison, and its report, table, figure, adapter and card."""

from __future__ import annotations

import argparse
import functools
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants

from accelerate import PartialState
from peft_surgical.bases.load import Base, load_base
from peft_surgical.blocks import anatomy_of, parse, resolve
from peft_surgical.choosing.methods import method_of
from peft_surgical.data.layouts import is_hub_id
from peft_surgical.errors import ConfigError, DataError
from peft_surgical.evaluation import Report
from peft_surgical.evaluation.evaluate_metrics import judge_with_evaluate
from peft_surgical.experiment.choosing import run_grid
from peft_surgical.experiment.experiment import Experiment
from peft_surgical.experiment.requests import watched
from peft_surgical.experiment.subject import SEARCHES
from peft_surgical.training.auto import AutoSettings
from peft_surgical.training.engines import Engine, Together, separated
from peft_surgical.training.fitting import FitSettings
from peft_surgical.training.ledger import Run
from peft_surgical.training.progress import Watch, logging_to
from peft_surgical.training.search import NONE

from .corruptions import open_classifier
from .findings import check_handover, hand_over, held_out, write_study
from .parts import Published
from .pretraining import SOURCE_REPORT, SourceTraining, train_source
from .protocol import AUTO_SNR, CROSS_VAL, CROSS_VAL_WIDE, Protocol, as_asked, reported_rows, rows_of, runs_behind

SOURCE = "source"
"""Folder of the network that was trained on the source, in that of the study."""
BY_NAME = (load_base, open_classifier)
"""Openers of what `load_base` opens by the same name, with the arguments that the report keeps."""
Read = Callable[[int], Published]
"""Seed -> the data."""
Export = Callable[[Experiment, Mapping[str, list[Run]]], None]
"""Takes a finished experiment and the runs to report of each row."""


def run_study(
    protocol: Protocol,
    args: argparse.Namespace,
    read: Read,
    *,
    opener: Callable[..., Base] = load_base,
    seeded_base: bool = False,
    export: Export | None = None,
) -> Report | None:
    """Carry out a protocol with the options of `protocol.parser_of`; goes on where an earlier call was stopped.

    In ``args.output``: ``source/`` (a plain checkpoint), ``ledger.jsonl`` (every run), ``report.json``, ``table.md``,
    ``figure.png``, and ``adapter/``, that of the first seed of the row that validates best over all seeds; with
    ``--license`` it has its card.

    Args:
        protocol: What is compared.
        args: What the user asked for.
        read: The data of a seed.
        opener: Opens the network, as `load_base` does.
        seeded_base: Whether the seed that ``opener`` gets decides about the network.
        export: Called in the first process with the experiment and its reported runs, before adapters are removed.

    Returns:
        The report, in the first process; None in the others, and after ``--dry-run`` and ``--source-only``.

    Raises:
        SurgicalError: Something asked for cannot be done; says what, and the way out.
    """
    with _engine(args) as engine:
        return _carried_out(as_asked(protocol, args), args, read, opener, seeded_base, export, engine)


def _carried_out(
    protocol: Protocol,
    args: argparse.Namespace,
    read: Read,
    opener: Callable[..., Base],
    seeded_base: bool,
    export: Export | None,
    engine: Engine,
) -> Report | None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of files of weights
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")  # for those who develop it
    fitting = _fitting(protocol, args)
    rows = rows_of(protocol, args.target, args.method)
    checkpoint = None if protocol.source is None else args.source_checkpoint
    option = "--model" if checkpoint is None else "--source-checkpoint"
    check_handover(args, has_source_step=protocol.source is not None, by_name=opener in BY_NAME)
    opener = _brought(option, opener) if opener in BY_NAME else opener
    read = functools.cache(read)
    with _bringing("--data", str(args.data), protocol.layouts, published=protocol.data is not None):
        first = read(args.seeds[0])
    if args.forgetting:
        held_out(protocol, first.parts)
    folder = Path(args.output)
    trains_source = (
        protocol.source is not None and checkpoint is None and not (folder / SOURCE / SOURCE_REPORT).exists()
    )
    if trains_source and getattr(engine, "world", 1) > 1:
        raise ConfigError(
            "--spread runs: every process would train the source for itself. Run --source-only without it first: the "
            "same --output then has the network for all"
        )
    if args.dry_run or trains_source:
        said = plan(protocol, args, first, opener)  # refuses targets before the source takes hours
        if args.dry_run:
            if _is_first(engine):
                print(said)
            return None
    model, arguments = checkpoint or args.model, _arguments(args)
    logs = None if args.report_to == "none" else folder / "logs"
    if protocol.source is not None:
        if checkpoint is None:
            place, training = folder / SOURCE, _source(protocol, args, fitting)
            shown = _is_first(engine) and sys.stderr.isatty()
            with logging_to(logs and logs / SOURCE):
                train_source(model, first, training, place, arguments=arguments, opener=opener, progress=shown)
            model = str(place)
        if args.source_only:
            return None
    experiment = Experiment(
        model,
        read,
        folder,
        replace(fitting, lr=args.lr[0]),
        lrs=tuple(args.lr),
        head_lrs=tuple(args.head_lr),
        config={"norm_stats": args.norm_stats},
        augment=args.augment,
        asked=AutoSettings(effort=args.effort),
        cache=not args.no_cache,
        seed=args.seeds[0],
        metrics=protocol.metrics,
        judge=judge_with_evaluate,
        opener=opener,
        seeded_base=seeded_base,
        arguments=arguments,
        logs=logs,
        engine=engine,
    )
    with watched() if _is_first(engine) else nullcontext(Watch()) as experiment.watch:
        behind = runs_behind(rows, args.thresholds, experiment.anatomy.names)
        found = run_grid(experiment, behind, args.seeds)
    report = None
    if _is_first(engine):
        if export is not None:
            export(experiment, found)
        unit = fitting.batch_size / args.batch_size
        found = reported_rows(rows, args.thresholds, experiment.anatomy.names, found)
        report = write_study(protocol, experiment, found, args.seeds, unit=unit, forgetting=args.forgetting)
        if (url := hand_over(args, report, folder)) is not None:
            print(f"pushed to {url}")
    if isinstance(engine, Together):
        PartialState().wait_for_everyone()
    return report


@contextmanager
def _engine(args: argparse.Namespace) -> Iterator[Engine]:
    if args.spread == "runs":
        with separated() as engine:
            yield engine
        return
    # Before anything else asks for it; as Trainer decides it in `fit`: without an accelerator, gloo.
    PartialState(cpu=args.cpu or not torch.accelerator.is_available())
    yield Together()


def _is_first(engine: Engine) -> bool:
    return PartialState().is_main_process if isinstance(engine, Together) else getattr(engine, "rank", 0) == 0


def _fitting(protocol: Protocol, args: argparse.Namespace) -> FitSettings:
    world = PartialState().num_processes if args.spread == "batches" else 1
    share = world * args.accumulation
    if args.batch_size % share:
        raise ConfigError(
            f"--batch-size {args.batch_size} does not divide over {world} process(es) and {args.accumulation} "
            f"accumulated batch(es): give a multiple of {share}"
        )
    return replace(
        protocol.fitting,
        epochs=args.epochs,
        batch_size=args.batch_size // share,
        accumulation=args.accumulation,
        optimizer=args.optimizer,
        lr_scheduler=args.scheduler,
        weight_decay=args.weight_decay,
        precision=args.precision,
        use_cpu=args.cpu or not torch.accelerator.is_available(),
    )


def _source(protocol: Protocol, args: argparse.Namespace, fitting: FitSettings) -> SourceTraining:
    training = protocol.source
    assert training is not None
    world = PartialState().num_processes if args.spread == "batches" else 1
    batch = max(1, training.fitting.batch_size // world)
    optimizer, first = args.source_optimizer, training.fitting
    usual = first.lr if optimizer == first.optimizer else training.rates.get(optimizer)
    if (lr := args.source_lr or usual) is None:
        raise ConfigError(f"--source-optimizer {optimizer} has no usual rate here: give --source-lr, too")
    own = replace(
        training.fitting,
        lr=lr,
        optimizer=optimizer,
        epochs=args.source_epochs,
        batch_size=batch,
        precision=fitting.precision,
        use_cpu=fitting.use_cpu,
    )
    return replace(training, fitting=own)


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What Trainer is told beside what a run is."""
    found: dict[str, Any] = {"dataloader_num_workers": args.workers}
    if args.report_to != "none":
        found |= {"report_to": args.report_to, "logging_strategy": "epoch"}
    return found


@contextmanager
def _bringing(option: str, what: str, takes: str, *, published: bool = True) -> Iterator[None]:
    """Errors about something of the Hub that is not here say how to bring it."""
    try:
        yield
    except DataError as error:
        name = what.removeprefix("hf-hub:")
        if Path(name).expanduser().exists() or not (is_hub_id(name) or "/" not in name):
            raise
        offline = "HF_HUB_OFFLINE is set, so nothing is downloaded. " if constants.HF_HUB_OFFLINE else ""
        way = f"{name} --repo-type dataset" if option == "--data" else name if "/" in name else f"timm/{name}"
        fetch = f"Where there is a network, `hf download {way} --local-dir DIR` fetches it for {option} DIR. "
        raise DataError(f"{error}\n{offline}{fetch if published else ''}{option} takes {takes}") from error


def _brought(option: str, opener: Callable[..., Base]) -> Callable[..., Base]:
    def opened(name: str, **how: Any) -> Base:
        with _bringing(option, name, "a timm id, a transformers id, or a folder"):
            return opener(name, **how)

    return opened


# --- the plan ---


def plan(protocol: Protocol, args: argparse.Namespace, data: Published, opener: Callable[..., Base]) -> str:
    """What a call would do, in words: data, network, and for each row its tensors, parameters, steps and rates.

    Reads the network's config, not its weights, and opens no image.
    """
    checkpoint = None if protocol.source is None else args.source_checkpoint
    network = opener(checkpoint or args.model, label_names=data.label_names, head="new", weights="random").model
    anatomy = anatomy_of(network)
    sizes = {name: value.numel() for name, value in network.named_parameters()}
    whole = sum(sizes.values())
    lines = [str(data), "", f"network: {checkpoint or args.model}, {whole:,} parameters in {len(list(anatomy))} blocks"]
    if protocol.source is not None:
        images = len(data.source) if data.source else 0
        how = f"{protocol.source.method}, {args.source_epochs} epochs on {images} images"
        lines.append(f"source: {how if checkpoint is None else 'trained already'}")
    steps = args.epochs * math.ceil(len(data.tuning) / args.batch_size)
    run = f"{args.optimizer}, {args.scheduler} rate, batch {args.batch_size}, {args.epochs} epochs"
    lines += [f"one run: {steps} steps ({run})", f"seeds: {', '.join(map(str, args.seeds))}", ""]
    head = set(anatomy["head"].tensors) if "head" in anatomy else set()
    for name in rows_of(protocol, args.target, args.method):
        if name in (CROSS_VAL, CROSS_VAL_WIDE):
            beside = "" if name == CROSS_VAL else ", all and none"
            what = f"the one of {', '.join(anatomy.names)}{beside} that validates best"
            lines.append(f"{name}: {what}{_paper(protocol, name)}")
            continue
        if name == NONE or name in SEARCHES:
            what = "the network as it is" if name == NONE else "a search over blocks, head and all"
            lines.append(f"{name}: {what}{_paper(protocol, name)}")
            continue
        tensors = [tensor for tensor in resolve(parse(method_of(name).target), anatomy) if tensor in sizes]
        count = sum(sizes[tensor] for tensor in tensors)
        rates = args.head_lr if set(tensors) <= head else args.lr
        said = ", ".join(f"{rate:g}" for rate in rates)
        if name == AUTO_SNR and args.thresholds:
            said += f"; thresholds {', '.join(f'{one:g}' for one in args.thresholds)}"
        size = f"{len(tensors)} tensors, {count:,} parameters ({count / whole:.1%})"
        lines.append(f"{name}: {size}; rates {said}{_paper(protocol, name)}")
    return "\n".join(lines)


def _paper(protocol: Protocol, row: str) -> str:
    found = protocol.published.get(row)
    return "" if found is None else f"; the paper: {found:g} %"
