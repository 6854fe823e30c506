"""What this package costs and saves on a CPU, row by row, in one JSON file, and its table and figure.

::

    python benchmarks/bench.py                                   # all rows, about half an hour on two idle cores
    python benchmarks/bench.py --only prefix step                # jobs whose names begin so
    python benchmarks/bench.py --from-json docs/results/bench.json --markdown docs/results/bench.md \
        --figure docs/results/bench.png                          # measures nothing

A *job* measures one thing with the functions of `prefix`, `step`, `many_adapters`, `scores` and `stacked`, and gives
one row or several. The file is written after every job; a job that is there already is not repeated (``--again`` does),
so that a run that was stopped goes on. What is compared takes turns in one process. A figure is the median of ratios
within a turn, with the distribution-free 95% interval between two order statistics, which needs six turns: rows with
fewer say so. ``--full`` takes 1,000 images of 224 px everywhere, which is hours.

Networks have random weights, and images are noise, which changes no time.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
import math
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import many_adapters
import prefix
import scores
import stacked
import step
import timm
import torch
import torch.nn.functional as F
from gpu import versions
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from peft_surgical import SurgicalConfig
from peft_surgical.evaluation import Interval, TextTable
from peft_surgical.folders import write_atomically
from peft_surgical.keys import WEIGHTS
from peft_surgical.prefix.storage import FeatureStore, Layout
from peft_surgical.training.fitting import FitSettings
from peft_surgical.tuner.attach import surgical_layers

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]
PREFIX = (  # network, target, images, pixels, batch size, pairs, uncached epochs
    ("resnet26", "head", 1000, 32, 64, 6, 3),
    ("resnet26", "block3", 1000, 32, 64, 3, 3),
    (prefix.LITE0, "head", 100, 224, 16, 1, 3),
    (prefix.LITE0, "block7", 100, 224, 16, 1, 3),
    (prefix.LITE0, "block6", 100, 224, 16, 1, 3),
    (prefix.LITE0, "block5", 100, 224, 16, 1, 3),
    (prefix.VIT, "last1", 100, 96, 16, 1, 3),
    (prefix.VIT, "last4", 100, 96, 16, 1, 3),
)
SWEEPS = (("resnet26", 200, 32, 64), (prefix.LITE0, 200, 64, 16), ("vit_tiny_patch16_224", 100, 96, 16))
STEPS = (  # network, target, batch size, rounds
    ("resnet26", "block1", 64, 15),
    ("resnet26", "block2", 64, 15),
    ("resnet26", "head", 64, 15),
    ("resnet26", "all", 64, 15),
    ("resnet26", "all", 8, 15),
    ("resnet50", "block1", 16, 7),
    ("resnet50", "all", 16, 7),
    ("vit_b16", "block1", 4, 7),
)
ADAPTERS = (10, 100, 1000)
MIXED = (("resnet50", "block4", 64, 15), ("vit_base_patch16_224", "block12", 224, 6))
SUMS = (("resnet26", 32, 64), ("resnet50", 224, 2))
IMAGES = (100, 1000, 10_000, 100_000)


def row(
    what: str,
    value: Interval | Sequence[float | None] | float,
    n: int,
    most: float | None = None,
    *,
    unit: str = "",
    short: bool = False,
    limit: float | None = None,
) -> Row:
    """A line of the table.

    Args:
        what: Its name.
        value: A ratio or a number with its interval.
        n: Turns.
        most: The goal: at most so much.
        unit: Unit of the number, such as ``ms``; empty for a ratio.
        short: Whether the line is in the short table, too.
        limit: The least that could be reached, where that can be computed.
    """
    numbers = [value, None, None] if isinstance(value, float) else [*value]
    numbers = [x if x is not None and math.isfinite(x) else None for x in numbers]
    if numbers[2] is None:
        numbers[1] = None
    return {"what": what, "value": numbers, "n": n, "most": most, "unit": unit, "short": short, "limit": limit}


# --- jobs ---


def of_prefix(args: argparse.Namespace, case: Sequence[Any]) -> list[Row]:
    """A whole run of 15 epochs, cached / uncached, and cached / a feature cache written by hand."""
    network, target, count, pixels, size, pairs, uncached = case
    if args.full:
        count, pixels, size = 1000, 32 if network == "resnet26" else 224, 64
    epochs = 15
    if args.tiny:
        count, pixels, size, pairs, epochs, uncached = 24, 32, 8, 1, 2, 1
        network, target = (network, target) if network == "resnet26" else (prefix.TINY, "head")
    settings = FitSettings(lr=1e-3, epochs=epochs, batch_size=size, use_cpu=True)
    rows, make = noise(count, pixels), maker(network, pixels)
    found = prefix.measure(network, target, rows, settings, pairs, make, uncached)
    most = 0.12 if target == "head" else round(1.05 * found["limit"], 3)
    where = f"{network} {target}, {count} images at {pixels} px, {epochs} epochs"
    ratio, hand = (found["ratio"], found["low"], found["high"]), step.median_interval(found["over_hand"])
    short = (network, target) in (("resnet26", "head"), (prefix.LITE0, "block7"), (prefix.VIT, "last1"))
    return [
        row(f"{where}: cached / uncached", ratio, pairs, most, short=short, limit=found["limit"]),
        row(f"{where}: cached / cached by hand", hand, pairs, 1.05, short=short),
    ]


def of_sweep(args: argparse.Namespace, case: Sequence[Any]) -> list[Row]:
    """Cross-Val with two rates: shared features / run by run, uncached."""
    network, count, pixels, size = case
    if args.full:
        count, size = 1000, 64
    epochs = 15 if args.full else 5
    if args.tiny:
        network, count, pixels, size, epochs = prefix.TINY, 24, 32, 8, 1
    settings = FitSettings(lr=1e-3, epochs=epochs, batch_size=size, use_cpu=True)
    found = prefix.sweep(network, noise(count, pixels), settings, (1e-3, 1e-4), maker(network, pixels))
    what = f"Cross-Val on {network}, {len(found['shares'])} targets x 2 rates, {count} images at {pixels} px, "
    what += f"{epochs} epochs: "
    taken = {target: seconds["cached"] for target, seconds in found["by_target"].items()}
    most = round(1.05 * found["limit"], 3)
    return [
        row(f"{what}cached / uncached", found["ratio"], 1, most, short=True, limit=found["limit"]),
        row(f"{what}share of the cached search that the head's runs take", taken["head"] / sum(taken.values()), 1),
    ]


def of_step(args: argparse.Namespace, case: Sequence[Any]) -> list[Row]:
    """Training steps and forward passes / those of the network frozen by hand, and of PEFT's own methods."""
    network, target, size, rounds = case
    if args.tiny:
        network, size, rounds = "tiny_resnet", 2, 2
    methods = ["ours", "hand", *(["peft", "lora"] if target == "block1" or network == "resnet26" else [])]
    own = step.parse_arguments(["--rounds", str(rounds), "--seconds", "0", "--methods", *methods])
    entry = step.NETWORKS[network]
    key = {"network": network, "target": target, "side": entry.side, "batch_size": size}
    found = step.measure(own, key)
    where, late = f"{network} {target} at {entry.side} px, batch {size}", target == "all"
    most = 1.02 if not late else 1.03 if size >= 16 and entry.side == 224 else 1.05
    short = (network, target) in (("resnet26", "block1"), ("resnet50", "block1"), ("resnet50", "all"))
    rows = []
    for other, goal in (("hand", most), ("peft", None), ("lora", None)):
        ratio = step.ratio(found["training"], "ours", other)
        if ratio is not None:
            name = {"hand": "frozen by hand", "peft": "PEFT LNTuning", "lora": "PEFT LoRA r=8"}[other]
            rows.append(row(f"{where}: training step / {name}", ratio, rounds, goal, short=short and other == "hand"))
    ratio = step.ratio(found["inference"], "ours", "hand")
    assert ratio is not None
    rows.append(row(f"{where}: inference unmerged / base", ratio, rounds, None if late else 1.02))
    return rows


