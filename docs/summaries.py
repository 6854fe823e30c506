"""Writes the tables and figures of ``docs/results`` that the rows of CIFAR-10-C and CIFAR-Flip give.

::

    python docs/summaries.py && python docs/tables.py

``compare-*.md`` and ``cifar10c-*.md`` are what ``recipes/cifar10c.py --table`` draws from ``cifar10c.jsonl``, and
``synthetic-*.md`` what ``recipes/synthetic.py --table`` does. ``compare-means.md``: the methods over both networks and
four corruptions, with differences paired by seed, and ``compare-means.png``, its figure; ``compare-moments.md``:
Auto-RGN with and without a new optimizer every epoch; ``compare-images.md`` and its figure: accuracy by the number of
images; ``norm-policies.md``; ``choice-*.md``: what ``auto`` is worth; ``criteria.md`` and ``soups.md``: what the
recipes of these names draw; ``resnet26.png`` and ``resnet32.png``: which block for which corruption; ``shifts.png``:
which block for which kind of shift. Which runs count is for the recipes to say: here are their own rules.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes"))

import cifar10c  # noqa: E402
import private_head  # noqa: E402
import synthetic  # noqa: E402
from paper import choice_tables  # noqa: E402
from paper.cifar_tables import CORRECTED, OVERLAP, cell, comparison_table, forgetting_table, shared  # noqa: E402
from paper.protocol import audit  # noqa: E402
from peft_surgical.evaluation import TextTable, interval_of_runs, mean_interval, plus_minus  # noqa: E402
from peft_surgical.training.ledger import Ledger, Run  # noqa: E402

RESULTS = ROOT / "docs" / "results"
NETWORKS = {"resnet26": "ResNet-26", "resnet32": "ResNet-32"}
CORRUPTIONS = ["gaussian_noise", "frost", "zoom_blur", "pixelate"]
BLOCKS = ["block1", "block2", "block3", "head"]
# `auto` was another algorithm when these runs were made: what it does today is in photographs.md.
METHODS = ["none", "all", "block1", *(row for row in cifar10c.PROTOCOL.rows if row not in ("all", "auto"))]
FLIP = [*METHODS[:3], *BLOCKS[1:], *METHODS[3:]]
YARDSTICKS = ["cross-val", "all"]
PUBLISHED = {  # Lee et al. 2023, Table 4, CIFAR-C: percent, mean over 14 corruptions of another network
    "none": 52.6,
    "all": 79.9,
    "gradual-first-last": 80.5,
    "gradual-last-first": 78.8,
    "l1-sp": 81.7,
    "auto-snr": 80.9,
    "auto-rgn": 81.4,
    "cross-val": 82.8,
}
POLICIES = ["frozen", "target", "all"]


RATIO = 800 / 1000
"""Test images over tuning images in all of these tables but the one by the number of images."""


def mean(values: Sequence[float], sign: str = "") -> str:
    """The mean over seeds that share images, with its interval."""
    return plus_minus(values, sign=sign, ratio=RATIO)


def minus(values: Sequence[float], others: Sequence[float]) -> str:
    """The mean of the differences, seed by seed."""
    return mean([a - b for a, b in zip(values, others, strict=True)], sign="+")


def by_seed(runs: Sequence[Sequence[Run]], name: str) -> list[float]:
    """Seed by seed the mean of one result over cells, whose runs stand in the order of the seeds."""
    return [fmean(run.result[name] for run in same) for same in zip(*runs, strict=True)]


def read(network: str, *words: str) -> tuple[argparse.Namespace, list[Run]]:
    """What the recipe makes of a command line that asks for seeds 0 to 2 of the two larger rates; and all rows."""
    grid = ["--model", network, "--seeds", "0", "1", "2", "--lr", "1e-3", "1e-4", "--head-lr", "1e-1", "1e-2"]
    rows = RESULTS / "cifar10c.jsonl"
    args = cifar10c.parse_arguments(
        ["--table", "--rows", str(rows), "--tasks", *CORRUPTIONS, *grid, "--thresholds", *words]
    )
    return args, Ledger(rows).runs()


def comparison(network: str) -> str:
    """All methods of one network on four corruptions."""
    args, rows = read(network)
    found = [method for method in METHODS if any(cell(args, rows, task, method, 1000) for task in args.tasks)]
    return comparison_table(args, rows, found).markdown()


def flip(network: str) -> str:
    """All methods and blocks of one network on CIFAR-Flip."""
    args, rows = read(network, "--tasks", "flip")
    return comparison_table(args, rows, FLIP).markdown()


def forgetting(network: str) -> str:
    """Every block on four corruptions, and on clean images afterwards."""
    args, rows = read(network)
    return forgetting_table(args, rows, ["none", *BLOCKS, "all"]).markdown()


def damaged() -> str:
    """Noise on one block, each block tuned."""
    rows = RESULTS / "synthetic.jsonl"
    args = synthetic.parse_arguments(["--table", "--rows", str(rows), "--epochs", "3"])
    return synthetic.table(args, Ledger(rows).runs()).markdown()


def private() -> str:
    """The head under differential privacy."""
    rows = RESULTS / "private.jsonl"
    args = private_head.parse_arguments(["--table", "--rows", str(rows)])
    return private_head.table(args, Ledger(rows).runs()).markdown()


def choices() -> tuple[list[Run], list[str], list[int], list[int], choice_tables.Kind]:
    """The rows of CIFAR-10-C and CIFAR-Flip with 20 labels of each class, as `choice_tables.table` takes them."""
    rows = Ledger(RESULTS / "cifar10c-choice.jsonl").runs()
    found = dict.fromkeys((run.key["network"], run.key["task"]) for run in rows)
    kind, tasks = choice_tables.cifar(sorted(found, key=lambda pair: (pair[1], pair[0])))
    return rows, tasks, [20], [0], kind


def choice() -> str:
    """What `auto` is worth on CIFAR-10-C and CIFAR-Flip."""
    return "\n".join(each.markdown() for each in choice_tables.table(*choices()))


def choice_means() -> str:
    """What `auto` is worth over all tasks, photographs and CIFAR-10."""
    rows = Ledger(RESULTS / "photographs.jsonl").runs()
    photographs = rows, list(choice_tables.TASKS), [5, 20], [0, 1, 2], choice_tables.PHOTOGRAPHS
    rows, tasks, *rest = choices()
    flipped = [task for task in tasks if task.endswith("flip")]
    corrupted = [task for task in tasks if task not in flipped]
    parts = {"photographs": photographs, "CIFAR-10-C": (rows, corrupted, *rest), "CIFAR-Flip": (rows, flipped, *rest)}
    return choice_tables.overall(parts).markdown()


def from_rows(recipe: str) -> str:
    """What a recipe draws from what it has found for the rows of `choice`."""
    rows, ledger = RESULTS / "cifar10c-choice.jsonl", RESULTS / f"{recipe}.jsonl"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "table.md")
        importlib.import_module(recipe).main(["--rows", str(rows), "--ledger", str(ledger), "--markdown", str(file)])
        return file.read_text(encoding="utf-8")


def compare_means() -> str:
    """Every method with all its runs on both networks, its distance to cross-validation and to full tuning."""
    runs: dict[str, dict[str, list[list[Run]]]] = {}
    for network in NETWORKS:
        args, rows = read(network)
        for method in METHODS:
            found = [cell(args, rows, task, method, 1000) for task in CORRUPTIONS]
            if all(found):
                runs.setdefault(method, {})[network] = found
    both = {m: [cell for cells in by.values() for cell in cells] for m, by in runs.items() if len(by) == len(NETWORKS)}
    tests = {method: by_seed(cells, "test") for method, cells in both.items()}
    lines = []
    for method, cells in both.items():
        own = [mean(by_seed(runs[method][network], "test")) for network in NETWORKS]
        distances = ["" if method == other else minus(tests[method], tests[other]) for other in YARDSTICKS]
        cost = fmean(by_seed(cells, "cost"))
        paper = f"{PUBLISHED[method]}" if method in PUBLISHED else ""
        lines.append([method, *own, mean(tests[method]), *distances, f"{cost:.0f}", paper])
    caption = (
        f"Test accuracy in percent, mean over {', '.join(CORRUPTIONS)}, and over both networks; ± half the 95% "
        f"interval (Student's t) over seeds {', '.join(map(str, args.seeds))}, {CORRECTED}. Differences "
        "are taken seed by seed. Methods with all their runs on both networks; selection rules and cost as in the "
        "table of each network. Paper: its Table 4, mean over 14 corruptions of another network (RobustBench's "
        "Standard, a WRN-28-10)."
    )
    return TextTable(
        ["method", *NETWORKS.values(), "both", *(f"minus {m}" for m in YARDSTICKS), "cost", "paper"], lines, caption
    ).markdown()


def norm_policies(network: str = "resnet32", target: str = "block1") -> str:
    """What is gained on the target and forgotten on clean images, by whose BatchNorm statistics move."""
    corruptions, names = ["gaussian_noise", "pixelate"], ["test", "clean"]
    columns: dict[tuple[str, str], dict[str, list[float]]] = {}
    rates: dict[str, str] = {}
    for corruption in corruptions:
        for policy in POLICIES:  # the rate is the one chosen for the first
            args, rows = read(network, *(["--lr", rates[corruption]] if corruption in rates else []))
            runs = cell(args, rows, corruption, target, 1000, policy)
            rates.setdefault(corruption, str(runs[0].key["lr"]))
            columns[policy, corruption] = {name: by_seed([runs], name) for name in names}
    values = {p: [columns[p, c][name] for c in corruptions for name in names] for p in POLICIES}
    lines = [[policy, *map(mean, values[policy])] for policy in POLICIES]
    first = POLICIES[0]
    lines += [[f"{p} minus {first}", *map(minus, values[p], values[first])] for p in POLICIES[1:]]
    caption = (
        f"{target} of the {NETWORKS[network]} at the rate that seed 0's validation images choose for {first} "
        f"({', '.join(f'{c} {rate}' for c, rate in rates.items())}); test accuracy in percent on the corruption that "
        "it was tuned for, and on the same images without it; mean ± half the 95% interval (Student's t) over seeds "
        f"{', '.join(map(str, args.seeds))}, {CORRECTED}. Differences are taken seed by seed. The epoch is "
        "chosen by validation accuracy of each run."
    )
    header = [text for corruption in corruptions for text in (corruption, "clean after it")]
    return TextTable(["norm_stats", *header], lines, caption).markdown()


def moments(network: str = "resnet26") -> str:
    """Auto-RGN with Adam's moments kept, and with a new Adam every epoch as in the paper's reference code."""
    args, rows = read(network)
    tests = {}
    for method in ("auto-rgn", "auto-rgn-reset"):
        runs = [cell(args, rows, task, method, 1000) for task in CORRUPTIONS]
        tests[method] = [by_seed([run], "test") for run in runs] + [by_seed(runs, "test")]
    kept, reset = tests.values()
    lines = [[method, *map(mean, columns)] for method, columns in tests.items()]
    lines.append(["reset minus kept", *map(minus, reset, kept)])
    caption = (
        f"{NETWORKS[network]}; test accuracy in percent, mean ± half the 95% interval (Student's t) over seeds "
        f"{', '.join(map(str, args.seeds))}, {CORRECTED}; differences seed by seed. The rate is chosen by "
        "the validation images of seed 0, for each of the two, the epoch by those of each run."
    )
    return TextTable(["Adam's moments", *CORRUPTIONS, "mean"], lines, caption).markdown()


def by_images(network: str = "resnet26") -> str:
    """Accuracy by the number of images to tune on (paper, Figure 4)."""
    sizes = ["50", "100", "200", "500", "1000"]
    (args, rows), lines = read(network, "--tuning-images", *sizes), []
    for task in CORRUPTIONS[:2]:
        for method in ("none", "block1", "all"):
            runs = [cell(args, rows, task, method, images) for images in args.tuning_images]
            lines.append([task, method, *(plus_minus([run.result["test"] for run in some]) for some in runs)])
    caption = (
        f"{NETWORKS[network]}; test accuracy in percent by the number of images to tune on, 200 more to validate; mean "
        f"± half the 95% interval (Student's t) over seeds {', '.join(map(str, args.seeds))}, {OVERLAP}: it is "
        "for draws of the images to tune on. "
        "Batches of 64, 15 epochs: the fewer the images, the fewer the steps. More images to tune leave fewer to test. "
        "Selection as in the table of the network; nothing was selected on test images."
    )
    return TextTable(["task", "method", *sizes], lines, caption).markdown()


def draw_means(file: Path) -> None:
    """Accuracy and cost of every method in ``compare-means.md``, from that table's own cells."""
    from matplotlib.figure import Figure

    lines = [line for line in compare_means().splitlines() if line.startswith("| ")]
    names, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]
    both, cost = names.index("both"), names.index("cost")
    untuned = next(row[both].split()[0] for row in rows if row[0] == "none")
    rows = sorted((row for row in rows if row[0] != "none"), key=lambda row: float(row[both].split()[0]))
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        mean, half = map(float, row[both].split(" ± "))
        axes.errorbar(mean, place, xerr=half, marker="o", capsize=2, color="tab:blue")
    axes.set_yticks(range(len(rows)), [f"{row[0]} ({row[cost]} steps)" for row in rows])
    axes.axvline(next(float(row[both].split()[0]) for row in rows if row[0] == "all"), linestyle=":", color="grey")
    figure.supxlabel("test accuracy (%), mean over 2 networks and 4 corruptions, 95% interval", fontsize="medium")
    axes.set_title(f"The dotted line is tuning all; no tuning gets {untuned}", fontsize="medium")
    figure.savefig(file, dpi=110)


