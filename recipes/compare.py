"""The paper's Table 4 on CIFAR-10-C and CIFAR-Flip: every method, one protocol, and what each costs.

::

    python recipes/compare.py --network resnet32 --tasks gaussian_noise flip --methods all auto-rgn race --data PATH

trains each method with each learning rate on seed 0, keeps the rate that validates best for the other seeds, and shows
test accuracy, average rank and cost. PATH is a folder of ``<corruption>.parquet`` with ``clean.parquet``; ``--models``
holds the networks' weights. ``cross-val`` picks the best of ``none``, every block and ``all`` on each seed's validation
images, ``race`` does so by successive halving with learning rates included, ``auto`` by a race among ``all``, the head
and the two blocks with the highest RGN. Processes share a ledger and can be killed and started again; ``--reuse`` takes
runs of the same settings from the ledger of ``recipes/cifar10c.py``. Several ``--tuning-images`` give the paper's
Figure 4.

    python recipes/compare.py --table --network resnet32 --markdown table.md --export runs.jsonl

draws the table alone, and copies the runs that it reads into a ledger from which it can be drawn again: without the
stopped runs of the searches, whose choice, trials and cost are in their own results.

Protocol: that of ``recipes/cifar10c.py`` (1,000 images to tune, 200 to validate, the others to test, drawn per class
with each seed; Adam, constant rate, batch 64, 15 epochs, the epoch chosen by validation accuracy). Cost is counted in
training steps of 64 images: optimizer steps, batches that are scored, validation images as a third of a step each, and
for the searches those of all their runs. Departures from the paper: two rates instead of three; L1-SP, L2-SP and
Auto-SNR with one strength or threshold each.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch.utils.data import DataLoader

from paper.cifar import Images, digest_of, read_images, split
from paper.cifar_networks import load_network, normalise
from paper.grids import Cell, export, grid_parser, parse_grid, shard
from peft_surgical import anatomy_of, score_blocks
from peft_surgical.choosing.pace import block_means
from peft_surgical.errors import run_in_words
from peft_surgical.evaluation import TextTable, accuracy, mean_interval, plus_minus, predict_logits
from peft_surgical.training.fitting import FORWARD_SHARE, FitSettings, fit, forget_checkpoints
from peft_surgical.training.ledger import Ledger, Run
from peft_surgical.training.search import AUTO_KEEP, AUTO_RUNGS, NONE, auto, candidates_of, race

CROSS_VALIDATED = [NONE, "block1", "block2", "block3", "head", "all"]
METHODS = [NONE, "all", "gradual-first-last", "gradual-last-first", "l1-sp", "l2-sp", "auto-snr", "auto-rgn"]
SEARCHES = ["cross-val", "race", "auto"]


@functools.lru_cache(maxsize=4)
def read(place: str, task: str) -> tuple[Images, str]:
    """The images of a task and a digest of them. CIFAR-Flip is the clean images with label 9 - y (paper, Sec. 3.1)."""
    images = read_images(place, "clean" if task == "flip" else task)
    if task == "flip":
        images = Images(images.pixels, 9 - images.labels)
    return images, digest_of(images)


def parts_of(args: argparse.Namespace, key: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Rows to tune, to validate and to test."""
    images, _ = read(args.data, key["task"])
    parts = split(images.labels, key["seed"], key["tuning_images"], key["validation_images"])
    inputs = normalise(images.pixels, key["network"])
    return [[{"pixel_values": inputs[i], "labels": images.labels[i]} for i in part.tolist()] for part in parts]


def tested(model: torch.nn.Module, rows: list[dict[str, Any]]) -> float:
    labels = torch.stack([row["labels"] for row in rows])
    return accuracy(predict_logits(model, torch.stack([row["pixel_values"] for row in rows])), labels)


def checkpoints(args: argparse.Namespace, key: dict[str, Any]) -> Path:
    candidate = {name: value for name, value in key.items() if name not in {"stop", "recipe"}}
    digest = hashlib.sha256(json.dumps(candidate, sort_keys=True).encode()).hexdigest()[:16]
    return Path(args.output, "checkpoints", digest)


