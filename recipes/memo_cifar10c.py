"""What to adapt at test time, without labels: MEMO and TENT on CIFAR-10-C (Lee et al. 2023, Sec. 2.2, Table 9).

::

    python recipes/memo_cifar10c.py --target none stem all --mode online --corruption gaussian_noise --data PATH

adapts the ResNet-26 to a stream of 800 noisy images, one after the other, and shows the accuracy of the predictions:
58.8 % with the stem, 52.8 % with all tensors, 52.9 % without. One image takes about 0.1 s on a CPU core. PATH is a
folder of ``<corruption>.parquet`` or of the published ``<corruption>.npy``; ``--models`` holds the networks' weights.
Processes share a ledger (``--shard 1/2``). Without ``--target`` and the like the whole table is computed.

    python recipes/memo_cifar10c.py --table --markdown table.md --figure figure.png
    python recipes/memo_cifar10c.py --network resnet32 --method none bn tent --data PATH       # TENT with BatchNorm
    python recipes/memo_cifar10c.py --streams-at-once --data PATH --images 1800 --seeds 0 1 2   # on a GPU, all together

Protocol: the test images of ``recipes/cifar10c.py`` (800 per corruption and seed; ``--images 1800`` are all that do not
validate), in an order drawn with the seed. An image is predicted after the step on its own views; online keeps what was
learnt, episodic does not. From the paper's A.6: SGD online and AdamW episodic, 32 views, and what is tuned: its first
layer is the stem, its first two layers ``conv1 + layer1.0.conv1``, its first two blocks (conv1 and the first block)
``block1``, its last the head. Learning rate (and steps) are those with the most accurate stream of the 200 validation
images of each corruption in ``--select-on``, seed 0, for each method, target and mode; they are kept for all
corruptions and seeds. Online, that stream begins the 200 again until it is as long as the test stream, since too large
a rate may take hundreds of images to show; a candidate that collapses ends there. Departures from the paper, which has
10,000 images of each corruption: it chooses with 1,000 and streams 9,000; it chooses weight decay among four values
(here none) and steps among 1 and 2 (``--steps 1 2``); its rates are a grid of three, and then three beside the best.
The measured table has one seed, and streams of 800 images online and 400 episodic (``--episodic-images 400``).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import re
import sys
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import Normalize

from paper.cifar import corruptions_in, digest_of, split
from paper.cifar_networks import NETWORKS, load_network
from paper.cifar_tables import OVERLAP
from paper.cifar_tasks import task_images
from paper.many_streams import ManyMemo, Plan, ViewsOfMany, adapt_many, collapses
from paper.rows import best_validated, judged
from peft_surgical.adaptation import CollapseWarning, Record, batch_statistics
from peft_surgical.adaptation.views import AugMix
from peft_surgical.blocks import anatomy_of, parse, resolve
from peft_surgical.choosing.models import logits_of
from peft_surgical.errors import DataError, run_in_words
from peft_surgical.evaluation import TextTable, plus_minus
from peft_surgical.experiment.adapting import AdaptSettings
from peft_surgical.training.ledger import Ledger, Run, canonical
from peft_surgical.training.search import SELECTION_SEED

Row = tuple[str, str, str]  # method, target, mode
TARGETS = ["all", "stem", "conv1 + layer1.0.conv1", "block1", "head"]
"""Those of the paper's Table 9: all, "first layer", "first 2 layers", "first 2 blocks" (conv1 and the first block: its
appendix A.6), last."""
LISTED = ["gaussian_noise", "frost", "brightness", "contrast"]  # in the paper's Table 9 and in the shared data
PUBLISHED = {  # Lee et al. 2023, Table 9: percent on 9,000 images of each corruption
    ("none", "none", "none"): [51.6, 66.9, 85.9, 70.3],
    ("memo", "all", "online"): [51.48, 72.64, 86.83, 70.88],
    ("memo", "stem", "online"): [68.14, 76.20, 86.72, 74.26],
    ("memo", "conv1 + layer1.0.conv1", "online"): [68.00, 76.16, 86.65, 73.97],
    ("memo", "block1", "online"): [67.84, 75.91, 86.91, 74.67],
    ("memo", "head", "online"): [51.61, 66.92, 86.00, 70.27],
    ("memo", "all", "episodic"): [56.31, 71.93, 88.15, 72.66],
    ("memo", "stem", "episodic"): [53.11, 68.41, 86.53, 70.82],
    ("memo", "conv1 + layer1.0.conv1", "episodic"): [53.20, 68.64, 86.47, 70.67],
    ("memo", "block1", "episodic"): [53.20, 68.61, 86.56, 70.73],
    ("memo", "head", "episodic"): [51.69, 67.05, 85.98, 70.28],
}


def rows_of(args: argparse.Namespace) -> list[Row]:
    memo = [("memo", target, mode) for mode in args.mode for target in args.target if target != "none"]
    tent = [("tent", target, "online") for target in args.tent_target]
    given = {"none": [("none", "none", "none")], "bn": [("bn", "none", "none")], "memo": memo, "tent": tent}
    return [row for method in args.method for row in given[method]]


def stream_of(args: argparse.Namespace, key: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] and labels of one part, in the order of the stream."""
    images = task_images(key["corruption"], args.data, args.severity)
    parts = split(images.labels, key["seed"], 1000, args.validation_images)
    generator = torch.Generator().manual_seed(key["seed"])
    # A longer test stream goes on with the images that the other recipes tune on, a validation stream begins again.
    validation = [parts.validation] * math.ceil(key["images"] / len(parts.validation))
    pools = [parts.test, parts.tune] if key["part"] == "test" else validation
    rows = torch.cat([pool[torch.randperm(len(pool), generator=generator)] for pool in pools])[: key["images"]]
    return images.pixels[rows].float() / 255, images.labels[rows]


