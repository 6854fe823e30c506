"""The tables of ``recipes/cifar10c.py``, drawn from rows alone: methods with their costs, and what is forgotten.

``args`` are the options of that recipe; without ``--data`` the rows of whatever data there are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from peft_surgical.evaluation import TextTable, plus_minus
from peft_surgical.experiment.subject import SEARCHES
from peft_surgical.training.fitting import FORWARD_SHARE
from peft_surgical.training.ledger import Run
from peft_surgical.training.search import NONE

from .cifar import digest_of
from .cifar_tasks import task_images
from .protocol import AUTO_SNR, CROSS_VAL, CROSS_VAL_WIDE, reported_rows, runs_behind
from .rows import reported

BLOCKS = ("block1", "block2", "block3", "head")
CROSS_VALIDATED = {CROSS_VAL: BLOCKS, CROSS_VAL_WIDE: (NONE, *BLOCKS, "all")}
"""The targets among which each chooses: as the paper does, and with doing nothing and tuning everything."""
OVERLAP = "which test on some of the same images, so that it is too short for new ones"
"""What an interval over seeds has to be read with where it is that of independent runs."""
CORRECTED = (
    "for new images of the kind: every seed cuts the same ones into those that tune, validate and test, and the "
    "interval is corrected for what seeds share (Nadeau & Bengio 2003)"
)
"""What an interval over seeds is for where it has the ``ratio`` that `shared` gives."""
SELECTION = "learning rate by validation accuracy of seed 0, epoch by validation accuracy of each run"


def settings_of(args: argparse.Namespace, task: str, method: str, images: int, norm_stats: str) -> dict[str, Any]:
    """What the keys of a method's rows have in common, but for rate and seed."""
    found: dict[str, Any] = {"recipe": "cifar10c", "network": Path(args.model).name, "task": task, "method": method}
    found |= {"tuning_images": images, "severity": args.severity, "validation_images": args.validation_images}
    found |= {"epochs": args.epochs}
    found |= {"batch_size": args.batch_size, "weight_decay": args.weight_decay}
    found["norm_stats"] = "frozen" if method == NONE else norm_stats
    if args.test_images is not None:
        found["test_images"] = args.test_images
    if task == "flip":
        found["severity"] = None
    if args.data:
        found["data"] = digest_of(task_images(task, str(args.data), args.severity))
    if method in SEARCHES:
        found["grid"] = [list(args.lr), list(args.head_lr)]
    if method == "auto" and args.effort > 1:
        found["effort"] = args.effort
    return found


def cell(
    args: argparse.Namespace, rows: Sequence[Run], task: str, method: str, images: int, norm_stats: str = "frozen"
) -> list[Run]:
    """The runs to report of one method on one task, in the order of the seeds; none if one is missing.

    ``cross-val`` and ``cross-val-wide`` have on each seed the run of the target that validates best, and the cost of
    all targets' runs; the rate of each target is the one that seed 0 chose. So has ``auto-snr``, of its thresholds,
    where there are several.
    """
    behind = CROSS_VALIDATED.get(method) or runs_behind([method], args.thresholds, BLOCKS)
    if behind != [method]:
        tried = {name: cell(args, rows, task, name, images, norm_stats) for name in behind}
        if not all(tried.values()):
            return []
        if method == AUTO_SNR:
            return reported_rows([method], args.thresholds, BLOCKS, tried)[method]
        cost = sum(run.result["cost"] for some in tried.values() for run in some) / len(args.seeds)
        best = [max(same, key=lambda run: run.result["validation"]) for same in zip(*tried.values(), strict=True)]
        return [Run(run.key, {**run.result, "cost": cost, "chosen": run.key["method"]}) for run in best]
    rates = (None,) if method in {NONE, *SEARCHES} else args.head_lr if method == "head" else args.lr
    return reported(rows, settings_of(args, task, method, images, norm_stats), tuple(rates), args.seeds)


def shared(runs: Sequence[Run], images: int, validation: int = 200) -> float:
    """Test images over tuning images of a cell, the ``ratio`` of `mean_interval`.

    Args:
        runs: The cell's. Those that do not say how many images tested them are of files of 2,000 images.
        images: That tuned.
        validation: Images that chose.
    """
    return float(runs[0].result.get("n", 2000 - images - validation)) / images if runs else 0.0


