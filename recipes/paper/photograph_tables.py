"""The tables of ``recipes/photographs.py``, drawn from rows alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from peft_surgical.evaluation import TextTable, plus_minus
from peft_surgical.training.ledger import Run
from peft_surgical.training.search import NONE

from .rows import reported

TASKS = {
    "sketch": ("pacs/photo", "pacs/sketch"),
    "webcam": ("office_caltech/amazon", "office_caltech/webcam"),
    "cellavision": ("blood_cells/tecom", "blood_cells/cellavision"),
    "photo": ("pacs/sketch", "pacs/photo"),
    "amazon": ("office_caltech/webcam", "office_caltech/amazon"),
    "tecom": ("blood_cells/cellavision", "blood_cells/tecom"),
}
"""Task -> source and target domain. The first half fixed the rules of ``auto``, the other half confirms them."""
FIXED_ON = ("sketch", "webcam", "cellavision")
SINGLE = (*(f"block{i}" for i in range(1, 8)), "head")
COLUMNS = (NONE, "all", "Cross-Val", "head", "logistic-head", "auto", "oracle")


def table(rows: Sequence[Run], tasks: Sequence[str], sizes: Sequence[int], seeds: Sequence[int]) -> list[TextTable]:
    """Accuracy on the target and on the source by task, and what `auto` differs by from the others.

    Of each task and number of labels for which there are rows of `auto` and `all`; no tables if there is none.
    """
    cells = {(task, size): _cell(rows, task, size, seeds) for task in tasks for size in sizes}
    cells = {what: found for what, found in cells.items() if found["auto"] and found["all"]}
    if not cells:
        return []
    tested = [_by_column(cells, "test"), _by_column(cells, "source")]
    counted = {run.result["n"] for found in cells.values() for run in found[NONE]}
    caption = (
        f"Test accuracy in percent, mean over seeds {', '.join(map(str, seeds))} ± half the 95% interval (Student's t) "
        "over draws of the images to tune and validate on, which overlap between seeds; test images are the same for "
        f"all seeds (n = {', '.join(map(str, sorted(counted)))}), and no seed tunes or validates on them. Rates of "
        "all, blocks and head: by validation accuracy of seed 0; epochs: by validation accuracy. Cross-Val: the block "
        "that validates best on each seed. auto: everything on each seed's own labels. Oracle: the block or head that "
        "tests best, which nobody can choose. Test images are a sample, too: at 50% that alone is "
        f"± {_sampling(max(counted)):.1f} to ± {_sampling(min(counted)):.1f} points, the same for all columns."
    )
    costs = _costs(cells)
    timed = any(line[0].endswith("seconds") for line in costs)
    own = "The same networks on held-out images of the source domain, in percent."
    names = ["task", "per class", *COLUMNS]
    return [
        TextTable(names, tested[0], caption),
        TextTable(names, tested[1], own),
        TextTable(["auto minus", "first three tasks", "other three", "all", "worst cell"], _differences(cells), _HOW),
        TextTable(["runs of all", *COLUMNS[2:-1]], costs, _COST + (_SECONDS if timed else "")),
        TextTable(["task", "per class", *(f"seed {seed}" for seed in seeds)], _chosen(cells), _CHOSEN),
    ]


_HOW = (
    "Points of test accuracy: mean over tasks ± half the 95% interval (Student's t) over tasks, each a mean over seeds "
    "and numbers of labels. Worst cell: one task with one number of labels."
)
_COST = (
    "Cost in runs of `all` at one rate on the same images, mean over tasks and seeds. Cross-Val and auto: all their "
    "runs; the search for the rate is counted in auto alone."
)
_SECONDS = " Seconds: over the tasks whose runs were timed beside each other."
_CHOSEN = "What auto chose; every choice but `none` is trained on all labels."


def _cell(rows: Sequence[Run], task: str, size: int, seeds: Sequence[int]) -> dict[str, list[Run]]:
    """The runs of each column, in the order of the seeds; none where one is missing."""

    def own(method: str) -> list[Run]:
        settings = {"recipe": "photographs", "task": task, "per_class": size, "method": method}
        rates = dict.fromkeys(row.key["lr"] for row in rows if settings.items() <= row.key.items())
        return reported(rows, settings, tuple(rates) or (None,), seeds)

    found = {name: own(name) for name in {*COLUMNS, *SINGLE} - {"Cross-Val", "oracle"}}

    def best(names: Sequence[str], by: str) -> list[Run]:
        runs = [found[name] for name in names]
        if not all(runs):
            return []
        each = [list(same) for same in zip(*runs, strict=True)]
        costs = [sum(run.result["cost"] for run in same) for same in each]
        times = [[run.notes.get("seconds") for run in same] for same in each]
        notes = [{} if None in time else {"seconds": sum(time)} for time in times]
        chosen = [max(same, key=lambda run: run.result[by]) for same in each]
        taken = zip(chosen, costs, notes, strict=True)
        return [Run(run.key, {**run.result, "cost": cost}, noted) for run, cost, noted in taken]

    return {**found, "Cross-Val": best(SINGLE[:-1], "validation"), "oracle": best(SINGLE, "test")}


_Cells = dict[tuple[str, int], dict[str, list[Run]]]


def _by_column(cells: _Cells, what: str) -> list[list[str]]:
    def line(found: dict[str, list[Run]]) -> list[str]:
        return [plus_minus([run.result[what] for run in found[name]]) for name in COLUMNS]

    lines = [[task, str(size), *line(found)] for (task, size), found in cells.items()]
    for size in sorted({size for _, size in cells}):
        own = [found for (_, each), found in cells.items() if each == size]
        runs = [[run.result[what] for f in own for run in f[name]] for name in COLUMNS]
        whole = [len(found) == len(runs[0]) for found in runs]  # a mean over some of the tasks would not compare
        means = [f"{100 * fmean(found):.1f}" if full else "-" for found, full in zip(runs, whole, strict=True)]
        if len(own) > 1:
            lines.append(["mean", str(size), *means])
    return lines


def _differences(cells: _Cells) -> list[list[str]]:
    lines = []
    for other in COLUMNS:
        if other == "auto":
            continue
        gains: dict[str, list[float]] = {}
        for (task, _), found in cells.items():
            if found[other]:
                gains.setdefault(task, []).append(_mean(found["auto"]) - _mean(found[other]))
        of_tasks = {task: fmean(own) for task, own in gains.items()}
        first = [own for task, own in of_tasks.items() if task in FIXED_ON]
        others = [own for task, own in of_tasks.items() if task not in FIXED_ON]
        shown = [plus_minus(own) if own else "-" for own in (first, others, [*first, *others])]
        worst = min((gain for own in gains.values() for gain in own), default=None)
        lines.append([other, *shown, "-" if worst is None else f"{100 * worst:.1f}"])
    return lines


_TAKEN: dict[str, Callable[[Run], float | None]] = {
    "steps": lambda run: float(run.result["cost"]),
    "seconds": lambda run: run.notes.get("seconds"),
}


def _costs(cells: _Cells) -> list[list[str]]:
    """Steps and, of the tasks where they are known, seconds: a row of each for each number of labels."""

    def ratio(own: list[dict[str, list[Run]]], name: str, taken: Callable[[Run], float | None]) -> str:
        found = [
            spent / whole
            for cell in own
            for run, other in zip(cell[name], cell["all"], strict=False)
            if (spent := taken(run)) is not None and (whole := taken(other)) is not None
        ]
        return f"{fmean(found):.2g}" if found else "-"

    lines = []
    for size in dict.fromkeys(size for _, size in cells):
        own = [found for (_, each), found in cells.items() if each == size]
        for unit, taken in _TAKEN.items():
            shown = [ratio(own, name, taken) for name in COLUMNS[2:-1]]
            if unit == "steps" or set(shown) != {"-"}:
                lines.append([f"{size} per class, {unit}", *shown])
    return lines


def _chosen(cells: _Cells) -> list[list[str]]:
    def words(run: Run) -> str:
        return str(run.result.get("chosen", "-")).removesuffix(", all labels")

    return [[task, str(size), *map(words, found["auto"])] for (task, size), found in cells.items()]


def _sampling(images: int) -> float:
    """Half the 95% interval, in percent, of an accuracy of one half that is measured on so many images."""
    return 100 * 1.96 * math.sqrt(0.25 / images)


def _mean(runs: Sequence[Run]) -> float:
    return fmean(run.result["test"] for run in runs)