def predict(args: argparse.Namespace, key: dict[str, Any], images: Tensor) -> tuple[Tensor, Record]:
    """Logits along one stream, and what happened; a validation stream that collapses ends, its other rows are NaN."""
    network = load_network(key["network"], args.models)
    normalise = Normalize(NETWORKS[args.network].mean, NETWORKS[args.network].std)
    if key["method"] in {"none", "bn"}:
        statistics = batch_statistics(network) if key["method"] == "bn" else contextlib.nullcontext()
        with torch.no_grad(), statistics:
            batches = images.split(key["batch_size"] or 100)
            return torch.cat([logits_of(network(normalise(batch))) for batch in batches]), Record()
    own = ("method", "target", "mode", "lr", "optimizer", "steps", "seed")
    settings = AdaptSettings(**{name: key[name] for name in own}, views=key["views"] or 1, norm_stats="frozen")
    method = settings.method_on(network, normalise, "cpu")
    found: list[Tensor] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)  # it is in the record
        for batch in images.split(key["batch_size"] or 50):
            found.append(method(batch))
            if method.record.collapses and key["part"] == "validation":
                found.append(torch.full((len(images) - method.record.images, found[0].shape[1]), torch.nan))
                break
    return torch.cat(found), method.record


def adapt(args: argparse.Namespace, key: dict[str, Any]) -> dict[str, Any]:
    """One stream: which of its predictions were right, and what it cost."""
    images, labels = stream_of(args, key)
    start, cpu = time.perf_counter(), time.process_time()
    logits, record = predict(args, key, images)
    result = judged(logits, labels)
    result |= {"n": len(labels), "steps": record.steps, "skipped": record.skipped, "collapses": [*record.collapses]}
    result |= {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    print(f"{key}: {100 * result['accuracy']:.1f} %, {result['seconds']} s", flush=True)
    return result | {"versions": versions()}


def versions() -> dict[str, str]:
    """The versions of what a stream's numbers depend on, and of the package itself where it is installed."""
    found = {name: version(name) for name in ("peft", "torch")}
    with contextlib.suppress(PackageNotFoundError):
        found["peft-surgical"] = version("peft-surgical")
    return found


def candidates(args: argparse.Namespace, row: Row) -> list[dict[str, Any]]:
    """The settings among which validation images choose; of equals the first."""
    method, target, mode = row
    own: dict[str, Any] = {"method": method, "target": target, "mode": mode, "network": args.network}
    own |= {"recipe": "memo_cifar10c", "severity": args.severity, "views": args.views if method == "memo" else None}
    own |= {"batch_size": args.batch_size if method in {"bn", "tent"} else None}
    if method in {"none", "bn"}:
        return [own | {"optimizer": None, "lr": None, "steps": None}]
    optimizer, rates = ("adamw", args.episodic_lr) if mode == "episodic" else ("sgd", args.lr)
    optimizer, rates = ("adam", args.tent_lr) if method == "tent" else (optimizer, rates)
    rates = args.head_lr if target == "head" else rates
    return [own | {"optimizer": optimizer, "lr": lr, "steps": steps} for steps in args.steps for lr in rates]


def settings(args: argparse.Namespace, one: dict[str, Any], corruption: str, part: str, seed: int) -> dict[str, Any]:
    """The key of a run. What an online stream becomes shows on one as long; of episodic ones a short one will do."""
    episodic = one["mode"] == "episodic"
    images = args.validation_images if episodic and part == "validation" else args.images
    images = args.episodic_images if episodic and part == "test" else images
    key = one | {"corruption": corruption, "part": part, "seed": seed, "images": images}
    return key | {"data": digest_of(task_images(corruption, args.data, args.severity))} if args.data else key


def runs_of(args: argparse.Namespace, ledger: Ledger, row: Row, corruption: str) -> list[Run]:
    """The test runs of one cell, one per seed, at the settings that validate best; without data, none if one lacks."""

    def single(key: dict[str, Any]) -> Run | None:
        if not args.table:
            return ledger.run(key, functools.partial(adapt, args))
        found = ledger.runs(**key)
        if len(found) > 1:
            raise DataError(f"{ledger.file} holds {len(found)} runs for {key}: use one ledger for each data")
        return found[0] if found else None

    def run(one: dict[str, Any], part: str, seed: int) -> Run | None:
        on = [corruption] if part == "test" else args.select_on
        tried = [single(settings(args, one, name, part, seed)) for name in on]
        found = [each for each in tried if each]
        if len(found) < len(on):
            return None
        accuracy = fmean(each.result["accuracy"] for each in found)
        return found[0] if len(found) == 1 else Run(found[0].key, {"accuracy": accuracy})

    return best_validated(candidates(args, row), args.seeds, run)


def at_once(args: argparse.Namespace, ledger: Ledger) -> None:
    """Fill the ledger with what `runs_of` would, the streams of a target and mode together, on ``args.device``."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    room = 0.4 * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1e9
    views = {steps: ViewsOfMany(AugMix(args.views), steps, room / len(args.steps)) for steps in args.steps}
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as torch's convolutions have it by default
        torch.backends.cudnn.benchmark = True
    scale = NETWORKS[args.network].mean, NETWORKS[args.network].std
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in scale)

    @functools.cache
    def read(corruption: str, part: str, seed: int, images: int) -> tuple[Tensor, Tensor]:
        key = {"corruption": corruption, "part": part, "seed": seed, "images": images}
        pixels, labels = stream_of(args, key)
        return pixels.to(device), labels

    def fill(keys: list[dict[str, Any]]) -> None:
        missing = [key for key in keys if ledger.find(key) is None]
        if not missing:
            return
        network = load_network(args.network, args.models).to(device)
        parameters = dict(network.named_parameters())
        names = [name for name in resolve(parse(missing[0]["target"]), anatomy_of(network)) if name in parameters]
        episodic, steps = missing[0]["mode"] == "episodic", missing[0]["steps"]
        own = {"optimizer": missing[0]["optimizer"], "steps": steps, "episodic": episodic}
        memo = ManyMemo(
            network, names, args.width if episodic else len(missing), preprocess=lambda x: (x - mean) / std, **own
        )
        streams = [read(*(key[name] for name in ("corruption", "part", "seed", "images"))) for key in missing]
        plans = [Plan(pixels, key["seed"], key["lr"]) for key, (pixels, _) in zip(missing, streams, strict=True)]
        start = time.perf_counter()
        outcomes = adapt_many(memo, plans, views[steps], eager=args.eager)
        seconds = time.perf_counter() - start
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        for key, (_, labels), outcome in zip(missing, streams, outcomes, strict=True):
            logits, collapsed, taken = outcome.logits, collapses(outcome.logits), outcome.steps
            if collapsed and key["part"] == "validation":  # as `predict` ends it, after the batch of 50
                end = min((collapsed[0] // 50 + 1) * 50, len(labels))
                logits[end:], taken = torch.nan, min(taken, end * steps)
                collapsed = [place for place in collapsed if place < end]
            result = judged(logits, labels) | {"n": len(labels), "steps": taken, "skipped": outcome.skipped}
            result |= {"collapses": collapsed, "seconds": round(seconds / len(missing), 2), "device": where}
            ledger.append(key, result | {"versions": versions()})
        images = sum(key["images"] for key in missing)
        rates = ", ".join(dict.fromkeys(f"{key['lr']:g}" for key in missing))
        what = f"{missing[0]['target']}, {missing[0]['mode']}, {missing[0]['part']}, rates {rates}"
        print(f"{what}: {len(missing)} streams, {images} images, {seconds:.1f} s", flush=True)

    for row in rows_of(args):
        if row[0] != "memo":
            for corruption in args.corruption:
                runs_of(args, ledger, row, corruption)
            continue
        tried = candidates(args, row)
        for steps in args.steps if len(tried) > 1 else ():
            some = [one for one in tried if one["steps"] == steps]
            fill([settings(args, one, name, "validation", SELECTION_SEED) for one in some for name in args.select_on])
        drawn = argparse.Namespace(**{**vars(args), "table": True})

        def chosen(one: dict[str, Any], part: str, seed: int, drawn: argparse.Namespace = drawn) -> Run:
            if part == "test":
                return Run(one, {})
            found = [ledger.find(settings(drawn, one, name, part, seed)) or {} for name in args.select_on]
            return Run(one, {"accuracy": fmean(each["accuracy"] for each in found)})

        (best,) = {canonical(run.key): run.key for run in best_validated(tried, args.seeds, chosen)}.values()
        fill([settings(args, best, name, "test", seed) for seed in args.seeds for name in args.corruption])


def shown(runs: list[Run], n: int | None = None) -> str:
    """Accuracy with its interval; on the first n images of a stream in which images do not depend on each other."""
    rights = [run.result["right"][:n] for run in runs]
    return plus_minus([right.count("1") / len(right) for right in rights], len(rights[0])) if runs else "-"


def gain(runs: list[Run], base: list[Run]) -> str:
    """Points above the base on the images of both: with a normal interval over images, of several seeds over them."""
    each = [
        [int(a) - int(b) for a, b in zip(one.result["right"], other.result["right"], strict=False)]
        for one, other in zip(runs, base, strict=True)
    ]
    if len(each) != 1:
        return plus_minus([fmean(one) for one in each], sign="+")
    return f"{100 * fmean(each[0]):+.1f} ± {196 * stdev(each[0]) / math.sqrt(len(each[0])):.1f}"


def show(args: argparse.Namespace, ledger: Ledger) -> None:
    """Accuracy with the paper's beside it; gains over no adaptation; settings and cost. And the streams' figure."""
    cells = {row: {c: runs_of(args, ledger, row, c) for c in args.corruption} for row in rows_of(args)}
    cells = {row: found for row, found in cells.items() if any(found.values())}
    base = cells.get(("none", "none", "none"), {})
    accuracies, gains, costs = [], [], []
    for row, found in cells.items():
        own, runs = [row[0], row[2], row[1]], [run for some in found.values() for run in some]
        published = dict(zip(LISTED, PUBLISHED.get(row, []) if args.network == "resnet26" else [], strict=False))
        beside = {c: f" ({published[c]:.1f})" if c in published and found[c] else "" for c in args.corruption}
        accuracies.append([*own, *(shown(some) + beside[c] for c, some in found.items())])
        if row[0] == "none":
            continue
        gains.append([*own, *(gain(some, base[c]) if some and base.get(c) else "-" for c, some in found.items())])
        known = [{**run.notes, **run.result} for run in runs]
        spent = [one.get("cpu_seconds", one["seconds"]) / one["n"] for one in known if "seconds" in one]
        key, each = runs[0].key, fmean(spent)
        rate = "-" if key["lr"] is None else f"{key['lr']:g}"
        grid = [one["lr"] for one in candidates(args, row)]
        rate += " (an end of the grid)" if len(grid) > 1 and key["lr"] in (min(grid), max(grid)) else ""
        trouble = [sum(run.result["skipped"] for run in runs), sum(bool(run.result["collapses"]) for run in runs)]
        did = (key["optimizer"] or "-", rate, key["steps"] or "-", f"{1000 * each:.3g}", *trouble)
        costs.append([*own, *map(str, did)])
    n = args.episodic_images
    if any(row[2] == "episodic" for row in cells) and n < args.images:  # what their accuracy is to be compared with
        accuracies.insert(1, ["none", f"first {n}", "none", *(shown(base.get(c, []), n) for c in args.corruption)])
    every = [run for found in cells.values() for runs in found.values() for run in runs]
    counts = sorted({run.result["n"] for run in every})
    kind = "Wilson's" if len(args.seeds) == 1 else f"Student's t over seeds, {OVERLAP}"
    devices = {run.result["device"] for run in every if "device" in run.result}
    time_of = "of a CPU core, everything included"
    time_of = f"of {', '.join(sorted(devices))}, shared by all streams that ran at once" if devices else time_of
    caption = (
        f"{args.network}, CIFAR-10-C severity {args.severity}: accuracy in percent of the predictions made along the "
        f"stream, ± half the 95% interval ({kind}); seeds {', '.join(map(str, args.seeds))}, streams of "
        f"{', '.join(map(str, counts))} test images. In brackets the paper's Table 9, on streams of 9,000. Selection: "
        f"learning rate and steps by the accuracy on a stream of the {args.validation_images} validation images of "
        f"{', '.join(args.select_on)}, seed {SELECTION_SEED}, which online begins again until it is as long as "
        "the test stream; for each method, mode and target; nothing was selected on test images."
    )
    compared = (
        "Points above no adaptation on the same images, ± half the 95% interval of the mean difference. The images of "
        "an online stream are not independent, so its interval is too short."
    )
    names = ["method", "mode", "target"]
    columns = ["optimizer", "lr", "steps", "ms per image", "skipped", "collapsed streams"]
    tables = [
        TextTable([*names, *args.corruption], accuracies, caption),
        TextTable([*names, *args.corruption], gains, compared),
        TextTable([*names, *columns], costs, f"Time: {time_of}."),
    ]
    for table in tables:
        table.show()
    if args.markdown:
        text = "\n".join(table.markdown() for table in tables)
        Path(args.markdown).write_text(text.rstrip() + "\n", encoding="utf-8")
    if args.figure:
        plot(args, cells)


def plot(args: argparse.Namespace, cells: dict[Row, dict[str, list[Run]]]) -> None:
    """Gain over no adaptation in right predictions so far (compare the paper's Figure 4, right)."""
    from matplotlib.figure import Figure

    def so_far(runs: list[Run]) -> Tensor:
        return torch.tensor([[int(x) for x in run.result["right"]] for run in runs]).float().mean(0).cumsum(0)

    figure = Figure(figsize=(4 * len(args.corruption), 4), layout="constrained")
    base, panels = cells[("none", "none", "none")], figure.subplots(1, len(args.corruption), squeeze=False)[0]
    for axes, corruption in zip(panels, args.corruption, strict=True):
        for row, found in cells.items():
            if row[0] != "none" and found[corruption] and base[corruption]:
                right = so_far(found[corruption])
                gained = right - so_far(base[corruption])[: len(right)]
                axes.plot(range(1, len(right) + 1), gained, label=" ".join((row[0], row[2], row[1])))
        axes.set(xlabel="images of the stream", ylabel="right predictions gained so far", title=corruption)
        axes.axhline(0, linestyle=":", color="black")
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize="small")
    figure.savefig(args.figure, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--network", choices=list(NETWORKS), default="resnet26")
    add("--models", help="folder with the networks' weights (default: PEFT_SURGICAL_SHARED)")
    add("--data", help="folder of <corruption>.parquet or of the published .npy files")
    add("--seeds", type=int, nargs="+", default=[0], help="seed 0 also chooses among candidates")
    add("--output", default="outputs/memo", help="what is left there (default: outputs/memo)")
    add("--ledger", help="finished runs, may be shared by processes (default: OUTPUT/ledger.jsonl)")
    add("--shard", default="1/1", help="i/n: only the i-th of n parts of the grid")
    add("--threads", type=int, help="torch threads; 1 where several processes share the machine")
    add("--table", action="store_true", help="only draw from the ledger, train nothing")
    add("--markdown", help="also write the table to this file")
    add("--corruption", nargs="+", help="default: all in the folder, those of the paper's table first")
    add("--severity", type=int, default=5, choices=range(1, 6), help="of .npy files")
    add("--method", nargs="+", default=["none", "memo"], choices=["none", "bn", "memo", "tent"])
    add("--target", nargs="+", default=TARGETS, help="for MEMO: any target text")
    add("--tent-target", nargs="+", default=["norm"], help="norm for all scales and shifts, or any target text")
    add("--mode", nargs="+", default=["online", "episodic"], choices=["online", "episodic"])
    add("--lr", type=float, nargs="+", default=[1e-5, 1e-4, 1e-3, 1e-2], help="candidates of MEMO online (SGD)")
    episodic = [1e-4, 1e-3, 1e-2, 1e-1]
    add("--episodic-lr", type=float, nargs="+", default=episodic, help="candidates of MEMO episodic (AdamW)")
    add("--head-lr", type=float, nargs="+", default=[1e-3, 1e-2, 1e-1], help="candidates where the head alone moves")
    add("--tent-lr", type=float, nargs="+", default=[1e-4, 1e-3, 1e-2], help="candidates of TENT (Adam)")
    add("--steps", type=int, nargs="+", default=[1], help="candidates; the paper has 1 and 2")
    add("--views", type=int, default=32)
    add("--batch-size", type=int, default=100, help="of TENT and of batch statistics alone")
    add("--images", type=int, default=800, help="in a stream; above 800 also the 1,000 that other recipes tune on")
    add("--episodic-images", type=int, help="the same for episodic streams (default: as --images)")
    add("--validation-images", type=int, default=200)
    chooses = "the corruptions whose validation images choose rate and steps, by the mean accuracy of their streams"
    add("--select-on", nargs="+", default=["gaussian_noise"], help=chooses)
    add("--streams-at-once", action="store_true", help="all MEMO streams of a target and mode together, for a GPU")
    add("--device", help="for --streams-at-once; default: cuda where there is one")
    add("--eager", action="store_true", help="with --streams-at-once: no CUDA graph of a step")
    add("--width", type=int, default=32, help="with --streams-at-once: images of an episodic batch")
    add("--figure", help="also draw the streams into this file")
    args = parser.parse_args(argv)
    if not args.data and not args.table:
        parser.error("--data is needed to train; without it --table draws what the ledger holds")
    shard = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", args.shard)
    if not shard or int(shard[1]) > int(shard[2]):
        parser.error(f"--shard {args.shard}: write i/n with i from 1 to n, such as 1/2 and 2/2")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.episodic_images = args.episodic_images or args.images
    ledger = Ledger(args.ledger or Path(args.output, "ledger.jsonl"))
    there = corruptions_in(args.data) if args.data else sorted({run.key["corruption"] for run in ledger})
    args.corruption = args.corruption or sorted(set(there) - {"clean"}, key=[*LISTED, *there].index)
    if args.streams_at_once and not args.table:
        at_once(args, ledger)
        args.table = True
    cells = [(corruption, row) for corruption in args.corruption for row in rows_of(args)]
    for corruption, row in [] if args.table else cells[int(shard[1]) - 1 :: int(shard[2])]:
        runs_of(args, ledger, row, corruption)
    args.table = True
    show(args, ledger)


if __name__ == "__main__":
    sys.exit(run_in_words(main))
