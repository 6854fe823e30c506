"""The accelerators of this machine, by whatever name PyTorch has for them: CUDA, ROCm, XPU, MPS, ..."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def accelerator_or_cpu(cpu: bool = False) -> torch.device:
    """Where to compute: the accelerator that PyTorch finds, or the CPU where there is none or ``cpu`` asks for it."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() and not cpu else None
    return found or torch.device("cpu")


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
