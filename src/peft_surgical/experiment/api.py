"""`tune` and `compare`: what the command line does with one's own images, each in one call from Python."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..bases.load import Base
from ..errors import ConfigError, RowsFailedError
from ..evaluation import Report
from ..extras import LARGEST_SEED, accelerator_or_cpu, check_range, require
from ..keys import CONFIG, FIGURE, PROCESSOR, REPORT, WEIGHTS
from ..results import claim
from ..training.auto import AutoSettings
from ..training.engines import Engine, on_ray, separated
from ..training.fitting import FitSettings
from ..training.ledger import Run
from ..training.progress import Watch
from .choosing import BATCH_SIZES, batch_size_for, choose, plan_of, run_grid, uses_rates
from .comparison import TABLE, write_compared
from .experiment import Experiment
from .mistakes import MISTAKES
from .outputs import Tuned, read_source, write_tuned
from .requests import watched
from .settings import RunSettings, opened

COMPARED = ("none", "all", "head", "block1", "auto-rgn", "race")
"""What `compare` compares by default."""
TUNED_FILES = (REPORT, FIGURE, MISTAKES, CONFIG, WEIGHTS, PROCESSOR)
"""What `tune` writes, beside the adapter's card and the run log."""


@dataclass(frozen=True)
class Compared:
    """What a comparison gave.

    Attributes:
        report: Accuracy of every method with its interval, ranks, costs and all settings; as in ``report.json``.
        rows: Method -> its runs, in the order of the seeds.
        failed: Method -> the error that ended it.
        folder: Folder of report, table, figure and run log.
    """

    report: Report
    rows: Mapping[str, list[Run]]
    failed: Mapping[str, Exception]
    folder: Path


def tune(
    network: str | os.PathLike[str] | nn.Module | Base,
    data: Any,
    target: str = "auto",
    *,
    method: str | None = None,
    num_blocks: int | None = None,
    budget: float | None = None,
    source: Any = None,
    output: str | os.PathLike[str] | None = None,
    seed: int = 0,
    watch: Watch | None = None,
    **settings: Any,
) -> Tuned | None:
    """Choose what to tune by validation accuracy, tune it, save the adapter, and measure it as it is reloaded.

    Called again with the same folder after it was stopped, it goes on from where it was.

    Args:
        network: A name or folder as for `load_base`; what that returns; or a network itself, with ``transform=`` and
            ``label_names=``.
        data: As for `read_data`.
        target: What to tune: blocks; ``auto-rgn`` and the like, for the blocks that score best; or a search: ``auto``,
            ``race``, ``cross-val``, ``greedy``.
        method: A method to train instead, such as ``auto-rgn``, ``lp-ft`` or ``full``.
        num_blocks: With ``auto-rgn`` and the like: how many neighbouring blocks; 1 by default.
        budget: With ``auto-rgn`` and the like: the largest share of the parameters instead.
        source: Data of the network's classes, as for `read_data`, on which to measure what was forgotten.
        output: Folder for the results: a new or an empty one, or that of an earlier call, whose results are replaced.
            None makes a new temporary folder.
        seed: Seed of drawn parts, the order of training images, and a new head.
        watch: Receives the plan and the progress, which by default are printed on standard error.
        **settings: Those of `RunSettings`.

    Returns:
        Model, report and adapter. None in all but the first of several processes that share the work.

    Raises:
        ConfigError: Something that does not exist, or settings that do not go together.
        DataError: Data that cannot be read, or a network that cannot be opened.
    """
    if method is not None and target != "auto":
        raise ConfigError(f"target={target!r} and method={method!r} both say what to tune: give one of them")
    given, asked = RunSettings(**settings), method or target
    described = _experiment(network, data, output, given, seed, [asked], method is not None, TUNED_FILES, [seed], watch)
    with described as (experiment, is_first):
        old = None if source is None else read_source(experiment, source, **given.columns)
        choice = choose(experiment, asked, seed, is_method=method is not None, num_blocks=num_blocks, budget=budget)
        return write_tuned(experiment, choice, seed, old) if is_first else None


def plan_tuning(
    network: str | os.PathLike[str] | nn.Module | Base,
    data: Any,
    target: str = "auto",
    *,
    output: str | os.PathLike[str] | None = None,
    seed: int = 0,
    **settings: Any,
) -> str:
    """What `tune` would do with these arguments, in the lines that it begins with; nothing is trained.

    Network and data are opened and checked as they will be, so that it raises what `tune` would raise before it trains.

    Args:
        network: As for `tune`.
        data: As for `tune`.
        target: As for `tune`.
        output: As for `tune`; the folder is made and claimed.
        seed: As for `tune`.
        **settings: Those of `RunSettings`.
    """
    given, silent = RunSettings(**settings), Watch()
    with _experiment(network, data, output, given, seed, [target], False, TUNED_FILES, [seed], silent) as (found, _):
        return plan_of(found, [target])


