"""The process that carries out one run: ``python -m peft_surgical_app.worker``.

It reads one line of JSON on standard input, what to do, and then waits for the end of that stream, which means to stop:
also when the process that started it is gone. It writes one line of JSON on standard output for each event. Whatever
libraries print goes to standard error.
"""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from peft_surgical.errors import SurgicalError
from peft_surgical.experiment.api import plan_tuning, tune
from peft_surgical.experiment.requests import Bar, Request

_EVERY = 0.3  # seconds between two events of training steps

Tell = Callable[..., None]


class Events(Bar):
    """Progress as events: ``plan``, ``line``, and how many of how many epochs are over (``done``, ``total``)."""

    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self.tell = tell
        self.last_step = 0.0

    def note(self, text: str) -> None:
        """See `Watch`."""
        self.tell(plan=text)

    def _print(self, text: str) -> None:
        self.tell(line=text)

    def planned(self, requests: Sequence[Request], epochs: int) -> None:
        """See `Watch`."""
        super().planned(requests, epochs)
        self.tell(done=self.done, total=self.total)

    def step(self, request: Request, done: float, epochs: int) -> None:
        """See `Watch`."""
        super().step(request, done, epochs)
        if time.monotonic() - self.last_step > _EVERY:
            self.last_step = time.monotonic()
            self.tell(done=self.done + done - self.begun_at, total=self.total, now=str(request))

    def finished(self, request: Request, result: Mapping[str, Any], known: bool) -> None:
        """See `Watch`."""
        super().finished(request, result, known)
        self.tell(done=self.done, total=self.total)


def carry_out(job: Mapping[str, Any], tell: Tell) -> None:
    """Do what a job asks for, and tell how it ends: ``plan`` and ``ended``, or ``error``.

    Args:
        job: ``kind``, which is ``plan`` or ``tune``; and ``arguments``, those of `plan_tuning` or `tune`.
        tell: Takes the parts of an event by name.
    """
    try:
        with _warnings_as_events(tell):
            if job["kind"] == "plan":
                tell(plan=plan_tuning(**job["arguments"]))
            else:
                tune(**job["arguments"], watch=Events(tell))
        tell(ended="done")
    except KeyboardInterrupt:
        tell(ended="stopped")
    except SurgicalError as error:
        tell(error=str(error))
    except OSError as error:
        if error.errno is None:
            raise
        tell(error=f"{error.filename or 'a file'}: {error.strerror}")


@contextlib.contextmanager
def _warnings_as_events(tell: Tell) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *place, **more: tell(line=f"warning: {message}")
        yield


def _stop_at_end(stream: TextIO) -> None:
    stream.read()
    _thread.interrupt_main()


def work() -> None:
    """Read a job, carry it out, and write its events."""
    import transformers

    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no event
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the page was started to ignore it

    def tell(**event: Any) -> None:
        out.write(f"{json.dumps(event)}\n")
        out.flush()

    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_stop_at_end, args=(sys.stdin,), daemon=True).start()
    code = 0
    try:
        carry_out(job, tell)
    except BrokenPipeError:  # nobody listens any more
        pass
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        code = 1
    os._exit(code)  # the interpreter's own ending may wait for the thread, and write behind the traceback


if __name__ == "__main__":
    work()
