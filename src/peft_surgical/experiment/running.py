"""One request of an experiment carried out: a run that is trained, scored, or measured on the test images."""

from __future__ import annotations

import copy
import functools
import gc
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader

from accelerate import PartialState

from ..choosing.methods import LOGISTIC, PRIVATE_HEAD
from ..choosing.pace import block_means
from ..choosing.resolve import score_blocks
from ..data.labelled import collate
from ..errors import ConfigError
from ..evaluation import predicted_classes
from ..evaluation.intervals import interval_of
from ..evaluation.metrics import judge, tolerant
from ..evaluation.selected import evidence_of
from ..training.fitting import FORWARD_SHARE, fit, forget_checkpoints
from ..training.ledger import Run
from ..training.logistic import solve_head
from ..training.private import private_head
from ..training.progress import DivergedError, Epochs, logging_to
from ..training.search import NONE, USUAL
from .requests import Score, Train, key_of
from .subject import LABELLED

if TYPE_CHECKING:
    from .experiment import Experiment

SOLVERS: dict[str, Callable[..., tuple[Any, Tensor, dict[str, float]]]] = {
    LOGISTIC: solve_head,
    PRIVATE_HEAD: private_head,
}
"""What carries out the methods that are `solved`."""
_LARGEST = sys.float_info.max  # stands for an infinite loss, which JSON cannot hold


def train_run(experiment: Experiment, run: Train) -> dict[str, Any]:
    """Train or solve one run, or evaluate the base; a full run leaves its adapter in ``experiment.adapter(key)``.

    A candidate that needs more memory than there is loses to the others, like one that diverges.
    """
    try:
        return _train_run(experiment, run)
    except (RuntimeError, MemoryError) as error:
        # Where several processes train one run together, the others would wait for this one forever: it has to end.
        if run.method == NONE or PartialState().num_processes > 1 or not is_out_of_memory(error):
            raise
    gc.collect()  # only now: the exception has kept what its frames hold
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    forget_checkpoints(experiment.checkpoints(key_of(run, experiment.shared)))
    return {"cost": 0.0, "out_of_memory": True} | _lost(experiment, run)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator's memory or the machine's did not suffice."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def _lost(experiment: Experiment, run: Train) -> dict[str, Any]:
    """What a candidate that gave no network has in its result, so that it loses to every other."""
    nothing = torch.full((len(experiment.rows("validation", run.seed)), 1), torch.nan)
    lost: dict[str, Any] = {"validation": 0.0, "validation_loss": _LARGEST}
    if experiment.prepared(run.method)[0].solved:
        lost["fold_loss"] = _LARGEST
    return lost | _evidence(experiment, run, nothing)


def refuse_lost(experiment: Experiment, runs: Sequence[Run]) -> None:
    """Raise ConfigError where not even the best run gave a network."""
    for run in runs:
        what = f"{run.key['method']} with learning rate {run.key['lr']:g}" if run.key["lr"] else run.key["method"]
        if run.result.get("diverged"):
            raise ConfigError(
                f"{what} and seed {run.key['seed']} ended in NaN, and no other rate did better: give a smaller one"
            )
        if run.result.get("out_of_memory"):
            size = experiment.fitting.batch_size
            way = f"give batch_size={size // 2} or less" if size > 1 else "tune fewer blocks, or smaller images"
            raise ConfigError(f"{what} needs more memory than there is with batches of {size}: {way}")


