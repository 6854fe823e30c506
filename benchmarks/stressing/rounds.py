"""The rounds of `benchmarks/stress.py`: each from its number, in a folder of its own."""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from peft_surgical.errors import AdapterError, SurgicalError
from peft_surgical.experiment.api import compare, tune
from peft_surgical.keys import CONFIG, SCRATCH, WEIGHTS
from peft_surgical.training.ledger import Ledger
from peft_surgical_cli.stored import adapters_in

from .soak import resident, slope
from .things import (
    CLASSES,
    CONTEXT,
    Network,
    adapted,
    all_of,
    base,
    code_of,
    loaded,
    logits,
    started,
    transform,
    wait_until,
    which,
    write_images,
)

Found = dict[str, Any]
"""``counts`` and ``findings`` of a round."""
HOW: dict[str, Any] = {"transform": transform, "label_names": CLASSES, "epochs": 3, "batch_size": 4, "lr": 1e-2}
HOW |= {"cpu": True, "test": 6, "validation": 6, "cache": False}


# --- one folder ---


def _save_forever(folder: Path, models: list[Any], saved: Any) -> None:
    while True:
        for model in models:
            model.save_pretrained(folder)
            saved.value += 1


def saves(seed: int, place: Path, kills: int = 10) -> Found:
    """A save that is killed at any moment leaves the old adapter or the new one, and the next save tidies up."""
    rng, folder, findings, counts = random.Random(seed), place / "adapter", [], Counter[str]()
    models = [adapted(number) for number in (0, 1)]
    expected = [logits(model) for model in models]
    models[0].save_pretrained(folder)
    saved = CONTEXT.Value("l", 0, lock=False)  # a killed process would keep the lock
    for _ in range(kills):
        process = started(_save_forever, folder, models, saved)
        with all_of([process]):
            begun = saved.value
            wait_until(lambda begun=begun: saved.value > begun)
            time.sleep(rng.uniform(0, 0.3))
            process.kill()
        counts["kills"] += 1
        counts["of these with unfinished files"] += any(folder.glob(f"{SCRATCH}*"))
        number = which(loaded(folder), expected)
        if number is None:
            findings.append("neither the old adapter nor the new one")
        if (listed := [one.folder for one in adapters_in([place])]) != [str(folder)]:
            findings.append(f"listed: {listed}")
    models[1].save_pretrained(folder)
    if left := sorted({path.name for path in folder.iterdir()} - {CONFIG, WEIGHTS, "README.md"}):
        findings.append(f"left behind: {left}")
    return {"counts": counts | Counter({"saves": saved.value}), "findings": findings}


def _write(folder: Path, number: int, written: Any, end: float) -> None:
    model, rng = adapted(number), random.Random(number)
    while time.monotonic() < end:
        model.save_pretrained(folder)
        with written.get_lock():
            written.value += 1
        time.sleep(rng.uniform(0, 1))  # or else nobody ever reads what is there


def _read(folder: Path, read: Any, again: Any, end: float, expected: list[torch.Tensor]) -> None:
    while time.monotonic() < end:
        try:
            found = loaded(folder)
        except AdapterError as error:
            if "load it again" not in str(error):
                raise
            with again.get_lock():
                again.value += 1
            continue
        assert which(found, expected) is not None, "no adapter's logits"
        with read.get_lock():
            read.value += 1


def folder(seed: int, place: Path, seconds: float = 10.0) -> Found:
    """Of processes that write into one folder each save is whole, and who reads meanwhile gets one adapter, whole."""
    goal = place / "adapter"
    expected = [logits(adapted(number)) for number in range(3)]
    adapted(seed % 3).save_pretrained(goal)
    written, read, again = (CONTEXT.Value("l", 0) for _ in range(3))
    end = time.monotonic() + seconds
    processes = [started(_write, goal, number, written, end) for number in range(3)]
    processes += [started(_read, goal, read, again, end, expected) for _ in range(2)]
    with all_of(processes):
        codes = [code_of(process) for process in processes]
    findings = [f"process {i} ended with {code}" for i, code in enumerate(codes) if code != 0]
    if which(loaded(goal), expected) is None:
        findings.append("in the end no adapter's logits")
    counts = {"saves by 3 processes": written.value, "loads by 2": read.value, "asked to load again": again.value}
    return {"counts": counts, "findings": findings}


