"""`tune` and `compare`: what the command line does with one's own images, each in one call from Python."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.classes import fit_head
from ..bases.load import Base, load_base
from ..blocks import anatomy_of
from ..errors import ConfigError, RowsFailedError
from ..evaluation import Report
from ..extras import accelerator_or_cpu, require
from ..training.engines import Engine, on_ray, separated
from ..training.fitting import FitSettings
from ..training.ledger import Run
from .choosing import BATCH_SIZES, batch_size_for, choose, plan_of, run_grid, uses_rates
from .comparison import write_compared
from .experiment import Experiment
from .outputs import Tuned, read_source, write_tuned
from .requests import watched

COMPARED = ("none", "all", "head", "block1", "auto-rgn", "race")
"""What `compare` compares by default."""
SCHEDULERS, ENGINES = ("constant", "cosine"), ("local", "ray")


@dataclass(frozen=True)
class RunSettings:
    """Keyword arguments that `tune` and `compare` have in common.

    Attributes:
        lr: Learning rate, or several to choose from; None for 1e-3 and 1e-4.
        head_lr: The same where the head alone is tuned; None for ``lr``, or else 1e-2 and 1e-3.
        epochs: Length of each run; the epoch with the best validation accuracy counts.
        batch_size: Images per training step; None for the largest of `BATCH_SIZES` that makes 16 steps an epoch.
        optimizer: ``adam``, ``adamw`` or ``sgd``.
        weight_decay: Pulls towards the pretrained weights.
        scheduler: Of the learning rate: ``constant`` or ``cosine``.
        precision: ``bf16`` or ``fp16``; None for float32.
        norm_stats: Whose normalisation statistics move: ``frozen``, ``target`` or ``all``.
        delta_dtype: Dtype of the saved deltas: ``bfloat16`` or ``float16`` halve the file.
        tuning: Images to tune on, as a number or a share below 1; None for all.
        validation: The same of the images to choose with, which are drawn where the data brings none.
        test: The same of the images to report on.
        image_column: Column of the images in a table, as for `read_data`.
        label_column: Column of the labels.
        on_broken: What happens to images that cannot be decoded: ``raise``, ``skip`` or ``later``.
        head: ``auto``, ``keep`` or ``new``, as for `load_base`.
        augment: ``none``, ``flip`` or ``crop``.
        image_size: Height and width of the network's input, in pixels; None for the network's own.
        workers: Processes that load images.
        weights: ``pretrained``, or ``random`` to try things out.
        cpu: Whether to leave an accelerator alone.
        engine: ``local``, or ``ray`` for a Ray cluster, whose machines need the network, the data and the output folder
            under the same names.
        transform: With a network itself: PIL image in RGB -> float tensor (3, h, w).
        label_names: With a network itself: the classes of its outputs, in order.
    """

    lr: float | Sequence[float] | None = None
    head_lr: float | Sequence[float] | None = None
    epochs: int = 15
    batch_size: int | None = None
    optimizer: str = "adam"
    weight_decay: float = 1e-4
    scheduler: str = "constant"
    precision: str | None = None
    norm_stats: str = "frozen"
    delta_dtype: str | None = None
    tuning: int | float | None = None
    validation: int | float | None = None
    test: int | float | None = None
    image_column: str | None = None
    label_column: str | None = None
    on_broken: str = "raise"
    head: str = "auto"
    augment: str = "none"
    image_size: int | None = None
    workers: int = 0
    weights: str = "pretrained"
    cpu: bool = False
    engine: str = "local"
    transform: Callable[[Any], Tensor] | None = None
    label_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name, choices in (("scheduler", SCHEDULERS), ("engine", ENGINES)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}")

    @property
    def columns(self) -> dict[str, Any]:
        """How data is read, whatever is drawn from it; for `read_data`."""
        return {"image_column": self.image_column, "label_column": self.label_column, "on_broken": self.on_broken}


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
        output: Folder for the results; None makes a new temporary folder.
        seed: Seed of drawn parts, the order of training images, and a new head.
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
    with _experiment(network, data, output, given, seed, [asked], method is not None) as (experiment, is_first):
        old = None if source is None else read_source(experiment, source, **given.columns)
        choice = choose(experiment, asked, seed, is_method=method is not None, num_blocks=num_blocks, budget=budget)
        return write_tuned(experiment, choice, seed, old) if is_first else None


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
    with _experiment(network, data, output, RunSettings(**settings), 0, methods, True) as (experiment, is_first):
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
    network: Any, data: Any, output: Any, given: RunSettings, seed: int, asked: Sequence[str], is_method: bool
) -> Iterator[tuple[Experiment, bool]]:
    """The experiment that the arguments describe, and whether this process reports it; its plan is printed."""
    name, opener = _opened(network, given)
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
    with watched() as watch, _engine(given) as engine:
        watch.first = getattr(engine, "rank", 0) == 0
        experiment = Experiment(
            name,
            data,
            Path(tempfile.mkdtemp(prefix="peft-surgical-") if output is None else output).absolute(),
            fitting,
            lrs=lrs or (1e-3, 1e-4),
            head_lrs=head_lrs or (1e-2, 1e-3),
            reading={"tuning": given.tuning, "validation": given.validation, "test": given.test, **given.columns},
            config={"norm_stats": given.norm_stats, "delta_dtype": given.delta_dtype},
            augment=given.augment,
            image_size=given.image_size,
            arguments=loading,
            head=given.head,
            weights=given.weights,
            seed=seed,
            opener=opener,
            engine=engine,
            watch=watch,
        )
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


def _opened(network: Any, given: RunSettings) -> tuple[str, Callable[..., Base]]:
    """The name of a network, and what opens it as `load_base` does."""
    if isinstance(network, (str, os.PathLike)):
        if given.transform is not None or given.label_names is not None:
            raise ConfigError("transform= and label_names= are for a network itself: leave them out with a name")
        return os.fspath(network), load_base
    base = network
    if isinstance(network, nn.Module):
        if given.transform is None or given.label_names is None:
            raise ConfigError("with a network itself give transform= (PIL image -> tensor) and label_names=, too")
        names = tuple(given.label_names)
        base = Base(network, type(network).__name__, "", len(names), names, given.transform, given.transform, False)
    if not isinstance(base, Base):
        raise ConfigError(f"a network is a name, a folder, a Base or an nn.Module, not a {type(network).__name__}")
    if (given.augment, given.image_size, given.weights) != ("none", None, "pretrained"):
        raise ConfigError("augment=, image_size= and weights= say how a network is opened by name: leave them out")
    if given.head == "new" and not base.head_is_new:
        raise ConfigError('head="new" is for a network that is opened by name: give its name or folder')

    def opener(
        name: str, *, label_names: Sequence[str], head: str, weights: str, seed: int, augment: str = "none"
    ) -> Base:
        fit = fit_head(base.classes, base.label_names, label_names, None, head == "keep", name)
        if fit.outputs is None:
            raise ConfigError(f"{fit.note}. For a new head give the network by its name or folder")
        model = copy.deepcopy(base.model).cpu().eval()
        if head == "zero":
            tensors = set(anatomy_of(model)["head"].tensors)
            with torch.no_grad():
                for parameter in (value for key, value in model.named_parameters() if key in tensors):
                    parameter.zero_()
        outputs = None if fit.outputs == tuple(range(base.classes)) else fit.outputs
        return replace(base, model=model, outputs=outputs, head_note=base.head_note if base.head_is_new else fit.note)

    return base.name, opener
