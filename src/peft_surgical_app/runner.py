"""One run at a time, in a process of its own, which can be watched and stopped.

A process, because training that is stopped, or killed for want of memory, then takes nothing with it: its folder holds
what the same job goes on with.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft_surgical.errors import ConfigError

RUNNING, DONE, STOPPED, FAILED = "running", "done", "stopped", "failed"
_LINES = 400  # lines of progress that are kept
_GRACE = 20.0  # seconds in which a worker that is to stop ends by itself


@dataclass(frozen=True)
class RunStatus:
    """How far a job is.

    Attributes:
        kind: ``plan`` or ``tune``.
        state: ``running``, ``done``, ``stopped`` or ``failed``.
        plan: What it does, in lines; empty until data and network are read.
        lines: What has happened, the last at the end.
        now: What is being trained.
        done: Epochs that are over.
        total: Epochs that are known to be needed; a search finds out as it goes on.
        error: Why it failed.
    """

    kind: str
    state: str = RUNNING
    plan: str = ""
    lines: tuple[str, ...] = ()
    now: str = ""
    done: float = 0.0
    total: float = 0.0
    error: str = ""

    def after(self, event: Mapping[str, Any]) -> RunStatus:
        """With what an event of the `worker` says."""
        known = {name: event[name] for name in ("plan", "now", "done", "total") if name in event}
        if "line" in event:
            known["lines"] = (*self.lines, event["line"])[-_LINES:]
        if "ended" in event:
            known |= {"state": event["ended"], "now": ""}
        if "error" in event:
            known |= {"state": FAILED, "error": event["error"], "now": ""}
        return replace(self, **known)


class Runner:
    """Carries out jobs for visitors, one at a time.

    Args:
        minutes: How long a job may take before it is stopped; None for as long as it needs.
        command: What starts a process that speaks as the `worker` does.
    """

    def __init__(
        self, minutes: float | None = None, command: Sequence[str] = (sys.executable, "-m", "peft_surgical_app.worker")
    ) -> None:
        self.minutes = minutes
        self.command = command
        self._lock = threading.Lock()
        self._status: dict[str, RunStatus] = {}
        self._process: subprocess.Popen[str] | None = None
        self._owner = ""
        self._reader: threading.Thread | None = None
        self._stopping = False

    def start(self, owner: str, kind: str, arguments: Mapping[str, Any], log: Path) -> None:
        """Begin a job.

        Args:
            owner: Who may look at it and stop it.
            kind: ``plan`` or ``tune``.
            arguments: Those of `plan_tuning` or `tune`, in plain JSON.
            log: File for what libraries print.

        Raises:
            ConfigError: Another job is being done.
        """
        with self._lock:
            if self._process is not None:
                whose = "your last run has not ended" if owner == self._owner else "somebody else's run is going on"
                raise ConfigError(f"{whose}, and there is one at a time: wait until it has ended, and start again")
            with log.open("w", encoding="utf-8") as printed:
                process = subprocess.Popen(
                    list(self.command),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=printed,
                    text=True,
                    env={**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1"},
                    start_new_session=True,  # Ctrl-C in the terminal reaches the page, which then stops the run
                )
            self._process, self._owner, self._stopping = process, owner, False
            self._status[owner] = RunStatus(kind)
            self._reader = threading.Thread(target=self._follow, args=(process, owner, log), daemon=True)
            self._reader.start()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # it has ended, and reads no more
            process.stdin.write(f"{json.dumps({'kind': kind, 'arguments': dict(arguments)})}\n")
            process.stdin.flush()
        if self.minutes is not None:
            timer = threading.Timer(60 * self.minutes, self._end, args=(process, "the time for one run is over"))
            timer.daemon = True
            timer.start()

    def status(self, owner: str) -> RunStatus | None:
        """How far the owner's last job is; None if there was none."""
        with self._lock:
            return self._status.get(owner)

    def stop(self, owner: str) -> None:
        """Stop the owner's job; what it has done stays in its folder, and the same job goes on from there."""
        with self._lock:
            process = self._process if owner == self._owner else None
        if process is not None:
            self._end(process, "")

    def close(self) -> None:
        """Stop whatever is being done, and wait for it to end."""
        with self._lock:
            process, reader = self._process, self._reader
        if process is not None and reader is not None:
            self._end(process, "")
            reader.join(2 * _GRACE)

    def _end(self, process: subprocess.Popen[str], why: str) -> None:
        with self._lock:
            if process is not self._process or self._stopping:
                return
            self._stopping = True
            status = self._status[self._owner]
            lines = (*status.lines, f"warning: stopped, because {why}") if why else status.lines
            self._status[self._owner] = replace(status, lines=lines)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):
            process.stdin.close()

        def kill() -> None:
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                _kill(process)

        threading.Thread(target=kill, daemon=True).start()

    def _follow(self, process: subprocess.Popen[str], owner: str, log: Path) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            with self._lock:
                self._status[owner] = self._status[owner].after(event)
        code = process.wait()
        with self._lock:
            status = self._status[owner]
            if status.state == RUNNING:
                status = status.after({"ended": STOPPED} if self._stopping else {"error": _died(code, log)})
            self._status[owner], self._process = status, None
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError, ValueError):
                    stream.close()


def _kill(process: subprocess.Popen[str]) -> None:
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
    else:
        process.kill()


def _died(code: int, log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    said = f" Its last words: {lines[-1][:300]}" if lines else ""
    memory = " Memory may have run out: take a smaller network or batch size." if code in (-9, 137) else ""
    return f"the run ended unexpectedly, with exit code {code}.{memory} Started again, it goes on.{said}"