def of_adapters(args: argparse.Namespace, count: int) -> list[Row]:
    """Switching among many adapters, and loading one more."""
    words = ["--network", "test_resnet" if args.tiny else "resnet18", "--side", "32", "--batch-size", "2"]
    found = adapters(args, [*words, "--adapters", str(min(count, 3) if args.tiny else count)], 15)
    switch = step.Interval(*(1e3 * x for x in step.median_interval(found["set_adapter"])))
    loads, n = step.ratio(found, "load beside many", "load beside one"), len(found["set_adapter"])
    assert loads is not None
    short = count in (100, 1000)
    return [
        row(f"set_adapter among {count:,} (resnet18 block1)", switch, n, 1.0, unit="ms", short=short),
        row(f"load beside {count:,} / beside one", loads, n, 1.1, short=count == 100),
    ]


def of_mixed(args: argparse.Namespace, case: Sequence[Any]) -> list[Row]:
    """A mixed batch of 8 adapters of a late block / row by row."""
    network, target, side, rounds = case
    if args.tiny:
        network, target, side = "test_resnet", "block4", 32
    found = adapters(args, ["--network", network, "--target", target, "--side", str(side), "--adapters", "8"], rounds)
    ratio = step.ratio(found, "mixed", "one by one")
    assert ratio is not None
    what = f"mixed batch of 8 adapters of {target} of {network} / row by row"
    return [row(what, ratio, len(found["mixed"]), 0.9, short=True)]


