"""Training a base on the source domain, before any of it is tuned: once, to a plain checkpoint, and resumable.

The paper's protocols begin with a network that is good on the source data. `train_source` makes one, and
``load_base(folder)`` opens it, as it opens any checkpoint that somebody else has trained.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from accelerate import PartialState
from peft_surgical.bases.libraries import save_checkpoint
from peft_surgical.bases.load import Base, load_base
from peft_surgical.choosing.methods import METHODS
from peft_surgical.data.labelled import collate
from peft_surgical.errors import AdapterError, ConfigError, DataError
from peft_surgical.evaluation import Report, measure, predict_logits
from peft_surgical.evaluation.evaluate_metrics import judge_with_evaluate
from peft_surgical.experiment.subject import Rows
from peft_surgical.extras import require
from peft_surgical.training.fitting import FitSettings, fit, forget_checkpoints

from .parts import Published

SOURCE_REPORT = "source.json"
HELD_OUT = 0.1
"""Share of the source images that chooses the epoch where the data set sets none aside."""


@dataclass(frozen=True)
class SourceTraining:
    """How a base is trained on the source domain.

    Attributes:
        fitting: Epochs, rate, optimizer and so on.
        method: ``full``, or ``lp-ft``: the new head first, then everything.
        options: Options of the method, such as ``{"share": 0.6}``.
        augment: As for `load_base`.
        rates: Optimizer -> the rate where the user asks for it.
        reference: Where these settings are from.
    """

    fitting: FitSettings
    method: str = "full"
    options: Mapping[str, Any] = field(default_factory=dict)
    augment: str = "none"
    rates: Mapping[str, float] = field(default_factory=dict)
    reference: str = ""

    def __post_init__(self) -> None:
        if METHODS[self.method].target != "all":
            raise ConfigError(f"method={self.method!r} leaves a part of the network untrained: choose full or lp-ft")


def train_source(
    model: str,
    data: Published,
    training: SourceTraining,
    folder: str | Path,
    *,
    arguments: Mapping[str, Any] | None = None,
    opener: Callable[..., Base] = load_base,
    progress: bool = False,
) -> Path:
    """The folder of a checkpoint that is trained on the source domain; trains it unless it is there.

    The head is new and all tensors move, statistics of norms included. The epoch is chosen on the held-out source
    images, or on a tenth of the source images, drawn by class, where there are none; no image of the target is used.
    Under ``accelerate launch`` all processes train together.

    Args:
        model: As for `load_base`.
        data: With a source.
        training: How.
        folder: For the checkpoint, ``source.json`` (a `Report`) and, until it is done, what is needed to go on.
        arguments: As for `fit`.
        opener: Opens the network, as `load_base` does.
        progress: As for `fit`.

    Raises:
        DataError: The data has no source.
        ConfigError: The folder holds a checkpoint of other data or settings.
    """
    place = Path(folder)
    settings = _settings(model, data, training)
    if (place / SOURCE_REPORT).is_file():
        known = Report.load(place / SOURCE_REPORT).settings
        if differ := [name for name, value in settings.items() if known.get(name) != value]:
            said = ", ".join(f"{name} {known.get(name)!r} instead of {settings[name]!r}" for name in differ)
            raise ConfigError(
                f"{place} holds a network that was trained on the source with {said}: name another folder, or give it "
                "as the checkpoint to start from"
            )
        return place
    if data.source is None:
        raise DataError(f"{data.name} has no source images here: give a checkpoint that was trained on them")
    base = opener(model, label_names=data.label_names, head="new", augment=training.augment, seed=training.fitting.seed)
    given, held_out = data.source, data.source_validation
    if held_out is None:
        given, held_out = _hold_out(given, training.fitting.seed)
    found = fit(
        copy.deepcopy(base.model),
        training.method,
        Rows(given, base.transform_train, keep=training.augment == "none"),
        Rows(held_out, base.transform_eval, keep=True),
        training.fitting,
        options=dict(training.options),
        config={"norm_stats": "all"},
        folder=place / "checkpoints",
        collate=collate,
        arguments=arguments,
        progress=progress,
    )
    state = PartialState()
    if state.is_main_process:
        tuned: Any = found.model
        trained = tuned.merge_and_unload().eval()
        save_checkpoint(base.library, trained, place, label_names=base.label_names, transform=base.transform_eval)
        _check(base, trained, place, Rows(held_out, base.transform_eval, keep=False))
        parts = {"source, held out": held_out, "source, test": data.source_test}
        measured = tuple(
            measure(
                "accuracy",
                [_accuracy(trained, Rows(part, base.transform_eval, keep=False))],
                dataset=f"{data.name} {name}",
                n=len(part),
                seeds=[training.fitting.seed],
                selection="epoch by accuracy on the source images held out"
                + (", these very ones" if part is held_out else ""),
            )
            for name, part in parts.items()
            if part is not None
        )
        outcome = {"best_epoch": found.best_epoch, "curve": list(found.curve), "cost": found.cost}
        report = Report(model, training.method, measured, settings | outcome | {"reference": training.reference})
        report.save(place / SOURCE_REPORT)  # last: with it the checkpoint counts as whole
        forget_checkpoints(place / "checkpoints")
    state.wait_for_everyone()
    return place


def _settings(model: str, data: Published, training: SourceTraining) -> dict[str, Any]:
    how = {name: value for name, value in asdict(training.fitting).items() if name != "use_cpu"}
    how |= {"method": training.method, "options": dict(training.options), "augment": training.augment}
    labels = {"source": _rows(data.source), "held_out": _rows(data.source_validation)}
    found: dict[str, Any] = json.loads(json.dumps({"model": model, "data": data.name, "images": labels, **how}))
    return found


def _rows(part: Any) -> int:
    return 0 if part is None else len(part)


def _hold_out(part: Any, seed: int) -> tuple[Any, Any]:
    require("datasets", "reading data")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            parts = part.train_test_split(test_size=HELD_OUT, seed=seed, stratify_by_column="label")
        except ValueError as error:
            raise DataError(
                f"a tenth of the {len(part)} source images cannot be held out by class ({error}): bring more of them, "
                "or give a checkpoint that was trained on the source"
            ) from error
    return parts["train"], parts["test"]


def _logits(model: nn.Module, rows: Any) -> torch.Tensor:
    device = next(model.parameters()).device
    batches = DataLoader(rows, batch_size=100, collate_fn=collate)
    return torch.cat([predict_logits(model, batch["pixel_values"].to(device)) for batch in batches])


def _accuracy(model: nn.Module, rows: Rows) -> float:
    return judge_with_evaluate(["accuracy"], _logits(model, rows), rows.label_tensor, None)["accuracy"]


def _check(base: Base, trained: nn.Module, folder: Path, rows: Rows) -> None:
    """Raise unless the checkpoint gives the logits of what was trained, bit for bit."""
    first = torch.utils.data.Subset(rows, range(min(100, len(rows))))
    device = next(trained.parameters()).device
    again = load_base(folder, label_names=base.label_names).model.to(device)
    one, other = _logits(trained, first), _logits(again, first)
    if not torch.equal(one, other):
        raise AdapterError(
            f"the checkpoint in {folder} does not give the logits of the network that was trained: they differ by up "
            f"to {(one - other).abs().max():.3g}. Report this, with the model {base.name!r}"
        )