# --- ledgers ---


def _append(file: Path, writer: int, count: int, done: Any) -> None:
    ledger = Ledger(file)
    for number in range(count):
        ledger.append({"writer": writer, "number": number}, {"validation": number / count, "text": "x" * 200})
        done[writer] = number + 1


def _follow(file: Path, over: Any) -> None:
    seen = 0
    while not over.value:
        runs = len(Ledger(file))
        assert runs >= seen, f"{runs} runs after {seen}"
        seen = runs


def ledger(seed: int, place: Path, writers: int = 4, count: int = 100) -> Found:
    """Every run that a process was told is on disk is in the ledger, whoever else writes there or is killed."""
    rng, file = random.Random(seed), place / "ledger.jsonl"
    # Without locks: a killed process would keep them.
    done, over = CONTEXT.Array("l", writers, lock=False), CONTEXT.Value("b", 0, lock=False)
    processes = [started(_append, file, writer, count, done) for writer in range(writers)]
    reader = started(_follow, file, over)
    findings: list[str] = []
    with all_of([*processes, reader]):
        time.sleep(rng.uniform(0, 0.5))
        processes[0].kill()
        codes = [code_of(process) for process in processes[1:]]
        over.value = 1
        if any(codes) or code_of(reader) != 0:
            findings.append(f"writers ended with {codes}, the reader with {reader.exitcode}")
    with Path(file).open("ab") as torn:  # as a kill in the middle of a write leaves it
        torn.write(b'{"key": {"wri')
    Ledger(file).append({"writer": -1, "number": 0}, {"validation": 0.0})
    for writer in range(writers):
        held = {run.key["number"] for run in Ledger(file).runs(writer=writer)}
        if lost := {*range(done[writer])} - held:
            findings.append(f"writer {writer} lost {sorted(lost)[:5]}")
    return {"counts": {"runs appended": sum(done) + 1, "killed writers": 1}, "findings": findings}


# --- experiments ---


def _tune(place: Path, output: Path, **more: Any) -> None:
    tune(base(), place / "images", "cross-val", output=output, **{**HOW, **more})


def _compare(place: Path, output: Path, **more: Any) -> None:
    compare(base(), place / "images", ["none", "block1", "race"], seeds=(0, 1), output=output, **{**HOW, **more})


def _results(output: Path) -> dict[str, Any]:
    """What must be the same, however often a run was killed: all but times."""
    runs = ([run.key, run.result] for run in Ledger(output / "ledger.jsonl"))
    found: dict[str, Any] = {"ledger": sorted(json.dumps(run, sort_keys=True) for run in runs)}
    found |= {name: (output / name).read_bytes() for name in (CONFIG, WEIGHTS) if (output / name).is_file()}
    if (table := output / "table.md").is_file():
        lines = table.read_text(encoding="utf-8").splitlines()
        rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
        kept = [column for column, name in enumerate(rows[0]) if name not in ("seconds", "saved")]
        found["table"] = [[row[column] for column in kept] for row in rows]
    return found


def _killed(seed: int, place: Path, work: Callable[..., None], kills: int) -> Found:
    rng, findings, counts = random.Random(seed), [], Counter[str]()
    write_images(place / "images")
    start = time.monotonic()
    if code_of(started(work, place, place / "whole")) != 0:
        return {"counts": counts, "findings": ["the run that nobody kills ends in an error or hangs"]}
    length = time.monotonic() - start
    for _ in range(kills):
        process = started(work, place, place / "killed")
        with all_of([process]):
            process.join(rng.uniform(0.0, length))
            if process.exitcode is not None:
                break
            process.kill()
        counts["kills"] += 1
        listed = adapters_in([place / "killed"])
        if any(SCRATCH in str(one.folder) for one in listed):
            findings.append(f"listed: {[str(one.folder) for one in listed]}")
    if (code := code_of(started(work, place, place / "killed"))) != 0:
        findings.append(f"started again it ends with {code}")
    elif _results(place / "killed") != _results(place / "whole"):
        findings.append("other results than of the run that nobody killed")
    counts["finished with the same bytes"] += not findings
    return {"counts": counts, "findings": findings}