def draw_images(file: Path, network: str = "resnet26") -> None:
    """Upper: accuracy against tuning images (paper's Figure 4). Lower: rates of Auto-RGN by epoch (Figure 6)."""
    from matplotlib.figure import Figure

    args, rows = read(network, "--tuning-images", "50", "100", "200", "500", "1000")
    tasks, methods = CORRUPTIONS[:2], ("none", "block1", "all")
    figure = Figure(figsize=(5 * len(tasks), 7), layout="constrained")
    axes = figure.subplots(2, len(tasks), squeeze=False)
    for column, task in enumerate(tasks):
        for place, method in enumerate(methods):
            found = {n: cell(args, rows, task, method, n) for n in args.tuning_images}
            points = {n: mean_interval([run.result["test"] for run in runs]) for n, runs in found.items()}
            beside = 1.03 ** (place - len(methods) / 2)  # or equal ones would hide each other
            values, halves = [100 * p.value for p in points.values()], [50 * (p.high - p.low) for p in points.values()]
            axes[0, column].errorbar([n * beside for n in points], values, halves, marker=".", capsize=2, label=method)
        axes[0, column].set(xscale="log", xlabel="tuning images", ylabel="test accuracy (%)", title=task)
        axes[0, column].set_xticks(args.tuning_images, map(str, args.tuning_images), minor=False)
        axes[0, column].set_xticks([], minor=True)
        axes[0, column].legend()
        run = cell(args, rows, task, "auto-rgn", 1000)[0]
        for block in run.result["factors"][0]:
            axes[1, column].plot([epoch[block] for epoch in run.result["factors"]], marker=".", label=block)
        axes[1, column].set(xlabel="epoch", ylabel="factor of the rate", title=f"Auto-RGN, seed {run.key['seed']}")
        axes[1, column].legend()
    figure.savefig(file, dpi=120)