def comparison_table(args: argparse.Namespace, rows: Sequence[Run], methods: Sequence[str]) -> TextTable:
    """Accuracy by method and task, mean rank over the tasks that all methods have, and cost."""
    images, norm_stats = args.tuning_images[-1], args.norm_stats[0]
    runs = {m: {t: cell(args, rows, t, m, images, norm_stats) for t in args.tasks} for m in methods}
    begun = [m for m in methods if any(runs[m].values())]  # a method without a finished cell ranks nobody
    whole = [t for t in args.tasks if begun and all(runs[m][t] for m in begun)]
    means = {m: {t: fmean(r.result["test"] for r in runs[m][t]) for t in args.tasks if runs[m][t]} for m in methods}
    lines = []
    for method, by_task in runs.items():
        ratio = max((shared(found, images, args.validation_images) for found in by_task.values()), default=0.0)
        cells = [plus_minus([run.result["test"] for run in found], ratio=ratio) for found in by_task.values()]
        summary = ["-", "-", "-"]
        if whole and method in begun:
            mean = plus_minus(_means([by_task[task] for task in whole], "test"), ratio=ratio)
            ranks = [1 + sum(means[m][t] > means[method][t] for m in begun) for t in whole]
            cost = f"{fmean(run.result['cost'] for task in whole for run in by_task[task]):.0f}"
            summary = [mean, f"{fmean(ranks):.1f}", cost]
        lines.append([method, *cells, *summary])
    one = args.epochs * (-(-images // args.batch_size) + FORWARD_SHARE * args.validation_images / args.batch_size)
    searches = " and ".join(name for name in ("race", "auto") if name in methods)
    both, rates = (f"; {searches}: both by that of each seed", f" except in {searches}") if searches else ("", "")
    caption = (
        f"{args.model}. Test accuracy in percent on the images that neither tune nor validate, mean ± half the 95% "
        f"interval (Student's t) over seeds {', '.join(map(str, args.seeds))}, {CORRECTED}; {images} "
        f"images to tune. Mean and rank over {', '.join(whole) or 'no task yet'}. Selection: learning rate by "
        "validation accuracy of seed 0 (cross-val, over the blocks, and cross-val-wide, over these, all and none: then "
        f"the target by that of each seed{both}), epoch by validation accuracy of each run; nothing was selected on "
        f"test images. Cost: training steps for one adapter, without the search for the rate{rates}; one run "
        f"of `all` costs {one:.0f}."
    )
    return TextTable(["method", *args.tasks, "mean", "rank", "cost"], lines, caption)


def forgetting_table(args: argparse.Namespace, rows: Sequence[Run], targets: Sequence[str]) -> TextTable:
    """Accuracy by target and corruption, and on the same images without the corruption."""
    images, norm_stats, counts = args.tuning_images[-1], args.norm_stats[0], set()
    lines = []
    for target in targets:
        done = {t: runs for t in args.tasks if (runs := cell(args, rows, t, target, images, norm_stats))}
        counts |= {runs[0].result["n"] for runs in done.values()}
        ratio = max((shared(runs, images, args.validation_images) for runs in done.values()), default=0.0)
        texts = {
            t: plus_minus([r.result["test"] for r in runs], runs[0].result["n"], ratio=ratio)
            for t, runs in done.items()
        }
        if len(done) == len(args.tasks):  # a mean over some of the corruptions would not compare
            for name, column in (("test", "mean"), ("clean", "clean, mean")):
                if all(name in run.result for runs in done.values() for run in runs):
                    texts[column] = plus_minus(_means(list(done.values()), name), ratio=ratio)
        lines.append([target, *(texts.get(column, "-") for column in (*args.tasks, "mean", "clean, mean"))])
    kind = "Wilson's over test images" if len(args.seeds) == 1 else f"Student's t over seeds, {CORRECTED}"
    caption = (
        f"{args.model}, CIFAR-10-C severity {args.severity}, norm_stats={norm_stats}. Test accuracy in percent, "
        f"mean ± half the 95% interval ({kind}); seeds {', '.join(map(str, args.seeds))}; "
        f"n = {', '.join(map(str, sorted(counts))) or 'none'} test images per seed. Selection: {SELECTION}; nothing "
        "was selected on test images. Clean: the same test images without the corruption, after "
        "tuning, mean over corruptions."
    )
    return TextTable(["target", *args.tasks, "mean", "clean, mean"], lines, caption)


def _means(cells: Sequence[Sequence[Run]], name: str) -> list[float]:
    """Seed by seed the mean of one result over cells."""
    return [fmean(run.result[name] for run in same) for same in zip(*cells, strict=True)]
