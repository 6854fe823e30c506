"""Progress on standard error: what commands and recipes show while runs go on."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..errors import SurgicalError, reason_of
from ..training.search import NONE
from ..training.trainer import Watch
from .requests import Request, Test, Train


class Bar(Watch):
    """A line for each finished run; below them, on a terminal, a bar over all epochs, and elsewhere a line for each."""

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
        self.work: dict[Request, float] = {}  # epochs of what is planned and not finished
        self.total = self.done = 0.0  # epochs
        self.begun_at = 0.0  # epochs that the run under way brought from a checkpoint
        self.known_runs: set[Request] = set()  # that this process has begun: a race comes back to them
        self.first = True  # of the processes that share the work

    def note(self, text: str) -> None:
        """Print a line, in the first process only."""
        if self.first:
            self.out.print(escape(text))

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
            self.out.print(escape(f"{request}: goes on after epoch {done:.0f} of {epochs}"))
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
        found = f"validation {100 * measured['validation']:.1f} %, loss {measured['loss']:.3g}"
        text = escape(f"{request}: epoch {done} of {epochs}, {found}")
        self.progress.update(self.task, description=text)
        if not self.out.is_terminal:
            self.out.print(text)

    def finished(self, request: Request, result: Mapping[str, Any], known: bool) -> None:
        """See `Watch`."""
        self.done += self.work.pop(request, 0.0)
        self.progress.update(self.task, completed=self.done, description="")
        if known and not self.first:
            return
        where = " (in the ledger)" if known else ""
        if isinstance(request, Test) and "test" in result:
            self.out.print(escape(f"{request} {100 * result['test']:.1f} %{where}"))
        elif isinstance(request, Train):
            part = "" if request.stop is None else f" after {request.stop:.0%} of the run"
            found = f"validation {100 * result['validation']:.1f} %, cost {result['cost']:.0f}"
            self.out.print(escape(f"{request}{part}: {found}{where}"))
        else:
            self.out.print(escape(f"{request}{where}"))

    def failed(self, row: str, error: Exception) -> None:
        """See `Watch`."""
        if not isinstance(error, SurgicalError):  # a fault, for which a line is not enough
            self.out.print(escape("".join(traceback.format_exception(error))))
        self.out.print(escape(f"{row}: failed: {reason_of(error)}"))


@contextlib.contextmanager
def watched() -> Iterator[Bar]:
    """Progress while the block runs, and after Ctrl-C what to do next."""
    bar = Bar()
    try:
        with bar.progress:
            yield bar
    except KeyboardInterrupt:
        bar.out.print("stopped; the same command goes on from here")
        raise
