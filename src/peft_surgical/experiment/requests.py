"""What an experiment can be asked to do, each a value, and how the ledger writes it down.

A ledger's key is plain JSON, and keys that are committed must stay readable: this module alone knows their form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..training.search import Candidate

_SCORES = "scores "
_TEST_OF = "test_of"


@dataclass(frozen=True)
class Train:
    """Train a method or target, in full or up to a rung; the method ``none`` is only evaluated.

    Attributes:
        method: A row of `METHODS`, a target, or ``none``.
        lr: Learning rate; None for ``none``.
        seed: Of data and training.
        stop: Share of the run to stop after, in (0, 1); None trains it in full.
    """

    method: str
    lr: float | None
    seed: int
    stop: float | None = None

    def __str__(self) -> str:
        return f"seed {self.seed}, {Candidate(self.method, self.lr)}"

    def epochs(self, whole: int) -> int:
        """How many epochs of a run of ``whole`` epochs it takes."""
        return whole if self.stop is None else max(1, round(self.stop * whole))


@dataclass(frozen=True)
class Score:
    """Score the blocks of the base on tuning images.

    Attributes:
        criterion: ``rgn``, ...
        seed: Of the images and of the batches that are drawn.
    """

    criterion: str
    seed: int

    def __str__(self) -> str:
        return f"seed {self.seed}, scores by {self.criterion}"


@dataclass(frozen=True)
class Test:
    """Measure a run that was trained in full on the test images.

    Attributes:
        run: What was trained.
    """

    __test__ = False  # for pytest, which collects classes of this name

    run: Train

    def __str__(self) -> str:
        return f"{self.run}: test"


Request = Train | Score | Test


def key_of(request: Request, shared: Mapping[str, Any]) -> dict[str, Any]:
    """The key of a request in the ledger.

    Args:
        request: What is asked for.
        shared: What the keys of all runs of an experiment have in common.
    """
    if isinstance(request, Test):
        return {_TEST_OF: key_of(request.run, shared)}
    if isinstance(request, Score):
        return {**shared, "seed": request.seed, "method": f"{_SCORES}{request.criterion}", "lr": None}
    key = {**shared, "seed": request.seed, "method": request.method, "lr": request.lr}
    return key if request.stop is None else {**key, "stop": request.stop}


def request_of(key: Mapping[str, Any]) -> Request:
    """What a key of the ledger asks for."""
    if _TEST_OF in key:
        run = request_of(key[_TEST_OF])
        assert isinstance(run, Train)
        return Test(run)
    method, seed = key["method"], key["seed"]
    if method.startswith(_SCORES):
        return Score(method.removeprefix(_SCORES), seed)
    return Train(method, key["lr"], seed, key.get("stop"))
