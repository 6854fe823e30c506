"""The adapter that an experiment keeps: saved with the reason for its choice, reloaded, compared, and what it moved."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..evaluation import Report
from ..keys import CONFIG, PROCESSOR, REPORT, WEIGHTS
from ..results import withdraw
from ..training.ledger import Run
from ..training.search import NONE
from ..tuner.saving import publish_adapter
from .experiment import Experiment


@dataclass(frozen=True)
class Kept:
    """An adapter in its folder.

    Attributes:
        model: The adapter, loaded onto a base that was opened anew.
        opening: The arguments of `load_base`, beside the name, that open that base.
        moved: Block -> how far its parameters moved: L2 norm of the difference over their own; without a new head.
        head: What became of the head, in words.
    """

    model: nn.Module
    opening: dict[str, Any]
    moved: dict[str, float]
    head: str


def keep_adapter(experiment: Experiment, run: Run, selection: dict[str, Any] | None, folder: Path) -> Kept:
    """Save a run's adapter to a folder, with why it was chosen, and reload it from there.

    Raises:
        AdapterError: What is reloaded does not give the logits of what was saved, bit for bit.
    """
    key, seed = run.key, run.key["seed"]
    tuned = key["method"] != NONE
    zero = tuned and experiment.prepared(key["method"])[1]
    opening = experiment.opening(seed, zero)
    if not zero:  # decided by now: whoever opens the base again is not to be asked or warned
        opening["head"] = "new" if experiment.head_is_new else "keep"
    fresh = experiment.opener(experiment.model, **opening).model
    model = experiment.load(_adapter(experiment, run, folder), experiment.base(seed, zero).model) if tuned else None
    if not _is_reported(experiment, run):
        # A report of an earlier choice goes first: if this run is stopped before it has written its own, the folder
        # would hold the adapter of one choice and the report of another.
        withdraw(experiment.folder, (REPORT,))
    if model is not None:
        config = model.peft_config["default"]
        config.selection, config.base_model_name_or_path = selection, experiment.model
        processor = getattr(experiment.base(seed, zero).transform_eval, "processor", None)
        if processor is None:
            withdraw(folder, (PROCESSOR,))  # of another base, earlier
        publish_adapter(model, folder, experiment.folder, processor)
        after = experiment.load(folder, fresh)
        experiment.check(model, after, seed)
        moved = _moved(fresh, after, experiment)
    else:
        withdraw(folder, (CONFIG, WEIGHTS, PROCESSOR))  # of another choice, earlier
        after, moved = copy.deepcopy(fresh), {}
    return Kept(after, opening, moved, _head(experiment, key["method"], zero))


def _adapter(experiment: Experiment, run: Run, folder: Path) -> Path:
    """Where the run's adapter lies; a finished experiment has moved it to its place."""
    own = experiment.adapter(run.key)
    if (own / CONFIG).is_file():
        return own
    if (folder / CONFIG).is_file() and _is_reported(experiment, run):
        return folder
    experiment.train(run.key)
    return own


def _is_reported(experiment: Experiment, run: Run) -> bool:
    """Whether the folder's report is of this run."""
    report = experiment.folder / REPORT
    return report.is_file() and Report.load(report).settings.get("run") == experiment.digest(run.key)


def _head(experiment: Experiment, method: str, zero: bool) -> str:
    if not experiment.head_is_new:
        return experiment.base(experiment.seed).head_note
    if method == NONE:
        return "new, untrained"
    if experiment.head_only(method):
        return "new: all zeros in the base, which load_base(head='zero') opens, and tuned alone, as deltas"
    how = "all zeros in the base, which load_base(head='zero') opens, tuned as deltas" if zero else "saved whole"
    return f"new: trained alone for a part of the run and then with the target; {how}"


def _moved(base: nn.Module, tuned: Any, experiment: Experiment) -> dict[str, float]:
    merged = dict(copy.deepcopy(tuned).cpu().merge_and_unload().named_parameters())
    pretrained = {name: value.cpu() for name, value in base.named_parameters() if value.is_floating_point()}

    def norm(tensors: list[Tensor]) -> float:
        return float(sum(tensor.detach().double().square().sum().item() for tensor in tensors) ** 0.5)

    found = {}
    for block in experiment.anatomy:
        names = [name for name in block.tensors if name in pretrained]
        own = norm([pretrained[name] for name in names])
        if own and not (experiment.head_is_new and block.name == "head"):
            found[block.name] = norm([merged[name].double() - pretrained[name].double() for name in names]) / own
    return found
