"""Optional libraries, accelerators (CUDA, ROCm, XPU, MPS, ...), and the ranges of arguments."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .errors import ConfigError, DataError

LARGEST_SEED = 2**32 - 1
"""The largest seed that NumPy, and so Trainer, takes."""


def require(module: str, purpose: str, extra: str = "recipes") -> Any:
    """Import an optional library where it is used: importing the package must work without it.

    Args:
        module: Its full name, such as ``"timm.data"``.
        purpose: What needs it, the beginning of the message: ``"reading images"``.
        extra: The extra of this package that brings it.

    Raises:
        DataError: If it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f'{purpose} needs {module}: pip install "peft-surgical[{extra}]"') from error


def accelerator_or_cpu(cpu: bool = False) -> torch.device:
    """Where to compute: the accelerator that PyTorch finds, or the CPU where there is none or ``cpu`` asks for it."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() and not cpu else None
    return found or torch.device("cpu")


def check_range(name: str, value: Any, low: float, high: float) -> None:
    """Raise `ConfigError` unless an argument is a number from ``low`` to ``high``, both included; NaN is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ConfigError(f"{name}={value!r}: give a number from {low:g} to {high:g}")


@contextmanager
def generators_kept() -> Iterator[None]:
    """Random numbers may be drawn within it; afterwards PyTorch's generators, also those of devices, are as before."""
    kind = accelerator_or_cpu().type
    used: range | list[int] = []
    if kind != "cpu":
        # A device that nothing has used yet has no generator, and asking for its state would start the device.
        started = getattr(torch.get_device_module(kind), "is_initialized", lambda: True)()
        used = range(torch.accelerator.device_count()) if started else []
    with torch.random.fork_rng(devices=used, device_type="cuda" if kind == "cpu" else kind):
        yield
