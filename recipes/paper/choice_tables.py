"""What `auto` is worth beside other ways to choose, drawn from the rows of ``photographs.py`` or ``cifar10c.py``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from peft_surgical.evaluation import TextTable, plus_minus
from peft_surgical.training.ledger import Run
from peft_surgical.training.search import NONE

from .cifar_networks import NETWORKS
from .cifar_tables import BLOCKS
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
LITE0 = tuple(f"block{i}" for i in range(1, 8))
"""The blocks of an EfficientNet-Lite0 before its head."""
CIFAR_BLOCKS = BLOCKS[:-1]
"""Those of the networks of `cifar_networks`."""


@dataclass(frozen=True)
class Kind:
    """Where the rows of a comparison are, and how its tables name things.

    Attributes:
        settings: (Task, images of each class to tune on) -> what the keys of its rows have in common.
        blocks: Task -> those that Cross-Val and the oracle choose among; the oracle also has the head.
        groups: Heading -> tasks, of the means over tasks.
        kept: The result of a row that says what is left on the source, and what it is accuracy on.
    """

    settings: Callable[[str, int], Mapping[str, Any]]
    blocks: Callable[[str], tuple[str, ...]]
    groups: Mapping[str, tuple[str, ...]]
    kept: tuple[str, str]


PHOTOGRAPHS = Kind(
    lambda task, size: {"recipe": "photographs", "task": task, "per_class": size},
    lambda task: LITE0,
    {"first three tasks": tuple(TASKS)[:3], "other three": tuple(TASKS)[3:], "all": tuple(TASKS)},
    ("source", "held-out images of the source domain"),
)


def cifar(tasks: Sequence[tuple[str, str]]) -> tuple[Kind, list[str]]:
    """The kind of ``recipes/cifar10c.py`` with ``--test-images``, and the names of its tasks.

    Args:
        tasks: Pairs of a network and a corruption, or ``flip``.
    """
    names = {f"{network} {task}": (network, task) for network, task in tasks}

    def settings(name: str, size: int) -> dict[str, Any]:
        network, task = names[name]
        return {"recipe": "cifar10c", "network": network, "task": task, "tuning_images": 10 * size}

    groups = {network: tuple(name for name in names if names[name][0] == network) for network, _ in tasks}
    groups["CIFAR-10-C"] = tuple(name for name in names if names[name][1] != "flip")
    groups["CIFAR-Flip"] = tuple(name for name in names if names[name][1] == "flip")
    kept = ("clean", "the same test images without the corruption")
    own = {name: CIFAR_BLOCKS if network in NETWORKS else LITE0 for name, (network, _) in names.items()}
    return Kind(settings, own.__getitem__, {**groups, "all": tuple(names)}, kept), [*names]


_Cells = dict[tuple[str, int], dict[str, list[Run]]]
COLUMNS = (NONE, "all", "Cross-Val", "head", "logistic-head", "lp-ft", "spd", "auto", "oracle")
"""Those that no row is of are left out."""


def table(
    rows: Sequence[Run], tasks: Sequence[str], sizes: Sequence[int], seeds: Sequence[int], kind: Kind = PHOTOGRAPHS
) -> list[TextTable]:
    """Accuracy on the target and on the source by task, and what `auto` differs by from the others.

    Of each task and number of labels for which there are rows of `auto` and `all`; no tables if there is none.
    """
    cells = _cells_of(rows, tasks, sizes, seeds, kind)
    if not cells:
        return []
    columns = [name for name in COLUMNS if any(found[name] for found in cells.values())]
    tested = [_by_column(cells, columns, what) for what in ("test", kind.kept[0])]
    counted = {run.result["n"] for found in cells.values() for run in found[NONE]}
    ends = dict.fromkeys((max(counted), min(counted)))
    caption = (
        f"{_WHAT[len(seeds) > 1].format(seeds=', '.join(map(str, seeds)))}; test images are the same for "
        f"all seeds (n = {', '.join(map(str, sorted(counted)))}), and no seed tunes or validates on them. Rates of "
        "all, blocks and head: by validation accuracy of seed 0; epochs: by validation accuracy. Cross-Val: the block "
        "that validates best on each seed. auto: everything on each seed's own labels. Oracle: the block or head that "
        "tests best, which nobody can choose. Test images are a sample, too: at 50% that alone is "
        f"{' to '.join(f'± {_sampling(n):.1f}' for n in ends)} points, the same for all columns."
    )
    costs = _costs(cells, columns)
    timed = any(line[0].endswith("seconds") for line in costs)
    names = ["task", "per class", *columns]
    found = [
        TextTable(names, tested[0], caption),
        TextTable(names, tested[1], f"The same networks on {kind.kept[1]}, in percent."),
        TextTable(["auto minus", *kind.groups, "worst cell"], _differences(cells, columns, kind.groups), _HOW),
        TextTable(["runs of all", *columns[2:-1]], costs, _COST + (_SECONDS if timed else "")),
        TextTable(["task", "per class", *(f"seed {seed}" for seed in seeds)], _chosen(cells), _CHOSEN),
    ]
    every = [*dict.fromkeys(name for task, _ in cells for name in kind.blocks(task)), "head", "all"]
    if blocks := _by_block(cells, every):
        found.append(TextTable(["task", "per class", *every], blocks, _BLOCKS))
    efforts = _efforts(rows, cells, kind, seeds)
    return [*found, TextTable(_EFFORT_NAMES, efforts, _EFFORT)] if efforts else found


_WHAT = {
    True: (
        "Test accuracy in percent, mean over seeds {seeds} ± half the 95% interval (Student's t) over draws of the "
        "images to tune and validate on, which overlap between seeds"
    ),
    False: "Test accuracy in percent, one draw of the images to tune and validate on (seed {seeds})",
}
_HOW = (
    "Points of test accuracy: mean over tasks ± half the 95% interval (Student's t) over tasks, each a mean over seeds "
    "and numbers of labels. Worst cell: one task with one number of labels."
)
_COST = (
    "Cost in runs of `all` at one rate on the same images, mean over tasks and seeds. Cross-Val and auto: all their "
    "runs; the search for the rate is counted in auto alone."
)
_SECONDS = " Seconds: over the tasks whose runs were timed beside each other."
_BLOCKS = "Test accuracy in percent of each block, the head and everything, tuned alone, where all blocks were run."
_CHOSEN = "What auto chose; every choice but `none` is trained on all labels."
_EFFORT_NAMES = ["effort", "per class", "tasks", "auto", "auto minus effort 1", "cost"]
_EFFORT = (
    "What more effort buys, over the tasks that were run with each: test accuracy in percent, the paired difference to "
    "effort 1 ± half the 95% interval (Student's t) over tasks, and the cost in steps, in runs of `all` at one rate."
)


def _cells_of(
    rows: Sequence[Run], tasks: Sequence[str], sizes: Sequence[int], seeds: Sequence[int], kind: Kind
) -> _Cells:
    """The cells that have rows of `auto` and `all`."""
    plain = [row for row in rows if row.key.get("effort", 1) == 1]
    cells = {(task, size): _cell(plain, kind, task, size, seeds) for task in tasks for size in sizes}
    return {what: found for what, found in cells.items() if found["auto"] and found["all"]}


def overall(
    parts: Mapping[str, tuple[Sequence[Run], Sequence[str], Sequence[int], Sequence[int], Kind]],
    others: Sequence[str] = (NONE, "all", "Cross-Val", "oracle"),
) -> TextTable:
    """What `auto` differs by from others, over tasks of several kinds.

    Args:
        parts: Heading -> rows, tasks, numbers of labels, seeds and kind, as for `table`.
        others: Columns to compare with.
    """
    cells = {heading: _cells_of(*asked) for heading, asked in parts.items()}
    lines = []
    for other in others:
        gains = {heading: _gains(found, other) for heading, found in cells.items()}
        by_task = {heading: [fmean(own) for own in found.values()] for heading, found in gains.items()}
        every = [gain for found in by_task.values() for gain in found]
        shown = [plus_minus(found, sign="+") for found in [*by_task.values(), every]]
        worst = min(gain for found in gains.values() for own in found.values() for gain in own)
        below = sum(gain < -0.01 for gain in every)
        lines.append([other, *shown, f"{100 * worst:+.1f}", f"{below} of {len(every)}"])
    counts = ", ".join(f"{heading}: {len({task for task, _ in found})}" for heading, found in cells.items())
    caption = (
        f"{_HOW} Tasks: {counts}. Last column: tasks on which auto is more than one point below. A task of CIFAR-10 is "
        "one network with one corruption, so that tasks share images."
    )
    return TextTable(["auto minus", *cells, "all tasks", "worst cell", "more than 1 below"], lines, caption)


def _cell(rows: Sequence[Run], kind: Kind, task: str, size: int, seeds: Sequence[int]) -> dict[str, list[Run]]:
    """The runs of each column, in the order of the seeds; none where one is missing."""
    blocks = kind.blocks(task)
    single = (*blocks, "head")

    def own(method: str) -> list[Run]:
        settings = {**kind.settings(task, size), "method": method}
        rates = dict.fromkeys(row.key["lr"] for row in rows if settings.items() <= row.key.items())
        return reported(rows, settings, tuple(rates) or (None,), seeds)

    found = {name: own(name) for name in {*COLUMNS, *single} - {"Cross-Val", "oracle"}}

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

    return {**found, "Cross-Val": best(blocks, "validation"), "oracle": best(single, "test")}


def _by_column(cells: _Cells, columns: Sequence[str], what: str) -> list[list[str]]:
    def shown(runs: list[Run]) -> str:
        return plus_minus([run.result[what] for run in runs if what in run.result])

    lines = [[task, str(size), *(shown(found[name]) for name in columns)] for (task, size), found in cells.items()]
    for size in sorted({size for _, size in cells}):
        own = [found for (_, each), found in cells.items() if each == size]
        runs = [[run.result[what] for f in own for run in f[name] if what in run.result] for name in columns]
        whole = [len(found) == len(runs[0]) for found in runs]  # a mean over some of the tasks would not compare
        means = [
            f"{100 * fmean(found):.1f}" if full and found else "-" for found, full in zip(runs, whole, strict=True)
        ]
        if len(own) > 1:
            lines.append(["mean", str(size), *means])
    return lines


def _by_block(cells: _Cells, names: Sequence[str]) -> list[list[str]]:
    found = {what: cell for what, cell in cells.items() if cell["oracle"]}
    return [
        [task, str(size), *(plus_minus([run.result["test"] for run in cell.get(name, [])]) for name in names)]
        for (task, size), cell in found.items()
    ]


def _differences(cells: _Cells, columns: Sequence[str], groups: Mapping[str, tuple[str, ...]]) -> list[list[str]]:
    lines = []
    for other in columns:
        if other == "auto":
            continue
        gains = _gains(cells, other)
        of_tasks = {task: fmean(own) for task, own in gains.items()}
        grouped = [[of_tasks[task] for task in tasks if task in of_tasks] for tasks in groups.values()]
        shown = [plus_minus(own) if own else "-" for own in grouped]
        worst = min((gain for own in gains.values() for gain in own), default=None)
        lines.append([other, *shown, "-" if worst is None else f"{100 * worst:.1f}"])
    return lines


def _gains(cells: _Cells, other: str) -> dict[str, list[float]]:
    """Task -> points of `auto` above another column, for each number of labels."""
    gains: dict[str, list[float]] = {}
    for (task, _), found in cells.items():
        if found[other]:
            gains.setdefault(task, []).append(_mean(found["auto"]) - _mean(found[other]))
    return gains


_TAKEN: dict[str, Callable[[Run], float | None]] = {
    "steps": lambda run: float(run.result["cost"]),
    "seconds": lambda run: run.notes.get("seconds"),
}


def _costs(cells: _Cells, columns: Sequence[str]) -> list[list[str]]:
    """Steps and, of the tasks where they are known, seconds: a row of each for each number of labels."""
    lines = []
    for size in dict.fromkeys(size for _, size in cells):
        own = [found for (_, each), found in cells.items() if each == size]
        for unit, taken in _TAKEN.items():
            shown = [_in_runs_of_all(own, name, taken) for name in columns[2:-1]]
            if unit == "steps" or set(shown) != {"-"}:
                lines.append([f"{size} per class, {unit}", *shown])
    return lines


def _in_runs_of_all(own: Sequence[Mapping[str, Sequence[Run]]], name: str, taken: Callable[[Run], float | None]) -> str:
    found = [
        spent / whole
        for cell in own
        for run, other in zip(cell[name], cell["all"], strict=False)
        if (spent := taken(run)) is not None and (whole := taken(other)) is not None
    ]
    return f"{fmean(found):.2g}" if found else "-"


def _chosen(cells: _Cells) -> list[list[str]]:
    def words(run: Run) -> str:
        return str(run.result.get("chosen", "-")).removesuffix(", all labels")

    return [[task, str(size), *map(words, found["auto"])] for (task, size), found in cells.items()]


def _efforts(rows: Sequence[Run], cells: _Cells, kind: Kind, seeds: Sequence[int]) -> list[list[str]]:
    """A line for each number of labels and effort, over the tasks that have rows of all efforts that any task has."""
    efforts = sorted({row.key["effort"] for row in rows if "effort" in row.key})
    lines = []
    for size in dict.fromkeys(size for _, size in cells):
        own: dict[str, dict[int, list[Run]]] = {}
        for task in [task for task, each in cells if each == size]:
            settings = {**kind.settings(task, size), "method": "auto"}
            own[task] = {1: cells[task, size]["auto"]}
            own[task] |= {one: reported(rows, {**settings, "effort": one}, (None,), seeds) for one in efforts}
        whole = {task: found for task, found in own.items() if efforts and all(found.values())}
        for effort in [1, *efforts] if whole else ():
            runs = [found[effort] for found in whole.values()]
            gains = [_mean(found[effort]) - _mean(found[1]) for found in whole.values()]
            beside = [{"auto": found[effort], "all": cells[task, size]["all"]} for task, found in whole.items()]
            cost = _in_runs_of_all(beside, "auto", _TAKEN["steps"])
            mean = f"{100 * fmean(_mean(one) for one in runs):.1f}"
            gained = plus_minus(gains, sign="+") if effort > 1 else "-"
            lines.append([str(effort), str(size), ", ".join(whole), mean, gained, cost])
    return lines


def _sampling(images: int) -> float:
    """Half the 95% interval, in percent, of an accuracy of one half that is measured on so many images."""
    return 100 * 1.96 * math.sqrt(0.25 / images)


def _mean(runs: Sequence[Run]) -> float:
    return fmean(run.result["test"] for run in runs)