def compare(
    network: str | os.PathLike[str] | nn.Module | Base,
    data: Any,
    methods: Sequence[str] = COMPARED,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    output: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Compared | None:
    """Compare methods over seeds; learning rates are chosen on the validation images of seed 0.

    Called again with the same folder after it was stopped, it goes on from where it was. A method that fails does not
    keep the others from being compared, unless several processes share the work.

    Args:
        network: As for `tune`.
        data: As for `read_data`.
        methods: ``none``, targets, methods and searches.
        seeds: The seeds, each once.
        output: As for `tune`.
        **settings: Those of `RunSettings`.

    Returns:
        Report and runs. None in all but the first of several processes that share the work.

    Raises:
        ConfigError: As `tune`.
        DataError: As `tune`.
        RowsFailedError: All methods failed.
    """
    failed: Mapping[str, Exception] = {}
    given, written = RunSettings(**settings), (REPORT, FIGURE, TABLE)
    with _experiment(network, data, output, given, 0, methods, True, written, seeds) as (experiment, is_first):
        try:
            rows = run_grid(experiment, methods, seeds)
        except RowsFailedError as error:
            if not error.done:
                raise
            rows, failed = error.done, error.failed
        if not is_first:
            return None
        return Compared(write_compared(experiment, rows, seeds, failed), rows, failed, experiment.folder)


@contextmanager
def _experiment(
    network: Any,
    data: Any,
    output: Any,
    given: RunSettings,
    seed: int,
    asked: Sequence[str],
    is_method: bool,
    written: Sequence[str],
    seeds: Sequence[int] = (),
    watch: Watch | None = None,
) -> Iterator[tuple[Experiment, bool]]:
    """The experiment that the arguments describe, and whether this process reports it; its plan goes to the watch."""
    for one in seeds:
        check_range("seed", one, 0, LARGEST_SEED)
    name, opener = opened(network, given)
    # Before anything is read or trained.
    folder = claim(tempfile.mkdtemp(prefix="peft-surgical-") if output is None else output, written)
    lrs, head_lrs = _rates(given.lr), _rates(given.head_lr) or _rates(given.lr)
    fitting = FitSettings(
        lr=1e-3,
        epochs=given.epochs,
        batch_size=BATCH_SIZES[0] if given.batch_size is None else given.batch_size,
        optimizer=given.optimizer,
        weight_decay=given.weight_decay,
        lr_scheduler=given.scheduler,
        precision=given.precision,
        use_cpu=given.cpu,
    )
    # Without persistent workers, the images that they keep in memory would be lost after each epoch.
    loading = {"dataloader_num_workers": given.workers, "dataloader_persistent_workers": True} if given.workers else {}
    reporting = {"report_to": given.report_to, "logging_strategy": "epoch"} if given.report_to else {}
    with watched(watch) as watch, _engine(given) as engine:
        watch.first = getattr(engine, "rank", 0) == 0
        experiment = Experiment(
            name,
            data,
            folder,
            fitting,
            lrs=lrs or (1e-3, 1e-4),
            head_lrs=head_lrs or (1e-2, 1e-3),
            reading={"tuning": given.tuning, "validation": given.validation, "test": given.test, **given.columns},
            config={"norm_stats": given.norm_stats or "frozen", "delta_dtype": given.delta_dtype},
            augment=given.augment,
            image_size=given.image_size,
            arguments={**loading, **reporting},
            logs=folder / "logs" if given.report_to else None,
            head=given.head,
            weights=given.weights,
            seed=seed,
            opener=opener,
            engine=engine,
            watch=watch,
            asked=AutoSettings(
                lrs or None, (given.norm_stats,) if given.norm_stats else AutoSettings.policies, given.effort
            ),
            cache=given.cache,
            cached_views=given.cached_views,
        )
        experiment.ledger.runs()  # refuses a file that is no ledger
        if given.batch_size is None:
            size = batch_size_for(len(experiment.data(seed).tuning))
            experiment.fitting = replace(experiment.fitting, batch_size=size)
        others, head = uses_rates(experiment, asked, is_method)
        what = ", ".join(asked)
        if given.head_lr is not None and not head:
            way = "give lr=" if others else "leave it out"
            raise ConfigError(f"head_lr= is for the head tuned alone, which {what} does not do: {way}")
        if given.lr is not None and not others and not (head and given.head_lr is None):
            way = "head_lr= says at which rate: leave lr= out" if head else "leave it out"
            raise ConfigError(f"lr= is not used by {what}: {way}")
        watch.note(plan_of(experiment, asked, is_method))
        yield experiment, watch.first


def _rates(given: float | Sequence[float] | None) -> tuple[float, ...]:
    if given is None:
        return ()
    return (given,) if isinstance(given, (int, float)) else tuple(given)


@contextmanager
def _engine(given: RunSettings) -> Iterator[Engine]:
    if given.engine == "local":
        with separated() as engine:
            yield engine
        return
    ray = require("ray", "the engine ray", "ray")
    own = not ray.is_initialized()
    if own:
        ray.init()  # the cluster of RAY_ADDRESS, or one that runs here, or else a new one on this machine
    try:
        uses_gpu = accelerator_or_cpu(given.cpu).type != "cpu" or (not given.cpu and ray.cluster_resources().get("GPU"))
        yield on_ray(num_cpus=1, num_gpus=1 if uses_gpu else 0)
    finally:
        if own:
            ray.shutdown()