def train(args: argparse.Namespace, ledger: Ledger, key: dict[str, Any]) -> dict[str, Any]:
    """One run of one method, or a race; the test images are looked at once, by the model that validation chose."""
    tuning, validation, test = parts_of(args, key)
    network = load_network(key["network"], args.models)
    if key["method"] == NONE:
        return {"validation": tested(network, validation), "test": tested(network, test), "cost": 0.0}
    if key["method"] in SEARCHES:
        return searched(args, ledger, key, network, tuning)
    racing = "stop" in key or checkpoints(args, key).is_dir()
    epochs = key["epochs"]
    found = fit(
        network,
        key["method"],
        tuning,
        validation,
        FitSettings(key["lr"], epochs, key["batch_size"], weight_decay=key["weight_decay"], seed=key["seed"]),
        folder=checkpoints(args, key) if racing else None,
        stop_epoch=max(1, round(key["stop"] * epochs)) if "stop" in key else None,
    )
    result = {"validation": found.validation, "validation_loss": found.losses[-1], "cost": found.cost}
    result |= {"epoch": found.best_epoch, "curve": found.curve, "losses": found.losses}
    if found.record:
        anatomy = anatomy_of(load_network(key["network"], args.models))
        result["factors"] = [block_means(factors, anatomy) for _, factors in sorted(found.record.items())]
    return result if "stop" in key else result | {"test": tested(found.model, test)}


def searched(
    args: argparse.Namespace, ledger: Ledger, key: dict[str, Any], network: torch.nn.Module, tuning: list[Any]
) -> dict[str, Any]:
    """A race among all candidates, or (auto) among those that RGN nominates."""
    anatomy = anatomy_of(network)
    candidates, cost, scores = candidates_of(anatomy, args.lr, args.head_lr), 0.0, None
    if key["method"] == "auto":
        loader = DataLoader(
            tuning, key["batch_size"], shuffle=True, generator=torch.Generator().manual_seed(key["seed"])
        )
        scores = score_blocks(network, loader, "rgn")
        cost += scores.num_batches
    settings = {name: value for name, value in key.items() if name not in {"method", "lr", "grid", "rungs"}}
    settings["recipe"] = "compare race"  # stopped runs are nobody else's, full ones are
    fitted = functools.partial(raced, args, ledger)
    found = (
        auto(candidates, scores.block_scores, fitted, ledger, settings)
        if scores
        else race(candidates, fitted, ledger, settings)
    )
    for one in candidates:
        forget_checkpoints(checkpoints(args, {**settings, "method": one.method, "lr": one.lr}))
    own = {"chosen": str(found.chosen), "validation": found.validation, "cost": cost + found.cost}
    own["scores"] = dict(scores.block_scores) if scores else None
    return own | {"test": found.run.result["test"], "trials": found.record()["validation"]}


def raced(args: argparse.Namespace, ledger: Ledger, key: dict[str, Any]) -> dict[str, Any]:
    whole = functools.partial(lookup, args, ledger)
    return whole(key) if "stop" in key else ledger.run({**key, "recipe": "compare"}, whole).result


def lookup(args: argparse.Namespace, ledger: Ledger, key: dict[str, Any]) -> dict[str, Any]:
    """A run from the other recipe's ledger if it has one of exactly these settings, else train it."""
    known = reused(args, key)
    result = known if known is not None else train(args, ledger, key)
    rate = "" if key["lr"] is None else f" lr={key['lr']:g}"
    where = f" after {key['stop']:.0%}" if "stop" in key else f": test {100 * result['test']:.1f} %"
    chosen = f", {result['chosen']}" if "chosen" in result else ""
    print(f"{key['network']} {key['task']} n={key['tuning_images']} {key['method']}{rate} seed={key['seed']}", end="")
    print(f"{where}, validation {100 * result['validation']:.1f} %, cost {result['cost']:.0f}{chosen}", flush=True)
    return result


