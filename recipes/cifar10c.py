"""Which part of a network to tune for a corruption: surgical fine-tuning on CIFAR-10-C (Lee et al. 2023, Sec. 3.1).

::

    accelerate launch recipes/cifar10c.py --target block1 --corruption gaussian_noise --data PATH

tunes block 1 of the ResNet-26 on 1,000 images with each of three learning rates, and shows the test accuracy of the one
that validates best: 74.7 ± 2.9 % from 52.8 % over three seeds, 45 s per run on one CPU core. PATH is a folder of
``<corruption>.parquet``, a folder of the published ``<corruption>.npy`` with ``labels.npy`` (then add ``--clean
uoft-cs/cifar10``), or one parquet file; ``--models`` is the folder with the networks' weights.

The whole grid, by processes that share a ledger and can be killed and started again; then table and plot alone::

    GRID="--network resnet32 --target none block1 block2 block3 head all --seeds 0 1 2 --data PATH --threads 1"
    python recipes/cifar10c.py $GRID --shard 1/2 & python recipes/cifar10c.py $GRID --shard 2/2; wait
    python recipes/cifar10c.py $GRID --table --markdown table.md

Protocol: 1,000 images to tune, 200 to validate, the others to test, drawn per class with each seed. Adam, constant
learning rate, batch 64, 15 epochs; the epoch is chosen by validation accuracy, the learning rate by that of seed 0 (of
equals the first listed) and kept for the other seeds. Every adapter is reloaded in a process that trained nothing, and
its logits must be the same to the last bit. Departures from the paper: 200 images to validate instead of 100; weight
decay acts on the delta, so it pulls towards the pretrained weights (L2-SP), where the paper's pulls towards zero.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from accelerate import PartialState
from paper.cifar import Images, corruptions_in, read_once, split
from paper.cifar_networks import load_network, normalise
from paper.grids import Cell, grid_parser, parse_grid, shard
from peft_surgical.errors import DataError, run_in_words
from peft_surgical.evaluation import Report, TextTable, accuracy, interval_of_runs, measure, plus_minus, predict_logits
from peft_surgical.training.fitting import FitSettings, fit
from peft_surgical.training.ledger import Ledger, Run
from peft_surgical.training.trainer import file_name

LEARNING_RATES, HEAD_LEARNING_RATES = [1e-3, 1e-4, 1e-5], [1e-1, 1e-2, 1e-3]  # the paper's
SELECTION = "learning rate by validation accuracy of seed 0, epoch by validation accuracy of each run"
# A fresh interpreter, not a fork: what it reloads cannot come from this process's memory.
RELOADER = functools.cache(lambda: ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")))


def device_of(args: argparse.Namespace) -> torch.device:
    return PartialState(cpu=args.cpu).device  # the one that Trainer takes


def tune(args: argparse.Namespace, key: dict[str, Any], tuning: Images, validation: Images):
    """Train one adapter; returns the model at its best epoch, that epoch, and the validation accuracy of each epoch."""

    def rows(images: Images) -> list[dict[str, Tensor]]:
        inputs = normalise(images.pixels, args.network)
        return [{"pixel_values": x, "labels": y} for x, y in zip(inputs, images.labels, strict=True)]

    settings = FitSettings(
        key["lr"],
        epochs=args.epochs,
        batch_size=args.batch_size,
        weight_decay=args.weight_decay,
        seed=key["seed"],
        use_cpu=args.cpu,
    )
    config = {"norm_stats": args.norm_stats, "delta_dtype": args.delta_dtype}
    network = load_network(args.network, args.models)
    found = fit(network, key["target"], rows(tuning), rows(validation), settings, config=config)
    return found.model, found.best_epoch, list(found.curve)


@functools.lru_cache(maxsize=2)
def predicted_before(
    network: str, models: str | None, place: str, corruption: str, severity: int, device: torch.device
):
    """What the base predicts for all images: the same for every run on them."""
    images, _ = read_once(place, corruption, severity)
    return predict_logits(load_network(network, models).to(device), normalise(images.pixels, network)).argmax(1)


def run(args: argparse.Namespace, key: dict[str, Any]) -> dict[str, Any]:
    """Train (unless the target is none), evaluate, save, reload elsewhere and compare; compare with the base."""
    start = time.perf_counter()
    images, _ = read_once(args.data, key["corruption"], args.severity)
    parts = split(images.labels, key["seed"], args.tuning_images, args.validation_images)
    tuning, validation, test = (Images(images.pixels[rows], images.labels[rows]) for rows in parts)
    places, pixels = {"test": (args.data, key["corruption"], args.severity)}, {"test": test.pixels}
    if args.clean:
        places["clean"] = (args.clean, "clean", args.severity)
        clean, _ = read_once(*places["clean"])
        if not torch.equal(clean.labels, images.labels):
            raise DataError(f"{args.clean} does not hold the same rows as {args.data}: pass the matching --clean")
        pixels["clean"] = clean.pixels[parts.test]

    result: dict[str, Any] = {"n": len(test.labels)}
    for name, place in places.items():
        before = predicted_before(args.network, args.models, *place, device_of(args))[parts.test]
        result[f"{name}_before"] = result[name] = accuracy(before, test.labels)
    if key["target"] != "none":
        model, epoch, curve = tune(args, key, tuning, validation)
        logits = {name: predict_logits(model, normalise(x, args.network)) for name, x in pixels.items()}
        result |= {name: accuracy(after, test.labels) for name, after in logits.items()}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:8]
        words = [args.network, key["corruption"], key["target"], f"{key['lr']:g}", f"seed{key['seed']}", digest]
        folder = Path(args.output, "adapters", file_name("-".join(words)))
        model.save_pretrained(folder)
        check_reload(args, folder, pixels, logits)
        result |= {
            "validation": max(curve),
            "epoch": epoch,
            "curve": curve,
            "adapter": folder.name,
            "reload": "bit-equal in a new process",
        }
        result["bytes"] = Path(folder, "adapter_model.safetensors").stat().st_size
        result["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result["seconds"] = round(time.perf_counter() - start, 1)
    result["versions"] = {name: version(name) for name in ("peft-surgical", "peft", "torch", "transformers")}
    text = ", ".join(f"{name} {100 * result[f'{name}_before']:.1f} -> {100 * result[name]:.1f} %" for name in places)
    said = f"{key['corruption']} {key['target']} lr={key['lr']} seed={key['seed']}: {text}"
    print(f"{said}, {result['seconds']:.0f} s", flush=True)
    return result


def reload_logits(args: argparse.Namespace, folder: str, threads: int, sets: list[Any]) -> list[Any]:
    """Logits of base and adapter as they are on disk; runs in the process of RELOADER."""
    torch.set_num_threads(threads)
    model = PeftModel.from_pretrained(load_network(args.network, args.models), folder).to(device_of(args))
    return [predict_logits(model, normalise(torch.from_numpy(pixels), args.network)).numpy() for pixels in sets]


def check_reload(args: argparse.Namespace, folder: Path, sets: dict[str, Tensor], logits: dict[str, Tensor]) -> None:
    """Raise unless the adapter on disk gives exactly these logits in another process."""
    arrays = [pixels.numpy() for pixels in sets.values()]
    found = RELOADER().submit(reload_logits, args, str(folder), torch.get_num_threads(), arrays).result()
    for name, again in zip(logits, map(torch.from_numpy, found), strict=True):
        if not torch.equal(logits[name], again):
            changed = int((logits[name].argmax(1) != again.argmax(1)).sum())
            raise RuntimeError(
                f"{folder} does not reload to what was evaluated: on {name}, logits differ by up to "
                f"{(logits[name] - again).abs().max():.3g} and {changed} of {len(again)} predictions change"
            )


def cell(args: argparse.Namespace, corruption: str, target: str) -> Cell:
    """The runs of one corruption and one target. Without data, of whatever data the ledger was filled from."""
    settings = {"recipe": "cifar10c", "network": args.network, "corruption": corruption, "severity": args.severity}
    settings |= {"target": target, "tuning_images": args.tuning_images, "validation_images": args.validation_images}
    if args.data:
        settings["data"] = read_once(args.data, corruption, args.severity)[1]
    if target == "none":
        return Cell(settings, (None,), tuple(args.seeds))
    settings |= {"norm_stats": args.norm_stats, "delta_dtype": args.delta_dtype, "epochs": args.epochs}
    settings |= {"batch_size": args.batch_size, "weight_decay": args.weight_decay}
    head = target in {"head", "last"}  # the paper's rates are larger there
    rates = (args.head_lr or HEAD_LEARNING_RATES) if head else (args.lr or LEARNING_RATES)
    return Cell(settings, tuple(rates), tuple(args.seeds))


def report(args: argparse.Namespace, runs: list[Run]) -> Report:
    """The numbers of one cell, over its seeds."""
    key, n, seeds = runs[0].key, runs[0].result["n"], [run.key["seed"] for run in runs]
    shifted = f"CIFAR-10-C {key['corruption']}, severity {key['severity']}"
    sets = {
        "test": shifted,
        "test_before": f"{shifted}, before tuning",
        "clean": "clean",
        "clean_before": "clean, before tuning",
    }
    measurements = tuple(
        measure(
            "accuracy",
            [run.result[name] for run in runs],
            dataset=dataset,
            n=n,
            seeds=seeds,
            selection="none" if key["target"] == "none" or name.endswith("before") else SELECTION,
        )
        for name, dataset in sets.items()
        if name in runs[0].result
    )
    settings = {name: value for name, value in key.items() if name not in {"network", "target", "seed"}}
    adapters = [run.result["adapter"] for run in runs if "adapter" in run.result]
    return Report(args.network, key["target"], measurements, settings | {"adapters": adapters})


def fill(args: argparse.Namespace, ledger: Ledger, one: Cell) -> None:
    """Run what is missing of a cell, and write its report, which names the chosen adapters."""
    runs = one.fill(ledger, functools.partial(run, args))
    folder = Path(args.output, "reports")
    folder.mkdir(parents=True, exist_ok=True)
    name = "-".join(one.settings[k] for k in ("network", "corruption", "target"))
    report(args, runs).save(folder / f"{file_name(name)}.json")


def show(args: argparse.Namespace, ledger: Ledger) -> None:
    """The table of all complete cells, on the terminal and as Markdown, and the bars of the paper's Figure 2."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    header = ["target", *args.corruption, "mean", "clean, mean"]
    lines, bars, counts = [], {}, set()
    for target in args.target:
        done = {c: runs for c in args.corruption if (runs := cell(args, c, target).reported(ledger))}
        tests = {c: ([r.result["test"] for r in runs], runs[0].result["n"]) for c, runs in done.items()}
        counts |= {n for _, n in tests.values()}
        texts = {c: plus_minus(*test) for c, test in tests.items()}
        if len(done) == len(args.corruption):  # a mean over some of the corruptions would not compare
            for name, column in (("test", "mean"), ("clean", "clean, mean")):
                if all(name in r.result for runs in done.values() for r in runs):
                    means = [fmean(r.result[name] for r in same) for same in zip(*done.values(), strict=True)]
                    texts[column] = plus_minus(means)  # of one seed: of the same photographs, so there is no honest n
        lines.append([target, *(texts.get(column, "-") for column in header[1:])])
        bars[target] = {c: interval_of_runs(*test) for c, test in tests.items()}

    kind = "Wilson's over test images" if len(args.seeds) == 1 else "Student's t over seeds, whose test sets overlap"
    caption = (
        f"{args.network}, CIFAR-10-C severity {args.severity}, norm_stats={args.norm_stats}. Test accuracy in percent, "
        f"mean ± half the 95% interval ({kind}); seeds {', '.join(map(str, args.seeds))}; "
        f"n = {', '.join(map(str, sorted(counts))) or 'none'} test images per seed. Selection: {SELECTION}; no test "
        "image had a say. Clean: the same test images without the corruption, after tuning, mean over corruptions."
    )
    table = TextTable(header, lines, caption)
    table.show()
    if args.markdown:
        table.save(args.markdown)

    if not counts:
        print(f"no cell is complete in {ledger.file}: nothing to plot yet")
        return
    figure, axes = pyplot.subplots(figsize=(3 + len(header), 3.5), layout="constrained")
    width = 0.8 / len(bars)
    for i, (target, values) in enumerate(bars.items()):
        places = [header[1:-1].index(c) + (i - (len(bars) - 1) / 2) * width for c in values]
        if not values:
            continue
        heights = [100 * interval.value for interval in values.values()]
        halves = [50 * (interval.high - interval.low) for interval in values.values()]
        axes.bar(places, heights, width, yerr=halves, label=target, color=f"C{i}", capsize=2)
    axes.set_xticks(range(len(header) - 2), [c.replace("_", "\n") for c in header[1:-1]])
    axes.set(ylabel="test accuracy (%)", title=f"{args.network}: what to tune for which corruption")
    axes.legend(title="tuned", loc="center left", bbox_to_anchor=(1, 0.5))
    Path(args.output).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(args.output, f"{args.network}.png"), dpi=150)
    pyplot.close(figure)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    data = "folder of .parquet or of .npy files, or one parquet file"
    parser = grid_parser(__doc__, output="outputs/cifar10c", data=data, seeds=(0,))
    add = parser.add_argument
    add(
        "--clean",
        help="the uncorrupted images, a file or a Hub id (default: clean.parquet or clean.npy beside the data)",
    )
    add("--corruption", nargs="+", help="default: all in the folder, or with --table alone in the ledger")
    add("--severity", type=int, default=5, choices=range(1, 6), help="of .npy files; a parquet file holds one")
    add("--target", nargs="+", default=["block1"], help="none, block1, block2, block3, head, all, or any target text")
    add("--norm-stats", choices=["frozen", "target", "all"], default="frozen")
    add("--delta-dtype", choices=["float32", "bfloat16", "float16"], help="dtype of the saved deltas")
    add("--lr", type=float, nargs="+", help="candidates for all targets but head (default 1e-3 1e-4 1e-5)")
    add("--head-lr", type=float, nargs="+", help="candidates for head (default 1e-1 1e-2 1e-3)")
    add("--tuning-images", type=int, default=1000, help="over all classes (default 1000)")
    add("--validation-images", type=int, default=200, help="over all classes (default 200)")
    add("--epochs", type=int, default=15)
    add("--batch-size", type=int, default=64)
    add("--weight-decay", type=float, default=1e-4, help="acts on the delta: L2-SP")
    add("--cpu", action="store_true", help="leave an accelerator alone")
    add("--dry-run", action="store_true", help="list the cells and what is finished, train nothing")
    args = parse_grid(parser, argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error("one run is too small to be split over processes: start a process for each --shard i/n instead")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    ledger = Ledger(args.ledger)
    found = {run.key["corruption"] for run in ledger.runs(recipe="cifar10c", network=args.network)}
    if args.data:
        folder = Path(args.data) if Path(args.data).is_dir() else Path(args.data).parent
        there = corruptions_in(folder) if folder.is_dir() else []
        found = set(there) - {"clean"} if folder == Path(args.data) else {Path(args.data).stem}
        if args.corruption and folder != Path(args.data) and set(args.corruption) != found:
            raise DataError(
                f"{args.data} holds {', '.join(found)} only: pass the folder to have {', '.join(args.corruption)}"
            )
        args.clean = args.clean or (str(folder) if "clean" in there else None)
    args.corruption = args.corruption or sorted(found)
    cells = shard(
        [cell(args, corruption, target) for corruption in args.corruption for target in args.target], *args.shard
    )
    for one in [] if args.table else cells:
        if args.dry_run:
            done, most = len(ledger.runs(**one.settings)), len(one.candidates) + len(set(one.seeds) - {0})
            print(f"{one.settings['corruption']} {one.settings['target']}: {done} runs finished, {most} in all")
        else:
            fill(args, ledger, one)
    if RELOADER.cache_info().currsize:
        RELOADER().shutdown()
        RELOADER.cache_clear()
    if not args.dry_run:
        show(args, ledger)


if __name__ == "__main__":
    sys.exit(run_in_words(main))