def compares(seed: int, place: Path, kills: int = 5) -> Found:
    """`compare` that is killed at any moment and started again ends with the same table and the same runs."""
    return _killed(seed, place, _compare, kills)


def tunes(seed: int, place: Path, kills: int = 5) -> Found:
    """`tune` that is killed at any moment and started again ends with the same adapter, byte for byte."""
    return _killed(seed, place, _tune, kills)


class Hungry(Network):
    """What is tuned in front of ``conv1`` keeps more activations for the backward pass than there is memory for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (n, classes)."""
        x = self.conv1(x)
        if x.requires_grad:
            x = torch.stack([x] * (1 + (2**33 // (4 * x.numel()))))[0]  # 8 GiB
        return self.fc(self.layer2(self.layer1(self.bn1(x))).mean((2, 3)))


def _hungry(place: Path, output: Path) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, resource.RLIM_INFINITY))
    torch.manual_seed(0)
    compare(Hungry().eval(), place / "images", ["none", "block1", "head", "race"], seeds=(0,), output=output, **HOW)


def memory(seed: int, place: Path) -> Found:
    """A cell of a comparison that needs more memory than there is gets a line; the others, and searches, go on."""
    write_images(place / "images")
    code = code_of(started(_hungry, place, place / "results"))
    if code != 0:
        return {"counts": {"comparisons": 1}, "findings": [f"ended with {code}"]}
    runs = [run for run in Ledger(place / "results" / "ledger.jsonl") if run.result.get("out_of_memory")]
    text = (place / "results" / "table.md").read_text(encoding="utf-8")
    findings = [] if runs else ["no run is recorded as too large"]
    if not all(f"| {name} |" in text for name in ("none", "head", "race")):
        findings.append("a row that fits is missing")
    if "Missing, since they failed: block1" not in text or "| block1 |" in text:
        findings.append("the row that does not fit is not named")
    return {"counts": {"comparisons": 1, "cells out of memory": len(runs)}, "findings": findings}


def workers(seed: int, place: Path) -> Found:
    """A run whose process for images is killed ends in an error, and started again in the bytes of a whole one."""
    rng, findings, counts = random.Random(seed), [], Counter[str]()
    write_images(place / "images")
    how = {"workers": 1}
    if code_of(started(_tune_with, place, place / "whole", how)) != 0:
        return {"counts": counts, "findings": ["the run of which no process is killed ends in an error or hangs"]}
    process = started(_tune_with, place, place / "killed", how)
    with all_of([process]):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        time.sleep(rng.uniform(0, 2))
        wait_until(lambda: process.exitcode is not None or bool(children.is_file() and children.read_text().split()))
        if process.exitcode is None:
            for child in children.read_text().split():
                os.kill(int(child), signal.SIGKILL)
                counts["killed processes"] += 1
        code = code_of(process)
    if code is None:
        findings.append("it hangs")
    counts["runs that ended in an error"] += code not in (0, None)
    if (code := code_of(started(_tune_with, place, place / "killed", how))) != 0:
        findings.append(f"started again it ends with {code}")
    elif _results(place / "killed") != _results(place / "whole"):
        findings.append("other results than of a whole run")
    return {"counts": counts, "findings": findings}


def _tune_with(place: Path, output: Path, how: dict[str, Any]) -> None:
    _tune(place, output, **how)


# --- a full disk ---

IN_WORDS = 3  # exit code


def _save_small(place: Path, model: Any, size: int) -> None:
    _within(size, lambda: model.save_pretrained(place / "adapter"))


def _append_small(place: Path, size: int) -> None:
    _within(size, lambda: Ledger(place / "ledger.jsonl").append({"lr": 2}, {"validation": 0.5}))


def _tune_small(place: Path, size: int) -> None:
    _within(size, lambda: _tune(place, place / "results", cache=True))


def _within(size: int, work: Callable[[], None]) -> None:
    """No file may become larger than ``size``: its writer sees an error like that of a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        work()
    except (SurgicalError, OSError) as error:
        os._exit(IN_WORDS if str(error) else 1)


def disk(seed: int, place: Path, saves: int = 10) -> Found:
    """On a full disk there is an error in words, the old adapter and the ledger stay, and nothing hangs."""
    rng, goal, findings, counts = random.Random(seed), place / "adapter", [], Counter[str]()
    old, new = adapted(0), adapted(2)
    expected = [logits(old), logits(new)]
    new.save_pretrained(place / "size")
    largest = (place / "size" / WEIGHTS).stat().st_size
    ledger = Ledger(place / "ledger.jsonl")
    ledger.append({"lr": 1}, {"validation": 0.5})
    whole = ledger.file.stat().st_size

    def ended(process: Any, what: str) -> None:
        code = code_of(process)
        counts[f"{what} on a full disk"] += code == IN_WORDS
        counts[f"{what} that fit"] += code == 0
        if code not in (0, IN_WORDS):
            findings.append(f"{what} ended with {code}")

    for _ in range(saves):
        old.save_pretrained(goal)
        process = started(_save_small, place, new, rng.randrange(largest + 200))
        ended(process, "saves")
        number = which(loaded(goal), expected)
        if number is None or number != (process.exitcode == 0):
            findings.append(f"exit code {process.exitcode}, and the adapter is {number}")
        if left := [path.name for path in goal.glob(f"{SCRATCH}*")]:
            findings.append(f"left behind: {left}")
    for _ in range(saves):
        ended(started(_append_small, place, whole + rng.randrange(60)), "runs")
        if not Ledger(ledger.file).find({"lr": 1}):
            findings.append("the ledger lost a run")
    write_images(place / "images")
    ended(started(_tune_small, place, rng.randrange(20_000)), "tunes")
    if (code := code_of(started(_tune, place, place / "results"))) != 0:
        findings.append(f"with room again tune ends with {code}")
    return {"counts": counts, "findings": findings}


# --- long ---


def soak(seed: int, place: Path, operations: int = 10_000, allowed: float = 500.0) -> Found:
    """Adapters that are loaded, switched and unloaded, over and over, leave no memory behind."""
    for number in range(3):
        adapted(number).save_pretrained(place / str(number))
    expected, points, done = [logits(adapted(number)) for number in range(3)], [], 0
    model = PeftModel.from_pretrained(base(), place / "0", adapter_name="kept").eval()
    network, wrong = copy.deepcopy(base()), 0
    while done < operations:
        if done // 6 % 20 == 0:
            points.append([done, resident()])
        number = (seed + done // 6) % 3
        model.load_adapter(place / str(number), "guest")
        model.set_adapter("guest")
        wrong += not torch.equal(logits(model), expected[number])
        model.set_adapter("kept")
        model.delete_adapter("guest")
        other = PeftModel.from_pretrained(network, place / str(number)).eval()
        wrong += not torch.equal(logits(other), expected[number])
        network = other.unload()
        done += 6
    findings = [f"other logits after {wrong} of the loads"] if wrong else []
    if len(points) >= 50 and slope(points) > allowed:
        findings.append(f"memory grows by {slope(points):.0f} bytes with each operation")
    return {"counts": {"loads, switches and unloads": done}, "findings": findings, "memory": points}


ROUNDS: dict[str, Callable[..., Found]] = {
    work.__name__: work for work in (saves, folder, ledger, compares, tunes, memory, workers, disk, soak)
}
