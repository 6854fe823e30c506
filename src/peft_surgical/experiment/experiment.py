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
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..choosing.scores import BlockScores
from ..config import SurgicalConfig
from ..data.labelled import collate
from ..errors import AdapterError, ConfigError
from ..evaluation import predict_logits
from ..evaluation.metrics import check_metrics, judge
from ..extras import accelerator_or_cpu
from ..fingerprints import fingerprint
from ..keys import PRIVATE
from ..prefix.storage import FeatureStore
from ..training.auto import AutoSettings
from ..training.engines import Engine, Workers
from ..training.fitting import FitSettings
from ..training.ledger import Ledger, Run
from ..training.progress import Watch
from ..training.search import HOW
from .requests import Score, Test, Train, key_of, request_of
from .running import score_run, test_run, train_run
from .subject import Subject

_FEATURES = "features"  # folder for what is computed once for each image


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
            return test_run(self, request.run)
        if isinstance(request, Score):
            return {"scores": score_run(self, request)}
        return train_run(self, request)

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

    def checkpoints(self, key: Mapping[str, Any]) -> Path:
        """Where a run leaves its checkpoints until it is finished."""
        return self.folder / PRIVATE / "checkpoints" / self.digest(key)

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
