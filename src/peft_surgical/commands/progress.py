"""Progress on a terminal: what commands and recipes show while runs go on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..training.search import Candidate
from ..watch import Watch


class Bar(Watch):
    """Progress on standard error: a line for each finished run, and below them a bar over all."""

    def __init__(self) -> None:
        self.out = Console(stderr=True, highlight=False, soft_wrap=True)
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self.progress = Progress(*columns, console=self.out, transient=True, disable=not self.out.is_terminal)
        self.task = self.progress.add_task("", total=0)
        self.runs = 0
        self.first = True  # of the processes that share the work

    def plan(self, text: str) -> None:
        """Show what is going to be done, before it begins."""
        if self.first:
            self.out.print(escape(text))

    def planned(self, runs: int) -> None:
        """See `Watch`."""
        self.runs += runs
        self.progress.update(self.task, total=self.runs)

    def epoch(self, key: Mapping[str, Any], done: float, epochs: int) -> None:
        """See `Watch`."""
        self.progress.update(self.task, description=f"{escape(_named(key))}: epoch {done:.0f} of {epochs}")

    def finished(self, key: Mapping[str, Any], result: Mapping[str, Any], known: bool) -> None:
        """See `Watch`."""
        self.progress.update(self.task, advance=1, description="")
        if known and not self.first:
            return
        where = " (in the ledger)" if known else ""
        if "test" in result:
            text = f"{_named(key)}: test {100 * result['test']:.1f} %{where}"
        elif "validation" in result:
            part = f" after {key['stop']:.0%} of the run" if "stop" in key else ""
            text = (
                f"{_named(key)}{part}: validation {100 * result['validation']:.1f} %, cost {result['cost']:.0f}{where}"
            )
        else:
            text = f"{_named(key)}{where}"
        self.out.print(escape(text))


def _named(key: Mapping[str, Any]) -> str:
    key = key.get("test_of", key)
    return f"seed {key['seed']}, {Candidate(key['method'], key['lr'])}"


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
