"""What an experiment can be asked to do, each a value: how the ledger writes it down, and how progress shows it.

A ledger's key is plain JSON, and keys that are committed must stay readable: this module alone knows their form.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..errors import SurgicalError, reason_of
from ..texts import escaped
from ..training.progress import Watch
from ..training.search import HOW, NONE, USUAL, Candidate, Variant

_SCORES = "scores "
_TEST_OF = "test_of"


@dataclass(frozen=True)
class Train:
    """Train a method or target, in full or up to a rung; the method ``none`` is only evaluated.

    Attributes:
        method: A row of `METHODS`, a target, or ``none``.
        lr: Learning rate; None for ``none``.
        seed: Seed of data and training.
        stop: Share of the run to stop after, in (0, 1); None trains it in full.
        how: What a search decides beside method and rate.
    """

    method: str
    lr: float | None
    seed: int
    stop: float | None = None
    how: Variant = USUAL

    def __str__(self) -> str:
        return f"seed {self.seed}, {Candidate(self.method, self.lr, self.how)}"

    def epochs(self, whole: int) -> int:
        """How many epochs of a run of ``whole`` epochs it takes."""
        return whole if self.stop is None else max(1, round(self.stop * whole))


@dataclass(frozen=True)
class Score:
    """Score the blocks of the base by a criterion on tuning images; the seed draws the images and the batches."""

    criterion: str
    seed: int

    def __str__(self) -> str:
        return f"seed {self.seed}, scores by {self.criterion}"


@dataclass(frozen=True)
class Test:
    """Measure a run that was trained in full on the test images."""

    __test__ = False  # for pytest, which collects classes of this name

    run: Train

    def __str__(self) -> str:
        return f"{self.run}: test"


Request = Train | Score | Test


def key_of(request: Request, shared: Mapping[str, Any]) -> dict[str, Any]:
    """The key of a request in the ledger; ``shared`` is what the keys of all runs of an experiment have in common."""
    if isinstance(request, Test):
        return {_TEST_OF: key_of(request.run, shared)}
    if isinstance(request, Score):
        return {**shared, "seed": request.seed, "method": f"{_SCORES}{request.criterion}", "lr": None}
    key = {**shared, "seed": request.seed, "method": request.method, "lr": request.lr}
    if request.how != USUAL:
        key[HOW] = request.how.record()
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
    return Train(method, key["lr"], seed, key.get("stop"), Variant(**key.get(HOW, {})))


class Bar(Watch):
    """Progress on standard error: a line for each finished run, and the epochs of the run that is being trained.

    On a terminal these are a bar over all epochs below the lines, and elsewhere a line for each.
    """

    def __init__(self) -> None:
        self.out = Console(stderr=True, highlight=False, soft_wrap=True)
        columns = (
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} epochs"),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self.progress = Progress(*columns, console=self.out, transient=True, disable=not self.out.is_terminal)
        self.task = self.progress.add_task("", total=0)
        self.work: dict[Request, float] = {}  # request -> its epochs, of what is planned and not finished
        self.total = self.done = 0.0  # epochs
        self.begun_at = 0.0  # epochs of the current run that were trained before its checkpoint
        self.known_runs: set[Request] = set()  # begun in this process: a race comes back to them
        self.prefixes: set[str] = set()  # methods for which it was said what of the network is computed once

    def note(self, text: str) -> None:
        """See `Watch`."""
        if self.first:
            self._print(text)

    def _print(self, text: str) -> None:
        self.out.print(escape(escaped(text, keep="\n")))

    def planned(self, requests: Sequence[Request], epochs: int) -> None:
        """See `Watch`."""
        for request in requests:
            trains = isinstance(request, Train) and request.method != NONE
            self.work[request] = request.epochs(epochs) if isinstance(request, Train) and trains else 0
            self.total += self.work[request]
        self.progress.update(self.task, total=self.total)

    def begun(self, request: Request, done: float, epochs: int) -> None:
        """See `Watch`."""
        whole = replace(request, stop=None) if isinstance(request, Train) else request
        if 0 < done < epochs and whole not in self.known_runs:
            self._print(f"{request}: goes on after epoch {done:.0f} of {epochs}")
        self.known_runs.add(whole)
        left = max(0.0, self.work.get(request, 0.0) - done)
        self.total -= self.work.get(request, 0.0) - left
        self.work[request], self.begun_at = left, done
        self.progress.update(self.task, total=self.total, description=escape(str(request)))

    def step(self, request: Request, done: float, epochs: int) -> None:
        """See `Watch`."""
        self.progress.update(self.task, completed=self.done + done - self.begun_at)

    def epoch(self, request: Request, done: int, epochs: int, measured: Mapping[str, float]) -> None:
        """See `Watch`."""
        found = f", validation {100 * measured['validation']:.1f} %, loss {measured['loss']:.3g}"
        # What trains on the validation images as well says nothing by them.
        text = f"{request}: epoch {done} of {epochs}{'' if _is_refit(request) else found}"
        self.progress.update(self.task, description=escape(text))
        if not self.out.is_terminal:
            self._print(text)

    def finished(self, request: Request, result: Mapping[str, Any], known: bool) -> None:
        """See `Watch`."""
        self.done += self.work.pop(request, 0.0)
        self.progress.update(self.task, completed=self.done, description="")
        if known and not self.first:
            return
        text = str(request)
        if isinstance(request, Test) and "test" in result:
            text += f" {100 * result['test']:.1f} %"
        elif isinstance(request, Train):
            part = "" if request.stop is None else f" after {request.stop:.0%} of the run"
            found = "done" if _is_refit(request) else f"validation {100 * result['validation']:.1f} %"
            text += f"{part}: {found}, cost {result['cost']:.0f}"
            if result.get("out_of_memory"):
                text = f"{request}: needs more memory than there is, and is left out: a smaller batch_size needs less"
        self._print(f"{text}{' (in the ledger)' if known else ''}")
        line = result.get("prefix")
        if isinstance(request, Train) and line and not known and request.method not in self.prefixes:
            self.prefixes.add(request.method)
            self._print(f"{request.method}: {line}")

    def failed(self, row: str, error: Exception) -> None:
        """See `Watch`."""
        if not isinstance(error, SurgicalError):  # an unexpected error, for which a line is not enough
            self._print("".join(traceback.format_exception(error)))
        self._print(f"{row}: failed: {reason_of(error)}")


def _is_refit(request: Request) -> bool:
    return isinstance(request, Train) and request.how.refit


@contextlib.contextmanager
def watched(watch: Watch | None = None) -> Iterator[Watch]:
    """The watch; by default a `Bar` while the block runs, which after Ctrl-C says what to do next."""
    if watch is not None:
        yield watch
        return
    bar = Bar()
    try:
        with bar.progress:
            yield bar
    except KeyboardInterrupt:
        bar.out.print("stopped; the same command goes on from here")
        raise
