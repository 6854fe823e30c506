"""Memory over time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def slope(memory: Sequence[Sequence[float]]) -> float:
    """Bytes per operation, by least squares over (operations, bytes) without the first fifth, which fills caches."""
    points = memory[len(memory) // 5 :]
    x = [float(point[0]) for point in points]
    y = [float(point[1]) for point in points]
    middle, height = sum(x) / len(x), sum(y) / len(y)
    spread = sum((one - middle) ** 2 for one in x)
    return sum((a - middle) * (b - height) for a, b in zip(x, y, strict=True)) / spread if spread else 0.0


def growth(memory: Sequence[Sequence[float]]) -> str:
    """The slope in words."""
    kept = memory[len(memory) // 5 :]
    return (
        f"resident memory {kept[0][1] / 2**20:.0f} MiB after {kept[0][0]:,.0f} and {kept[-1][1] / 2**20:.0f} MiB after "
        f"{kept[-1][0]:,.0f}, {slope(memory):+.0f} bytes for each"
    )