def draw_blocks(network: str, file: Path) -> None:
    """The bars of the paper's Figure 2: what to tune for which corruption."""
    from matplotlib.figure import Figure

    (args, rows), targets = read(network), ["none", *BLOCKS, "all"]
    figure = Figure(figsize=(6 + len(args.tasks), 3.5), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(targets)
    for i, target in enumerate(targets):
        found = [cell(args, rows, task, target, 1000) for task in args.tasks]
        ends = [
            interval_of_runs([run.result["test"] for run in runs], runs[0].result["n"], shared(runs, 1000))
            for runs in found
        ]
        places = [place + (i - (len(targets) - 1) / 2) * width for place in range(len(args.tasks))]
        heights, halves = [100 * end.value for end in ends], [50 * (end.high - end.low) for end in ends]
        axes.bar(places, heights, width, yerr=halves, label=target, color=f"C{i}", capsize=2)
    axes.set_xticks(range(len(args.tasks)), [task.replace("_", "\n") for task in args.tasks])
    axes.set(ylabel="test accuracy (%)", title=f"{network}: what to tune for which corruption")
    axes.legend(title="tuned", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=150)


def gains_by_shift(network: str = "resnet26") -> dict[str, dict[str, list[float]]]:
    """Kind of shift -> target -> points of test accuracy above no tuning, seed by seed."""
    (args, rows), runs = read(network, "--tasks", *CORRUPTIONS, "flip"), Ledger(RESULTS / "synthetic.jsonl").runs()
    noise = synthetic.parse_arguments(["--table", "--rows", str(RESULTS / "synthetic.jsonl"), "--epochs", "3"])

    def corrupted(tasks: Sequence[str], target: str) -> list[float]:
        return by_seed([cell(args, rows, task, target, 1000) for task in tasks], "test")

    def damaged(target: str) -> list[float]:
        return by_seed([synthetic.cell(noise, runs, "block2", target)], "test")

    kinds: dict[str, Callable[[str], list[float]]] = {
        "input: corrupted pixels": functools.partial(corrupted, CORRUPTIONS),
        "feature: noise on block2": damaged,
        "output: labels changed": functools.partial(corrupted, ["flip"]),
    }
    return {
        kind: {
            target: [100 * (after - before) for after, before in zip(tests(target), tests("none"), strict=True)]
            for target in [*BLOCKS, "all"]
        }
        for kind, tests in kinds.items()
    }


def draw_shifts(file: Path) -> None:
    """What each block gains on each kind of shift."""
    from matplotlib.figure import Figure

    gains = gains_by_shift()
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, (kind, by_target) in zip(figure.subplots(1, len(gains)), gains.items(), strict=True):
        best = max(BLOCKS, key=lambda target: fmean(by_target[target]))
        for place, (target, values) in enumerate(by_target.items()):
            color = "tab:orange" if target == best else "lightgrey" if target == "all" else "tab:blue"
            axes.bar(place, fmean(values), color=color)
            axes.plot([place] * len(values), values, "k.", markersize=4)
        axes.set_xticks(range(len(by_target)), by_target, rotation=45)
        axes.set_title(kind, fontsize="medium")
    figure.axes[0].set_ylabel("points above no tuning")
    figure.savefig(file, dpi=120)


AUDITED = ("cifar10c", "imagenet_c", "living17", "entity30", "cifar_flip", "waterbirds", "celeba", "camelyon17", "fmow")


def audited() -> str:
    """Every setting of every recipe, and where it is from."""
    lines = [line for name in AUDITED for line in audit(importlib.import_module(name).PROTOCOL, f"`{name}.py`")]
    caption = (
        "Verdict: paper, its reference code (github.com/anniesch/surgical-finetuning), ours where neither says, or a "
        "departure from what they say."
    )
    return TextTable(["recipe", "setting", "here", "verdict", "source"], lines, caption).markdown()


SUMMARIES = {
    "recipes.md": audited,
    **{f"compare-{network}.md": functools.partial(comparison, network) for network in NETWORKS},
    **{f"compare-flip-{network}.md": functools.partial(flip, network) for network in NETWORKS},
    **{f"cifar10c-{network}.md": functools.partial(forgetting, network) for network in NETWORKS},
    "synthetic-resnet26.md": damaged,
    "private-resnet26.md": private,
    "compare-means.md": compare_means,
    "compare-moments.md": moments,
    "compare-images.md": by_images,
    "norm-policies.md": norm_policies,
    "choice-cifar.md": choice,
    "choice-means.md": choice_means,
    "criteria.md": functools.partial(from_rows, "criteria"),
    "soups.md": functools.partial(from_rows, "soups"),
}

if __name__ == "__main__":
    for name, summary in SUMMARIES.items():
        (RESULTS / name).write_text(summary(), encoding="utf-8")
    draw_means(RESULTS / "compare-means.png")
    draw_images(RESULTS / "compare-images.png")
    draw_shifts(RESULTS / "shifts.png")
    for name in NETWORKS:
        draw_blocks(name, RESULTS / f"{name}.png")