def adapters(args: argparse.Namespace, words: Sequence[str], rounds: int) -> dict[str, list[float]]:
    """The seconds that `many_adapters` measures."""
    own = many_adapters.parse_arguments([*words, "--rounds", str(2 if args.tiny else rounds)])
    with tempfile.TemporaryDirectory() as root:
        found: dict[str, list[float]] = many_adapters.measure(own, Path(root))["seconds"]
    return found


def of_loading(args: argparse.Namespace, target: str) -> list[Row]:
    """An adapter of 50 MB and more, with all checks / the same bytes by ``load_file``."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet" if args.tiny else "resnet50").eval()
    rounds = 2 if args.tiny else 15
    with tempfile.TemporaryDirectory() as root:
        first, other = many_adapters.save_adapters(network, target, 2, Path(root))
        model = PeftModel.from_pretrained(network, first)
        size = Path(other, WEIGHTS).stat().st_size
        calls: dict[str, Callable[[], Any]] = {
            "ours": lambda: model.load_adapter(other, "further"),
            "load_file": lambda: {name: value.clone() for name, value in load_file(Path(other, WEIGHTS)).items()},
            "hash": lambda: hashlib.sha256(Path(other, WEIGHTS).read_bytes()).digest(),
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(rounds + 1):
            for name in calls if number % 2 else reversed(calls):
                taken = many_adapters.timed(calls[name], lambda: None)
                if number:  # the first warms up
                    seconds[name].append(taken)
            model.delete_adapter("further")
    ratio, hashed = step.ratio(seconds, "ours", "load_file"), step.ratio(seconds, "hash", "load_file")
    assert ratio is not None
    assert hashed is not None
    what = f"load of an adapter of {size / 1e6:.0f} MB / load_file of it"
    return [row(what, ratio, rounds, 2.0, short=True, limit=1 + hashed.value)]


def of_scores(args: argparse.Namespace, inputs: int) -> list[Row]:
    """SNR / a loop of per-sample backward passes, and its memory."""
    words = ["--rounds", "2", "--network", "test_resnet"] if args.tiny else ["--rounds", "8"]
    own = scores.parse_arguments([*words, "--inputs", str(8 if args.tiny else inputs)])
    found, what = scores.measure(own), f"snr of {own.inputs} inputs of {own.network}"
    memory = found["memory"]["score"] / found["memory"]["batch"]
    least = found["ratio"][0] / found["over_batch"][0]  # one backward pass of all inputs together / the loop
    return [
        row(f"{what} / a loop of backward passes", found["ratio"], found["n"], 0.1, short=True, limit=least),
        row(f"{what}: peak memory / of one backward pass", float(memory), 1, 4.0, short=True),
    ]


def of_stacked(args: argparse.Namespace, case: Sequence[Any]) -> list[Row]:
    """Nine candidates of a target as one batched job / one by one."""
    network, target, count, pixels, epochs = case
    if args.tiny:
        network, target, count, pixels, epochs = "resnet26", "head", 20, 32, 1
    rounds = 2 if args.tiny else 6
    found = stacked.cell(network, target, count, pixels, epochs, rounds)
    where = f"{found['candidates']} candidates of {network} {target}"
    rest = found["fit"] - found["seconds"]["one by one"] / found["candidates"]
    return [
        row(f"{where}: stacked / one by one, the loop alone", found["ratio"], rounds),
        row(f"{where}: largest difference of deltas between the two", found["apart"], 1),
        row(f"{where}: share of a run that is no step of the loop", rest / found["fit"], 1),
    ]


def of_sums(args: argparse.Namespace, case: Sequence[Any]) -> list[Row]:
    """What tuning all adds to a step: the sums base + delta and their backward, as they are and as one fused sum.

    In CPU time of all threads, which what else the machine does hardly changes.
    """
    network, side, size = case
    size = 2 if args.tiny else size
    torch.manual_seed(0)
    base = step.ResNet26() if network == "resnet26" else timm.create_model("test_resnet" if args.tiny else network)
    images, labels = torch.randn(size, 3, side, side), torch.arange(size) % 10
    plain = copy.deepcopy(base)
    model = get_peft_model(base, SurgicalConfig(target="all"))
    sites = [(layer, key) for _, layer in surgical_layers(model) for key in layer.keys_of("default")]
    read = [next(layer.sites(key)) for layer, key in sites]
    bases = [layer.base_tensor(key) for layer, key in sites]
    deltas = [layer.delta("default", key) for layer, key in sites]
    grads = [torch.ones_like(one) for one in bases]

    def backward(sums: Sequence[Tensor]) -> None:
        torch.autograd.grad(sums, deltas, grads)

    def step_of(network: Any) -> None:
        network.zero_grad()
        F.cross_entropy(network(images), labels).backward()

    calls: dict[str, Callable[[], None]] = {
        "hand": lambda: step_of(plain),
        "ours": lambda: step_of(model),
        "reads": lambda: backward([getattr(module, name) for module, name in read]),
        "sums": lambda: backward([torch.add(one, delta) for one, delta in zip(bases, deltas, strict=True)]),
        "fused": lambda: backward(torch._foreach_add(bases, deltas)),
    }
    rounds = 2 if args.tiny else 15
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in calls if number % 2 else reversed(calls):
            begun = time.process_time()
            calls[name]()
            if number:  # the first warms up
                seconds[name].append(time.process_time() - begun)
    named = {"ours": "forward and backward", "reads": "reading base + delta, and the backward of it"}
    named |= {"sums": "the sums alone, and theirs", "fused": "one fused sum of all tensors, and its own"}
    where = f"{network} all at {side} px, batch {size}, CPU time"
    ratios = {kind: step.ratio(seconds, kind, "hand") for kind in named}
    end = "forward and backward frozen by hand"
    return [row(f"{where}: {named[kind]} / {end}", ratio, rounds) for kind, ratio in ratios.items() if ratio]


def of_images(args: argparse.Namespace, place: str) -> list[Row]:
    """Looking up a batch of 64 images' features among ever more, in memory and in files."""
    layout, rows = Layout((1280,), torch.float32, (0,)), []
    for count in IMAGES[:2] if args.tiny else IMAGES:
        store = FeatureStore(memory=0 if place == "files" else 2**31)

        def fill(made: Sequence[Tensor]) -> None:
            for part in made[0].split(4096):
                part.copy_(torch.randn(part.shape))

        (features,) = store.features("key", [layout], count, fill)
        draw, taken = torch.Generator().manual_seed(0), []
        for _ in range(50):
            chosen = torch.randint(count, (64,), generator=draw)
            taken.append(1e3 * many_adapters.timed(lambda c=chosen, f=features: f.index_select(0, c), lambda: None))
        what = f"features of 64 of {count:,} images (1,280 numbers each) from {place}"
        rows.append(row(what, step.median_interval(taken[10:]), 40, unit="ms"))
    return rows