def reused(args: argparse.Namespace, key: dict[str, Any]) -> dict[str, Any] | None:
    if not args.reuse or "stop" in key or key["task"] == "flip":
        return None
    same = ("network", "data", "lr", "seed", "tuning_images", "validation_images")
    same += () if key["method"] == NONE else ("epochs", "batch_size", "weight_decay")
    wanted = {name: key[name] for name in same} | {"target": key["method"]}
    runs = Ledger(args.reuse).runs(recipe="cifar10c", corruption=key["task"], **wanted)
    runs = [run for run in runs if run.key.get("norm_stats", "frozen") == "frozen" and not run.key.get("delta_dtype")]
    if not runs:
        return None
    result = {name: runs[0].result[name] for name in ("test", "epoch", "curve") if name in runs[0].result}
    if key["method"] == NONE:  # that recipe does not look at the validation images of an untuned network
        network = load_network(key["network"], args.models)
        return {**result, "validation": tested(network, parts_of(args, key)[1]), "cost": 0.0}
    steps = -(-key["tuning_images"] // key["batch_size"])
    cost = key["epochs"] * (steps + FORWARD_SHARE * key["validation_images"] / key["batch_size"])
    return {**result, "validation": runs[0].result["validation"], "cost": cost}


def cell(args: argparse.Namespace, task: str, method: str, images: int) -> Cell:
    """The runs of one method on one task with so many tuning images."""
    settings = {"recipe": "compare", "network": args.network, "task": task, "method": method}
    settings |= {"tuning_images": images, "validation_images": args.validation_images}
    if args.data:
        settings["data"] = read(args.data, task)[1]
    settings |= {"epochs": args.epochs, "batch_size": args.batch_size, "weight_decay": args.weight_decay}
    if method in SEARCHES:
        settings["grid"] = [args.lr, args.head_lr]
    if method == "auto":
        settings["rungs"] = [*AUTO_RUNGS, AUTO_KEEP]
    rates = (None,) if method in {NONE, *SEARCHES} else tuple(args.head_lr if method == "head" else args.lr)
    return Cell(settings, rates, tuple(args.seeds))


def cells(args: argparse.Namespace) -> list[Cell]:
    """Every cell that the asked rows need; a row of cross-val needs those of all its targets."""
    methods = [m for m in args.methods if m != "cross-val"]
    methods += [m for m in CROSS_VALIDATED if "cross-val" in args.methods]
    return [cell(args, t, m, n) for n in args.tuning_images for m in dict.fromkeys(methods) for t in args.tasks]


def cross_validated(args: argparse.Namespace, ledger: Ledger, task: str, images: int) -> list[Run]:
    """On each seed the target that validates best; every target's rate is the one that seed 0 chose."""
    runs = [cell(args, task, target, images).reported(ledger) for target in CROSS_VALIDATED]
    if not all(runs):
        return []
    tried = sum(run.result["cost"] for some in runs for run in some) / len(args.seeds)
    best = [max(same, key=lambda run: run.result["validation"]) for same in zip(*runs, strict=True)]
    return [Run(run.key, {**run.result, "cost": tried, "chosen": run.key["method"]}) for run in best]


def reported(args: argparse.Namespace, ledger: Ledger, task: str, method: str, images: int) -> list[Run]:
    if method == "cross-val":
        return cross_validated(args, ledger, task, images)
    return cell(args, task, method, images).reported(ledger)


def show(args: argparse.Namespace, ledger: Ledger) -> None:
    """Accuracy by method and task, mean rank over the tasks that all methods have, and cost; figures beside it."""
    images = args.tuning_images[-1]
    runs = {m: {t: reported(args, ledger, t, m, images) for t in args.tasks} for m in args.methods}
    begun = [m for m in args.methods if any(runs[m].values())]  # a method without a finished cell has no say
    whole = [t for t in args.tasks if begun and all(runs[m][t] for m in begun)]
    means = {
        m: {t: fmean(r.result["test"] for r in runs[m][t]) for t in args.tasks if runs[m][t]} for m in args.methods
    }
    header = ["method", *args.tasks, "mean", "rank", "cost"]
    lines = []
    for method, by_task in runs.items():
        cells = [plus_minus([run.result["test"] for run in found]) for found in by_task.values()]
        summary = ["-", "-", "-"]
        if whole and method in begun:
            seeds = zip(*(by_task[task] for task in whole), strict=True)
            mean = plus_minus([fmean(run.result["test"] for run in same) for same in seeds])
            ranks = [1 + sum(means[m][t] > means[method][t] for m in begun) for t in whole]
            cost = f"{fmean(run.result['cost'] for task in whole for run in by_task[task]):.0f}"
            summary = [mean, f"{fmean(ranks):.1f}", cost]
        lines.append([method, *cells, *summary])
    caption = (
        f"{args.network}. Test accuracy in percent on the images that neither tune nor validate, mean ± half the 95% "
        f"interval (Student's t) over seeds {', '.join(map(str, args.seeds))}, whose test sets overlap; {images} "
        f"images to tune. Mean and rank over {', '.join(whole) or 'no task yet'}. Selection: learning rate by "
        "validation accuracy of seed 0 (cross-val: then the target by that of each seed; race and auto: both by that "
        "of each seed), epoch by validation accuracy of each run; no test image had a say. Cost: training steps for "
        "one adapter, without the search for the rate except in race and auto; one run of `all` costs "
        f"{one_run(args, images):.0f}."
    )
    table = TextTable(header, lines, caption)
    table.show()
    if args.markdown:
        table.save(args.markdown)
    if args.figure:
        plot(args, ledger)


def one_run(args: argparse.Namespace, images: int) -> float:
    return args.epochs * (-(-images // args.batch_size) + FORWARD_SHARE * args.validation_images / args.batch_size)


def plot(args: argparse.Namespace, ledger: Ledger) -> None:
    """Left: accuracy against tuning images (paper's Figure 4). Right: rates of Auto-RGN by epoch (Figure 6)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(args.tasks), 7), layout="constrained")
    axes = figure.subplots(2, len(args.tasks), squeeze=False)
    for column, task in enumerate(args.tasks):
        for place, method in enumerate(args.methods):
            found = {n: reported(args, ledger, task, method, n) for n in args.tuning_images}
            points = [
                (n, mean_interval([r.result["test"] for r in runs])) for n, runs in found.items() if len(runs) > 1
            ]
            if points:
                ys = [100 * p.value for _, p in points]
                errors = [50 * (p.high - p.low) for _, p in points]
                beside = 1.03 ** (place - len(args.methods) / 2)  # or equal ones would hide each other
                axes[0, column].errorbar(
                    [n * beside for n, _ in points], ys, errors, marker=".", capsize=2, label=method
                )
        axes[0, column].set(xscale="log", xlabel="tuning images", ylabel="test accuracy (%)", title=task)
        axes[0, column].set_xticks(args.tuning_images, map(str, args.tuning_images), minor=False)
        axes[0, column].set_xticks([], minor=True)
        axes[0, column].legend()
        for run in reported(args, ledger, task, "auto-rgn", args.tuning_images[-1])[:1]:
            for block in run.result["factors"][0]:
                axes[1, column].plot([epoch[block] for epoch in run.result["factors"]], marker=".", label=block)
            axes[1, column].set(xlabel="epoch", ylabel="factor of the rate", title=f"Auto-RGN, seed {run.key['seed']}")
            axes[1, column].legend()
    figure.savefig(args.figure, dpi=120)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    data = "folder of <corruption>.parquet and clean.parquet"
    parser = grid_parser(__doc__, output="outputs/compare", data=data, seeds=(0, 1, 2))
    add = parser.add_argument
    add("--tasks", nargs="+", default=["gaussian_noise", "frost", "zoom_blur", "pixelate", "flip"])
    add("--methods", nargs="+", default=[*METHODS, *SEARCHES], help="rows of the table, or targets such as block1")
    add("--lr", type=float, nargs="+", default=[1e-3, 1e-4])
    add("--head-lr", type=float, nargs="+", default=[1e-1, 1e-2], help="of the head alone")
    add("--tuning-images", type=int, nargs="+", default=[1000])
    add("--validation-images", type=int, default=200)
    add("--epochs", type=int, default=15)
    add("--batch-size", type=int, default=64)
    add("--weight-decay", type=float, default=1e-4, help="acts on the delta")
    add("--reuse", help="ledger of recipes/cifar10c.py to take equal runs from")
    add("--figure", help="also draw Figures 4 and 6 into this file")
    add("--export", help="also add the runs behind the table, and no others, to this ledger")
    args = parse_grid(parser, argv)
    if args.export and Path(args.export).resolve() == args.ledger.resolve():
        parser.error(f"--export {args.export} is the ledger that is read: name another file")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    ledger = Ledger(args.ledger)
    for one in [] if args.table else shard(cells(args), *args.shard):
        one.fill(ledger, functools.partial(lookup, args, ledger))
    show(args, ledger)
    if args.export:
        target = Ledger(args.export)
        missing = [f"{one.settings['method']} on {one.settings['task']}" for one in export(cells(args), ledger, target)]
        print(f"{len(target)} runs in {target.file}" + (f"; not finished: {', '.join(missing)}" if missing else ""))


if __name__ == "__main__":
    sys.exit(run_in_words(main))
