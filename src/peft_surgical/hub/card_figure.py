"""The figure of a card: accuracy of what was tuned and of what could have been, and how far each part moved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..extras import require
from .card_text import Row
from .cards import Weights


def draw_figure(rows: Sequence[Row], weights: Weights, moved: Sequence[tuple[str, float]], file: Path) -> None:
    """Draw the first data set's rows, and beside them what moved.

    Args:
        rows: Of the card's table.
        weights: The adapter's file: L2 norms of its deltas, by part.
        moved: Block and its relative change, which is drawn where it is known; else the deltas of each part, and of
            one part alone those of its tensors.
        file: A .png file to write.

    Raises:
        DataError: matplotlib is not installed.
    """
    figures = require("matplotlib.figure", "drawing a figure", "plots")
    # Test images first: what was chosen with flatters.
    shown = next((row for row in rows if row.own and row.is_test), rows[0])
    accuracies = [row for row in rows if (row.metric, row.dataset) == (shown.metric, shown.dataset)]
    several = [(name, norm) for name, _, norm in weights.parts] if len(weights.parts) > 1 else None
    parts = list(moved) or several or list(weights.largest)
    height = 1.5 + 0.3 * max(len(accuracies), len(parts), 3)
    figure = figures.Figure(figsize=(10, height), layout="constrained")
    left, right = figure.subplots(1, 2)
    values = [100 * row.measured.value for row in accuracies]
    left.barh(range(len(values)), values, color=["C1" if row.own else "C0" for row in accuracies])
    ends = [[100 * (row.measured.value - row.measured.low) for row in accuracies]]
    ends.append([100 * (row.measured.high - row.measured.value) for row in accuracies])
    left.errorbar(values, range(len(values)), xerr=ends, fmt="none", color="black", capsize=2)
    left.set_yticks(range(len(values)), [row.tuned for row in accuracies])
    left.set_xlabel(f"{shown.metric.replace('_', ' ')} (%), 95 % interval")
    left.set_title(shown.dataset)
    right.barh(range(len(parts)), [value for _, value in parts], color="C2")
    right.set_yticks(range(len(parts)), [name for name, _ in parts])
    right.set_xlabel("L2 norm of the change / of the block" if moved else "L2 norm of the deltas")
    right.set_title("what moved")
    for axes in (left, right):
        axes.invert_yaxis()
    figure.savefig(file, dpi=120)