def noise(count: int, pixels: int) -> tuple[prefix.Images, prefix.Images]:
    """Images to tune on, and a fifth as many to validate."""
    images, labels = prefix.images_of("", None, count + count // 5, pixels)
    return prefix.Images(images[:count], labels[:count]), prefix.Images(images[count:], labels[count:])


def maker(network: str, pixels: int) -> Callable[[], Any]:
    """Copies of one network with random weights, for images of this size."""
    size = {"img_size": pixels} if network.startswith("vit") else {}
    torch.manual_seed(0)
    base = step.ResNet26() if network == "resnet26" else timm.create_model(network, **size)
    return functools.partial(copy.deepcopy, base.eval())


def jobs(args: argparse.Namespace) -> dict[str, Callable[[argparse.Namespace], list[Row]]]:
    """Name -> what measures it."""
    found: dict[str, Callable[[argparse.Namespace], list[Row]]] = {}
    for case in PREFIX[:3] if args.tiny else PREFIX:
        found[f"prefix {case[0]} {case[1]}"] = functools.partial(of_prefix, case=case)
    for sweep in SWEEPS[:1] if args.tiny else SWEEPS:
        found[f"sweep {sweep[0]}"] = functools.partial(of_sweep, case=sweep)
    for one in STEPS[:4] if args.tiny else STEPS:
        found[f"step {one[0]} {one[1]} {one[2]}"] = functools.partial(of_step, case=one)
    for count in ADAPTERS:
        found[f"adapters {count}"] = functools.partial(of_adapters, count=count)
    for mixed in MIXED:
        found[f"mixed {mixed[0]}"] = functools.partial(of_mixed, case=mixed)
    found["loading"] = functools.partial(of_loading, target="block4")
    found["scores"] = functools.partial(of_scores, inputs=64)
    for sums in SUMS:
        found[f"sums {sums[0]}"] = functools.partial(of_sums, case=sums)
    for cell in stacked.CELLS[:1] if args.tiny else stacked.CELLS:
        found[f"stacked {cell[0]} {cell[1]}"] = functools.partial(of_stacked, case=cell)
    for place in ("memory", "files"):
        found[f"images {place}"] = functools.partial(of_images, place=place)
    return found


# --- the file ---


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Do the jobs that are asked for and not there yet, and write the file after each."""
    file = Path(args.json)
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"jobs": {}}
    report |= {"versions": versions(), "full": args.full, "tiny": args.tiny}
    for name, work in jobs(args).items():
        known = report["jobs"].get(name, {})
        if not any(name.startswith(word) for word in args.only) or ("rows" in known and not args.again):
            continue
        begun, load = time.perf_counter(), os.getloadavg()[0]
        try:
            found: dict[str, Any] = {"rows": work(args)}
        except (Exception, SystemExit) as error:
            found = {"error": "".join(traceback.format_exception(error)[-2:]).strip()[-2000:]}
        took = round(time.perf_counter() - begun, 1)
        report["jobs"][name] = {**found, "took": took, "load_before": round(load, 2), "machine": step.machine("cpu")}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(report, indent=1) + "\n")
        print(f"{name}: {found.get('error', 'done').splitlines()[-1]}, {took} s", flush=True)
    return report


# --- table and figure ---


GROUPS = (
    ("prefix", "sweep"),
    ("step",),
    ("sums",),
    ("adapters", "mixed", "loading"),
    ("scores",),
    ("stacked",),
    ("images",),
)
"""The jobs of each table behind the short one, by the beginnings of their names."""


def measured(report: Mapping[str, Any], words: Sequence[str] = ("",)) -> list[Row]:
    """All rows of jobs whose names begin so, in the order of the jobs."""
    order = [*jobs(argparse.Namespace(tiny=False))]
    names = sorted(report["jobs"], key=lambda name: order.index(name) if name in order else len(order))
    found = [report["jobs"][name].get("rows", ()) for name in names if name.startswith(tuple(words))]
    return [one for rows in found for one in rows]


def cells(one: Row) -> list[str]:
    """A row as texts."""
    value, low, high = one["value"]
    unit = f" {one['unit']}" if one["unit"] else ""
    ends = "-" if low is None else f"{low:.3g} to {high:.3g}"
    limit = "-" if one["limit"] is None else f"{one['limit']:.3g}"
    goal = "-" if one["most"] is None else f"{one['most']:.3g}{unit}: {'met' if value <= one['most'] else 'missed'}"
    return [one["what"], f"{value:.3g}{unit}", ends, str(one["n"]), limit, goal]


def tables(report: Mapping[str, Any]) -> str:
    """The short table, one for each of `GROUPS`, and what failed, as Markdown."""
    header = ["what", "figure", "95% interval", "n", "limit", "goal, at most"]
    seen = {json.dumps(job["machine"], sort_keys=True) for job in report["jobs"].values()}
    machines = "; ".join(
        f"{one['cpu']}, {one['threads']} of {one['cores']} cores" for one in map(json.loads, sorted(seen))
    )
    loads = [job["load_before"] for job in report["jobs"].values()] or [0.0]
    caption = (
        f"{machines}, load average before a job {min(loads):.1f} to {max(loads):.1f}; float32; "
        f"{', '.join(f'{name} {v}' for name, v in report['versions'].items())}. Medians over n turns; the interval "
        "needs six. Limit: the least that could be, by floating-point operations, and the goal beside it is 5% more; "
        "of a load, load_file and one SHA-256 of the same bytes; of snr, one backward pass of all inputs together. "
        "Uncached runs were trained for 3 of their 15 epochs, and the time of the epochs multiplied."
    )
    short = [one for one in measured(report) if one["short"]]
    text = "".join(
        TextTable(header, [cells(one) for one in rows], "").markdown().rstrip() + "\n\n"
        for rows in (short, *(measured(report, words) for words in GROUPS))
    )
    text += f"{caption}\n"
    failed = {name: job["error"].splitlines()[-1] for name, job in report["jobs"].items() if "error" in job}
    return text + "".join(f"- {name}: failed, {why}\n" for name, why in failed.items())


def draw(report: Mapping[str, Any], file: str) -> None:
    """Figures beside their goals; at the right, how the cost grows."""
    from matplotlib.figure import Figure

    rows = [one for one in measured(report) if one["most"] is not None and not one["unit"]]
    figure = Figure(figsize=(13, 1.5 + 0.22 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    for place, one in enumerate(rows):
        value, low, high = one["value"]
        colour = "tab:green" if value <= one["most"] else "tab:red"
        error = None if low is None else [[value - low], [high - value]]
        left.errorbar(value, place, xerr=error, marker="o", capsize=2, color=colour)
        left.plot(one["most"], place, marker="|", markersize=12, color="black")
    left.set_yticks(range(len(rows)), [one["what"] for one in rows], fontsize=6)
    left.invert_yaxis()
    left.set(xscale="log", xlabel="ratio (black: the goal; green: met)")
    for prefixed, label in (("set_adapter among ", "set_adapter, by adapters"), *LOOKUPS):
        points = [(number_in(one["what"]), one["value"][0]) for one in measured(report) if matches(one, prefixed)]
        if points:
            right.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    right.set(xscale="log", yscale="log", xlabel="adapters or images", ylabel="ms", title="how cost grows")
    if right.get_legend_handles_labels()[0]:
        right.legend(fontsize=7)
    figure.savefig(file, dpi=110)


LOOKUPS = tuple((f"features of 64 of |{place}", f"64 images from {place}, by images") for place in ("memory", "files"))


def matches(one: Row, words: str) -> bool:
    """Whether a row begins, and ends, with these words."""
    begin, _, end = words.partition("|")
    return bool(one["what"].startswith(begin) and one["what"].endswith(end))


def number_in(what: str) -> int:
    """The last whole number before a bracket or ``images`` in the name of a row."""
    words = what.replace(",", "").split(" (")[0].split()
    return int([word for word in words if word.isdigit()][-1])


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", default=[""], metavar="WORD", help="jobs whose names begin so; default: all")
    add("--again", action="store_true", help="also those that are in the file")
    add("--threads", type=int, help="torch threads (default: torch's own choice)")
    add("--full", action="store_true", help="1,000 images of 224 px everywhere: hours")
    add("--tiny", action="store_true", help="tiny networks, few rounds: to see that it runs")
    add("--json", default="docs/results/bench.json")
    add("--markdown", help="also write the tables to this file")
    add("--figure", help="also draw the figure to this file")
    add("--from-json", metavar="FILE", help="measure nothing, draw what is in this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    report = json.loads(Path(args.from_json).read_text(encoding="utf-8")) if args.from_json else run(args)
    if args.markdown:
        Path(args.markdown).write_text(tables(report), encoding="utf-8")
    if args.figure:
        draw(report, args.figure)


if __name__ == "__main__":
    main()
