"""What becomes of one mutation: refused clearly, loaded as what it says, or a finding."""

from __future__ import annotations

import copy
import signal
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_surgical import SurgicalConfig
from peft_surgical.adapters.adapter import read_adapter
from peft_surgical.errors import SurgicalError

from .bases import BLOCKS, make_base, make_sources
from .files import Files
from .honest import honest, read_through, same
from .mutations import mutated

LIBRARY_ERRORS: tuple[tuple[type[Exception], str], ...] = (
    (ValueError, "Can't find 'adapter_config.json' at"),
    # The config says LORA, and PEFT takes it at its word.
    (ValueError, "Please specify `target_modules` or `target_parameters`"),
    (ValueError, "Cannot combine adapters with different peft types"),
)


@dataclass
class Outcome:
    """What became of a mutation: ``loaded``, ``refused``, or ``finding``, with the words for the last."""

    seed: int
    mutation: str
    kind: str
    result: str
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Before:
    """What must not change when an adapter is refused."""

    state: dict[str, Tensor]
    classes: list[type]
    flags: list[tuple[bool, bool]]
    adapters: tuple[str, ...]

    @classmethod
    def of(cls, network: nn.Module) -> Before:
        """As it is now."""
        return cls(
            {name: value.detach().clone() for name, value in network.state_dict().items()},
            [type(module) for module in network.modules()],
            [(p.requires_grad, p.is_meta) for p in network.parameters()],
            tuple(getattr(network, "peft_config", ())),
        )

    def differs(self, network: nn.Module) -> str:
        """What of it is another now; empty for nothing."""
        now = Before.of(network)
        if not same(self.state, now.state):
            return "the state dict"
        for name in ("classes", "flags", "adapters"):
            if getattr(self, name) != getattr(now, name):
                return f"the {name}"
        return ""


class TooSlow(BaseException):
    """More than the limit has passed; not an Exception, so that nothing on the way takes it for one."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    def stop(signum: int, frame: Any) -> None:
        raise TooSlow

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def is_clear(error: BaseException) -> bool:
    """Whether an error is of this package, or one of those that a library raises clearly."""
    if isinstance(error, SurgicalError):
        return bool(str(error).strip())
    if _asks_for_the_type(error):
        return True  # PEFT's own words
    return any(isinstance(error, kind) and words in str(error) for kind, words in LIBRARY_ERRORS)


def _asks_for_the_type(error: BaseException) -> bool:
    """Whether PEFT raised it while it looked up the method of an adapter, before it asked this package anything."""
    frames = traceback.extract_tb(error.__traceback__)
    lookup = frames[-1].filename.endswith("peft_model.py") and isinstance(error, (KeyError, TypeError))
    return lookup or any(frame.name == "_get_peft_type" for frame in frames)


class Bench:
    """A base, whole adapters to mutate, and a folder."""

    def __init__(self, folder: Path, limit: float = 1.0) -> None:
        self.base, self.folder, self.limit = make_base(), folder, limit
        self.sources = make_sources(self.base)
        self.values = {name: value.detach().clone() for name, value in self.base.state_dict().items()}
        self.network = copy.deepcopy(self.base)

    def run(self, seed: int) -> Outcome:
        """Write, load, read, and compare the mutation of this number."""
        name, kind, files = mutated(seed, self.sources)
        files.write(self.folder)
        outcome = Outcome(seed, name, kind, "refused")
        start = time.process_time()  # of this process: others may hold the machine for longer than the limit
        try:
            # On the clock, which also stops what waits for ever.
            with limited(10 * self.limit), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcome.result, outcome.detail = self._load(files, beside=seed % 3 == 0)
                if outcome.result != "finding" and (trouble := self._read()):
                    outcome.result, outcome.detail = "finding", trouble
        except TooSlow:
            outcome.result, outcome.detail = "finding", "too slow: stopped"
        outcome.seconds = time.process_time() - start
        if outcome.seconds > self.limit and outcome.result != "finding":
            outcome.result, outcome.detail = "finding", f"too slow: {outcome.seconds:.1f} s"
        if outcome.result == "finding":
            self.network = copy.deepcopy(self.base)
        return outcome

    def _load(self, files: Files, beside: bool) -> tuple[str, str]:
        network = self.network
        model = None
        if beside:
            model = get_peft_model(network, SurgicalConfig(target="block1", blocks=BLOCKS), adapter_name="first")
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.fill_(0.25)
            model.eval()
        before = Before.of(network)
        try:
            if model is None:
                model = PeftModel.from_pretrained(network, self.folder)
            else:
                model.load_adapter(self.folder, "default")
        except Exception as error:
            if not is_clear(error):
                return "finding", f"not clear: {last_frames(error)}"
            if trouble := before.differs(network):
                return "finding", f"{trouble} changed though it was refused: {type(error).__name__}: {error}"[:500]
            if model is not None:
                self.network = model.unload()
            return "refused", type(error).__name__
        if beside:
            model.set_adapter("default", inference_mode=True)
        expected = honest(files, self.values)
        found = read_through(network, list(self.values))
        self.network = model.unload()
        wrong = [name for name in expected if not same({"": expected[name]}, {"": found[name]})]
        if wrong:
            return "finding", f"loaded as something else than the files say: {wrong[0]}"
        if any("surgery" in name for name in self.network.state_dict()):
            return "finding", "unloading left something behind"
        if not same(dict(self.network.state_dict()), self.values):
            self.network = copy.deepcopy(self.base)  # a whole module stays when PEFT unloads
        return "loaded", ""

    def _read(self) -> str:
        try:
            read_adapter(self.folder)
        except Exception as error:
            return "" if is_clear(error) else f"read_adapter, not clear: {last_frames(error)}"
        return ""


def last_frames(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    return f"{type(error).__name__}: {str(error)[:200]} ({places})"
