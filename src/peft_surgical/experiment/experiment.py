"""Surgical fine-tuning of one base on one's own data: the runs of the one-call functions and of the recipes.

An `Experiment` does one run that a key names, on the base and the data of its `Subject`. Which runs there are is
decided in `choosing`; `outputs` writes what came of them.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from accelerate import PartialState

from ..choosing.pace import block_means
from ..choosing.resolve import score_blocks
from ..choosing.scores import BlockScores
from ..config import SurgicalConfig
from ..data.labelled import collate
from ..errors import AdapterError, ConfigError
from ..evaluation import predict_logits, predicted_classes
from ..evaluation.metrics import check_metrics, interval_of, judge, tolerant
from ..evaluation.selected import evidence_of
from ..extras import accelerator_or_cpu
from ..fingerprints import fingerprint
from ..keys import PRIVATE
from ..prefix.storage import FeatureStore
from ..training.auto import AutoSettings
from ..training.engines import Engine, Workers
from ..training.fitting import FORWARD_SHARE, FitSettings, fit, forget_checkpoints
from ..training.ledger import Ledger, Run
from ..training.logistic import solve_head
from ..training.search import HOW, NONE, USUAL
from ..training.trainer import DivergedError, Epochs, Watch, file_name, logging_to
from .requests import Score, Test, Train, key_of, request_of
from .subject import LABELLED, Subject

_FEATURES = "features"  # folder for what is computed once for each image
_LARGEST = sys.float_info.max  # stands for an infinite loss, which JSON cannot hold


@dataclass(eq=False)
class Experiment(Subject):
    """A `Subject`, and how to train on it.

    Attributes:
        folder: For the ledger, checkpoints and outputs.
        fitting: How to train; rate and seed are set for each run.
        config: Further fields of the `SurgicalConfig`: ``norm_stats``, ``delta_dtype``.
        metrics: Names of `evaluation.metrics.JUDGES`. The first chooses epochs, rates and targets; all are reported
            on test images.
        judge: Measures what is reported, called as `evaluation.metrics.judge` is.
        arguments: As for `fit`.
        logs: Folder for TensorBoard's files, a folder for each run in it; None leaves them to Trainer.
        engine: What carries out the runs; see `training.engines`.
        watch: Receives the progress of runs.
        asked: What the search `auto` looks among.
        cache, cached_views: As for `fit`, but that the store is the experiment's own.
        started: When it was made, by `time.monotonic`.
        found: The runs so far that earlier calls had left in the ledger, by their digests.
    """

    folder: Path
    fitting: FitSettings
    _: KW_ONLY
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[str, ...] = ("accuracy",)
    judge: Callable[[Sequence[str], Tensor, Tensor, Tensor | None], Mapping[str, float]] = judge
    arguments: Mapping[str, Any] = field(default_factory=dict)
    logs: Path | None = None
    engine: Engine = field(default_factory=Workers)
    watch: Watch = field(default_factory=Watch)
    asked: AutoSettings = field(default_factory=AutoSettings)
    cache: bool = True
    cached_views: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        SurgicalConfig(target="all", **self.config)
        check_metrics(self.metrics)
        for lr in (*self.lrs, *self.head_lrs):
            replace(self.fitting, lr=lr)  # refuses what is no rate
        if self.device.type == "cpu":
            if self.fitting.precision == "fp16":
                raise ConfigError("precision='fp16' needs a GPU: choose bf16, or leave it out for float32")
            self.fitting = replace(self.fitting, use_cpu=True)  # Trainer refuses bfloat16 on the CPU otherwise
        self.ledger = Ledger(self.folder / "ledger.jsonl")
        alone = isinstance(self.engine, Workers) and self.engine.world == 1  # or else one computes for all
        features = self.folder / PRIVATE / _FEATURES
        self.features = FeatureStore(folder=features, shared=not alone) if self.cache else False
        self.started = time.monotonic()
        self.done: set[str] = set()
        self.found: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """For the processes of a cluster, which open the base themselves and show no progress."""
        left = {"anatomy", "_transforms", "_whole_head"}
        state = {name: value for name, value in self.__dict__.items() if name not in left}
        return state | {"_bases": {}, "_rows": {}, "engine": Workers(), "watch": Watch()}

    @property
    def device(self) -> torch.device:
        """Where scores and accuracies are computed."""
        return accelerator_or_cpu(self.fitting.use_cpu)

    @functools.cached_property
    def shared(self) -> dict[str, Any]:
        """What the keys of all runs share: all that determines them but method, rate and seed."""
        data, base = self.data(self.seed), self.base(self.seed).model.state_dict()
        fitting = {name: value for name, value in asdict(self.fitting).items() if name not in {"lr", "seed", "use_cpu"}}
        left_out = set(self.anatomy["head"].tensors) if self.head_is_new else set()
        prints = fingerprint({name: value for name, value in base.items() if name not in left_out})
        digest = _digest(prints) if self.weights == "pretrained" else None  # random weights follow from the seed
        sizes = {f"{part}_images": self.reading.get(part) for part in ("tuning", "validation", "test")}
        what = {"model": self.model, "base": digest, "weights": self.weights, "data": data.fingerprint, **sizes}
        unusual: dict[str, Any] = {"metrics": None if self.metrics == ("accuracy",) else list(self.metrics)}
        unusual |= {"image_size": self.image_size, "cached_views": self.cached_views}
        unusual |= {"outputs": self.outputs and list(self.outputs)}
        what |= {name: value for name, value in unusual.items() if value is not None}
        return what | {"augment": self.augment} | fitting | dict(self.config)

    def key(self, method: str, lr: float | None, seed: int) -> dict[str, Any]:
        """The key of a run."""
        return key_of(Train(method, lr, seed), self.shared)

    def run(
        self, train: Callable[[dict[str, Any]], Mapping[str, Any]], keys: Sequence[Any], ledger: Ledger
    ) -> list[Run]:
        """An `Engine`: the experiment's own, with progress."""
        requests = {_digest(key): request_of(key) for key in keys}
        known = {_digest(key): result for key in keys if (result := ledger.find(key)) is not None}
        for digest, result in known.items():  # before anything is trained, so that a resumed search says so at once
            self.watch.finished(requests[digest], result, known=True)
        self.found |= set(known) - self.done
        if missing := [one for digest, one in requests.items() if digest not in known]:
            self.watch.planned(missing, self.fitting.epochs)
        reported = set(known)

        def watched(key: dict[str, Any]) -> Mapping[str, Any]:
            result = train(key)
            reported.add(_digest(key))
            self.done.add(_digest(key))  # at once: an engine may raise before it has done all
            self.watch.finished(request_of(key), result, known=False)
            return result

        runs = self.engine(watched, keys, ledger)
        self.done |= set(requests) - set(known)
        for run in runs:  # what other processes have done
            if _digest(run.key) not in reported:
                self.watch.finished(request_of(run.key), run.result, known=True)
        return runs

    def train(self, key: dict[str, Any]) -> dict[str, Any]:
        """Do what a key asks for; a ``Fit`` of `search`. A full run leaves its adapter in ``adapter(key)``."""
        request = request_of(key)
        if isinstance(request, Test):
            return self._test(request.run)
        if isinstance(request, Score):
            return {"scores": self._score(request)}
        return self._train(request)

    def _train(self, run: Train) -> dict[str, Any]:
        validation = self.rows("validation", run.seed)
        if run.method == NONE:
            logits = self.logits(self.base(run.seed).model, validation)
            found = judge(self.metrics[:1], logits, validation.label_tensor, validation.groups)
            return {"validation": found[self.metrics[0]], "cost": 0.0, **self._evidence(run, logits)}
        key = key_of(run, self.shared)
        row, zero, config = self.prepared(run.method)
        config = {**self.config, **config} | ({"norm_stats": run.how.norm_stats} if run.how.norm_stats else {})
        tuning = self.rows(LABELLED if run.how.refit else "tuning", run.seed)
        if row.solved:
            size = self.fitting.batch_size
            network = copy.deepcopy(self.base(run.seed, zero).model).to(self.device)
            model, logits, folds = solve_head(network, tuning, validation, config=config, collate=collate)
            found = judge(self.metrics[:1], logits, validation.label_tensor, validation.groups)
            cost = FORWARD_SHARE * (len(tuning) + len(validation)) / size
            self._keep(key, run, model, zero)
            return {"validation": found[self.metrics[0]], "cost": cost, **folds, **self._evidence(run, logits)}
        assert run.lr is not None
        epochs = run.epochs(self.fitting.epochs)
        place = self.folder / PRIVATE / "checkpoints" / self.digest(key)
        name = f"{run.method}-lr{run.lr:g}-seed{run.seed}"
        try:
            with logging_to(None if self.logs is None else self.logs / file_name(name)):
                fitted = fit(
                    copy.deepcopy(self.base(run.seed, zero).model),
                    row,
                    tuning,
                    validation,
                    replace(
                        self.fitting,
                        lr=run.lr,
                        seed=run.seed,
                        epochs=epochs if run.how.average else self.fitting.epochs,
                    ),
                    config=config,
                    folder=place,
                    stop_epoch=None if run.stop is None or run.how.average else epochs,
                    average=run.how.average,
                    collate=collate,
                    callbacks=[Epochs(self.watch, run)],
                    metric=functools.partial(self._selecting, validation.groups),
                    arguments={**self.arguments, "run_name": name},
                    cache=self.features,
                    cached_views=self.cached_views,
                )
        except DivergedError as error:  # one of several candidates: it loses, and does not end the search
            forget_checkpoints(place)
            lost = {"validation": 0.0, "validation_loss": _LARGEST, "cost": float(error.steps), "diverged": True}
            return lost | self._evidence(run, torch.full((len(validation), 1), torch.nan))
        result: dict[str, Any] = {"validation": fitted.validation, "validation_loss": fitted.losses[-1]}
        result |= {"cost": fitted.cost, "epoch": fitted.best_epoch, "seconds": round(fitted.seconds, 3)}
        result |= {"curve": list(fitted.curve), "losses": list(fitted.losses), "prefix": fitted.prefix}
        if fitted.logits is not None:
            result |= self._evidence(run, fitted.logits)
        if fitted.record:
            result["factors"] = [block_means(factors, self.anatomy) for _, factors in sorted(fitted.record.items())]
        # Where all processes train together, the first one alone looks at the outcome.
        if run.stop is not None or not PartialState().is_main_process:
            return result
        self._keep(key, run, fitted.model, zero)
        forget_checkpoints(place)
        return result

    def _keep(self, key: dict[str, Any], run: Train, trained: Any, zero: bool) -> None:
        """Save the adapter of a run, and see that it gives what was trained."""
        trained.save_pretrained(self.adapter(key))
        if not self.config.get("delta_dtype"):  # what is rounded on disk differs on purpose
            self.check(trained, self.load(self.adapter(key), self.base(run.seed, zero).model), run.seed)

    def _evidence(self, run: Train, logits: Tensor) -> dict[str, Any]:
        """For `auto`: by what a candidate is compared, and whether it is right about each validation image."""
        if run.how == USUAL:
            return {}
        rows = self.rows("validation", run.seed)
        found = evidence_of(logits, rows.label_tensor)
        if self.metrics[0] != "accuracy":
            found["score"] = self._selecting(rows.groups, logits, rows.label_tensor)
        return found

    def _selecting(self, groups: Tensor | None, logits: Tensor, labels: Tensor) -> float:
        return judge(self.metrics[:1], tolerant(logits), labels, groups)[self.metrics[0]]

    def _score(self, asked: Score) -> str:
        generator = torch.Generator().manual_seed(asked.seed)
        rows = self.rows("tuning", asked.seed)
        loader = DataLoader(rows, self.fitting.batch_size, shuffle=True, generator=generator, collate_fn=collate)
        precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.fitting.precision or "")
        network = copy.deepcopy(self.base(asked.seed).model).to(self.device)
        return score_blocks(network, loader, asked.criterion, blocks=self.anatomy, autocast=precision).to_json()

    def scores(self, criterion: str, seed: int) -> BlockScores:
        """Scores of the blocks on the tuning images, in all processes the same; not of a new head, which is random."""
        (run,) = self.run(self.train, [key_of(Score(criterion, seed), self.shared)], self.ledger)
        found = BlockScores.from_json(run.result["scores"])
        return found.without("head", self.anatomy["head"].tensors) if self.head_is_new else found

    def tested(self, runs: Sequence[Run]) -> list[Run]:
        """Finished runs with their results on the test images, if there are any: only what is reported sees them."""
        asked: list[dict[str, Any] | None] = []
        for trained in (request_of(run.key) for run in runs):
            assert isinstance(trained, Train)
            has_test = self.data(trained.seed).test is not None
            asked.append(key_of(Test(trained), self.shared) if has_test else None)
        keys = list({_digest(key): key for key in asked if key is not None}.values())
        found = {_digest(one.key): one.result for one in self.run(self.train, keys, self.ledger)} if keys else {}
        own = [found.get(_digest(key), {}) for key in asked]
        return [Run(run.key, {**run.result, **result}, run.notes) for run, result in zip(runs, own, strict=True)]

    def _test(self, run: Train) -> dict[str, Any]:
        """The metric that selects as ``test``; where there are several metrics, all of them with their intervals."""
        seed, first, key = run.seed, PartialState().is_main_process, key_of(run, self.shared)
        if run.method == NONE:
            model = self.base(seed).model
        else:
            (missing,) = broadcast_object_list([first and not self.adapter(key).is_dir()])
            if missing:  # the experiment was over, and tidied up
                self.train(key)
            _, zero, _ = self.prepared(run.method)
            model = self.load(self.adapter(key), self.base(seed, zero).model) if first else nn.Identity()
        if not first:
            return {}
        rows = self.rows("test", seed)
        scores, labels = predicted_classes(self.logits(model, rows), rows.label_tensor), rows.label_tensor
        values = self.judge(self.metrics, scores, labels, rows.groups)
        found: dict[str, Any] = {"test": values[self.metrics[0]]}
        if self.metrics != ("accuracy",):
            intervals = {name: interval_of(name, scores, labels, rows.groups) for name in self.metrics}
            found["measured"] = {name: [values[name], at.low, at.high, n] for name, (at, n) in intervals.items()}
        return found

    def logits(self, model: nn.Module, rows: Dataset[Any]) -> Tensor:
        """Logits (images, classes), on the CPU."""
        model.to(self.device)
        workers = self.arguments.get("dataloader_num_workers", 0)
        batches = DataLoader(rows, batch_size=100, collate_fn=collate, num_workers=workers)
        return torch.cat([predict_logits(model, batch["pixel_values"]) for batch in batches])

    def digest(self, key: Mapping[str, Any]) -> str:
        """A short name for a run, the same whatever share of it was trained if it can go on from there."""
        goes_on = not key.get(HOW, {}).get("average")
        return _digest({name: value for name, value in key.items() if name != "stop" or not goes_on})

    def adapter(self, key: Mapping[str, Any]) -> Path:
        """Where a finished run leaves its adapter until the experiment is over."""
        return self.folder / PRIVATE / "runs" / self.digest(key)

    def load(self, adapter: Path, network: nn.Module) -> Any:
        """The adapter in a folder on a copy of a network."""
        return PeftModel.from_pretrained(copy.deepcopy(network), adapter).to(self.device).eval()

    def check(self, model: nn.Module, reloaded: nn.Module, seed: int) -> None:
        """Raise AdapterError unless both give the same logits on the validation images, bit for bit."""
        rows = self.rows("validation", seed)
        one, other = self.logits(model, rows), self.logits(reloaded, rows)
        if not torch.equal(one, other):
            differ = f"they differ by up to {(one - other).abs().max():.3g}. Report this, with the model {self.model!r}"
            raise AdapterError(f"the saved adapter does not give the logits of the trained network: {differ}")

    def tidy(self) -> None:
        """Remove checkpoints and the adapters of all runs: everything that only an unfinished experiment needs."""
        for name in ("checkpoints", "runs", _FEATURES):
            shutil.rmtree(self.folder / PRIVATE / name, ignore_errors=True)


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