def _train_run(experiment: Experiment, run: Train) -> dict[str, Any]:
    validation, begun = experiment.rows("validation", run.seed), time.perf_counter()
    if run.method == NONE:
        logits = experiment.logits(experiment.base(run.seed).model, validation)
        found = judge(experiment.metrics[:1], logits, validation.label_tensor, validation.groups)
        taken = {"cost": 0.0, "seconds": round(time.perf_counter() - begun, 3)}
        return {"validation": found[experiment.metrics[0]], **taken, **_evidence(experiment, run, logits)}
    key = key_of(run, experiment.shared)
    row, zero, config = experiment.prepared(run.method)
    config = {**experiment.config, **config} | ({"norm_stats": run.how.norm_stats} if run.how.norm_stats else {})
    tuning = experiment.rows(LABELLED if run.how.refit else "tuning", run.seed)
    if row.solved:
        size = experiment.fitting.batch_size
        network = copy.deepcopy(experiment.base(run.seed, zero).model).to(experiment.device)
        solve = SOLVERS[row.name.partition("@")[0]]
        model, logits, told = solve(network, tuning, validation, config=config, collate=collate, **row.settings())
        found = judge(experiment.metrics[:1], logits, validation.label_tensor, validation.groups)
        cost = FORWARD_SHARE * (len(tuning) + len(validation)) / size
        _kept(experiment, key, run, model, zero)
        taken = {"cost": cost, "seconds": round(time.perf_counter() - begun, 3)}
        return {"validation": found[experiment.metrics[0]], **taken, **told, **_evidence(experiment, run, logits)}
    assert run.lr is not None
    epochs = run.epochs(experiment.fitting.epochs)
    if run.how.refit:  # as many steps as without the validation images
        epochs = max(1, round(epochs * len(experiment.rows("tuning", run.seed)) / len(tuning)))
    place = experiment.checkpoints(key)
    name = f"{run.method}-lr{run.lr:g}-seed{run.seed}"
    try:
        with logging_to(None if experiment.logs is None else experiment.logs / _file_name(name)):
            fitted = fit(
                copy.deepcopy(experiment.base(run.seed, zero).model),
                row,
                tuning,
                validation,
                replace(
                    experiment.fitting,
                    lr=run.lr,
                    seed=run.seed,
                    epochs=epochs if run.how.average else experiment.fitting.epochs,
                ),
                config=config,
                folder=place,
                stop_epoch=None if run.stop is None or run.how.average else epochs,
                average=run.how.average,
                collate=collate,
                callbacks=[Epochs(experiment.watch, run)],
                metric=functools.partial(_selected_by, experiment, validation.groups),
                arguments={**experiment.arguments, "run_name": name},
                cache=experiment.features,
                cached_views=experiment.cached_views,
            )
    except DivergedError as error:  # one of several candidates: it loses, and does not end the search
        forget_checkpoints(place)
        taken = {"cost": float(error.steps), "seconds": round(time.perf_counter() - begun, 3)}
        return {**taken, "diverged": True} | _lost(experiment, run)
    result: dict[str, Any] = {"validation": fitted.validation, "validation_loss": fitted.losses[-1]}
    result |= {"cost": fitted.cost, "epoch": fitted.best_epoch, "seconds": round(fitted.seconds, 3)}
    result |= {"curve": list(fitted.curve), "losses": list(fitted.losses), "prefix": fitted.prefix}
    result["saved"] = round(fitted.saved, 3)
    if fitted.logits is not None:
        result |= _evidence(experiment, run, fitted.logits)
    if fitted.record:
        result["factors"] = [block_means(factors, experiment.anatomy) for _, factors in sorted(fitted.record.items())]
    # Where all processes train together, the first one alone looks at the outcome.
    if run.stop is not None or not PartialState().is_main_process:
        return result
    _kept(experiment, key, run, fitted.model, zero)
    forget_checkpoints(place)
    return result


def _file_name(text: str) -> str:
    """A text as a file's name: a target may hold colons, stars, slashes and spaces."""
    return re.sub(r"[^\w.+-]+", "_", text)


def _kept(experiment: Experiment, key: dict[str, Any], run: Train, trained: Any, zero: bool) -> None:
    """Save the adapter of a run, and see that it gives what was trained."""
    trained.save_pretrained(experiment.adapter(key))
    if not experiment.config.get("delta_dtype"):  # what is rounded on disk differs on purpose
        experiment.check(
            trained, experiment.load(experiment.adapter(key), experiment.base(run.seed, zero).model), run.seed
        )


def _evidence(experiment: Experiment, run: Train, logits: Tensor) -> dict[str, Any]:
    """For `auto`: by what a candidate is compared, and whether it is right about each validation image."""
    if run.how == USUAL:
        return {}
    rows = experiment.rows("validation", run.seed)
    found = evidence_of(logits, rows.label_tensor)
    if experiment.metrics[0] != "accuracy":
        found["score"] = _selected_by(experiment, rows.groups, logits, rows.label_tensor)
    return found


def _selected_by(experiment: Experiment, groups: Tensor | None, logits: Tensor, labels: Tensor) -> float:
    return judge(experiment.metrics[:1], tolerant(logits), labels, groups)[experiment.metrics[0]]


def score_run(experiment: Experiment, asked: Score) -> str:
    """The scores of the blocks on tuning images, as JSON."""
    generator = torch.Generator().manual_seed(asked.seed)
    rows = experiment.rows("tuning", asked.seed)
    loader = DataLoader(rows, experiment.fitting.batch_size, shuffle=True, generator=generator, collate_fn=collate)
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(experiment.fitting.precision or "")
    network = copy.deepcopy(experiment.base(asked.seed).model).to(experiment.device)
    return score_blocks(network, loader, asked.criterion, blocks=experiment.anatomy, autocast=precision).to_json()


def test_run(experiment: Experiment, run: Train) -> dict[str, Any]:
    """The metric that selects as ``test``; where there are several metrics, all of them with their intervals."""
    seed, first, key = run.seed, PartialState().is_main_process, key_of(run, experiment.shared)
    if run.method == NONE:
        model = experiment.base(seed).model
    else:
        (missing,) = broadcast_object_list([first and not experiment.adapter(key).is_dir()])
        if missing:  # the experiment was over, and tidied up
            experiment.train(key)
        _, zero, _ = experiment.prepared(run.method)
        model = experiment.load(experiment.adapter(key), experiment.base(seed, zero).model) if first else nn.Identity()
    if not first:
        return {}
    rows = experiment.rows("test", seed)
    scores, labels = predicted_classes(experiment.logits(model, rows), rows.label_tensor), rows.label_tensor
    values = experiment.judge(experiment.metrics, scores, labels, rows.groups)
    found: dict[str, Any] = {"test": values[experiment.metrics[0]]}
    if experiment.metrics != ("accuracy",):
        intervals = {name: interval_of(name, scores, labels, rows.groups) for name in experiment.metrics}
        found["measured"] = {name: [values[name], at.low, at.high, n] for name, (at, n) in intervals.items()}
    return found
