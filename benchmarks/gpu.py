"""Everything that needs a GPU, in one run of a few minutes that leaves one JSON file.

::

    python benchmarks/gpu.py                                     # one GPU, about three minutes, no network
    python benchmarks/gpu.py --tiny --device cpu                 # does it run? seconds, on any machine
    python benchmarks/gpu.py --from-json docs/results/gpu.json --markdown docs/results/gpu.md

Networks have random weights, which changes no speed. A section that fails leaves its error and the next one begins; one
for which ``--minutes`` leave no time says so; the file is written after every section, and one that is there already
keeps the sections that are not run again. Times are those of `step` and `many_adapters`: the device is waited for
before and after, methods take turns in one process after a warm-up, and a ratio is the median over rounds with the
distribution-free 95% interval between two order statistics. ``--repeat`` calls in a row count as one, so that the GPU
works while the CPU prepares the next.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import many_adapters
import scores
import step
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch.utils.data import DataLoader, TensorDataset

from peft_surgical import SurgicalConfig
from peft_surgical.evaluation import TextTable
from peft_surgical.folders import write_atomically

ROOT = Path(__file__).parents[1]
PACKAGES = ("peft-surgical", "peft", "torch", "timm", "transformers", "accelerate", "safetensors")
CELLS = {"vit": ("block1", "last1", "head", "all"), "resnet": ("block1", "head", "all")}
BF16 = {"dtype": "bfloat16", "lr": 1e-4}
LAUNCH_LIMIT = 150  # seconds


class Section:
    """One thing to measure: its name, seconds on an H100 as estimated, and a function of the arguments."""

    def __init__(self, name: str, seconds: float, work: Callable[[argparse.Namespace], Any]) -> None:
        self.name, self.seconds, self.work = name, seconds, work


# --- sections ---


def step_arguments(args: argparse.Namespace, **changed: Any) -> argparse.Namespace:
    """The arguments of `step` for this machine."""
    found = step.parse_arguments(["--device", args.device, "--methods", "ours", "hand", "cache"])
    found.seconds, found.rounds, found.repeat = 0.0, args.rounds, args.repeat
    for name, value in changed.items():
        setattr(found, name, value)
    return found


def training(
    args: argparse.Namespace, network: str, target: str, ready: Callable[[], object] = lambda: None, **changed: Any
) -> dict[str, Any]:
    """Steps and forwards of one cell: ratios, images per second, peak memory."""
    own = step_arguments(args, **changed)
    if target == "last1":  # by its number, for which `step.suffix` is written
        target = "block6" if args.tiny else "block12"
    entry = step.NETWORKS[network]
    key = {"network": network, "target": target, "side": entry.side, "batch_size": args.batch_size}
    if args.device.startswith("cuda"):
        torch.cuda.empty_cache()
    found = step.measure(own, key, ready)
    result: dict[str, Any] = {**key, "same": found["same"], "trained": found["trained"], "memory": found["memory"]}
    result["losses"] = found["losses"]
    result["prepared"] = found["prepared"]
    for phase in ("training", "inference"):
        if phase in found:
            result[phase] = compared(found[phase], "hand", args.batch_size)
    return result


def compared(seconds: Mapping[str, list[float]], base: str, images: int) -> dict[str, Any]:
    """Method -> milliseconds, images per second, and the ratio to ``base``, each with its interval."""
    found = {}
    for name, values in seconds.items():
        median, ratio = step.median_interval(values), step.ratio(dict(seconds), name, base)
        assert ratio is not None
        found[name] = {
            "ms": numbers(median, 1e3),
            "images_per_second": images / median.value,
            f"over_{base}": numbers(ratio),
            "n": len(values),
        }
    return found


def numbers(interval: step.Interval | None, factor: float = 1.0) -> list[float | None] | None:
    """An interval as JSON has it, where infinity is null."""
    return None if interval is None else [factor * value if math.isfinite(value) else None for value in interval]


def adapters(args: argparse.Namespace) -> dict[str, Any]:
    """Memory, loading, switching and mixed batches among many adapters of a ResNet-50's first block."""
    words = ["--network", "test_resnet" if args.tiny else "resnet50", "--device", args.device]
    words += ["--adapters", str(args.adapters), "--rounds", str(args.rounds), "--side", "32" if args.tiny else "224"]
    with tempfile.TemporaryDirectory() as root:
        return summed(many_adapters.measure(many_adapters.parse_arguments(words), Path(root)))


def mixed(args: argparse.Namespace, network: str, target: str, side: int) -> dict[str, Any]:
    """Mixed batches of 8 adapters of a late block, a row each, against row by row."""
    words = ["--network", network, "--target", target, "--device", args.device, "--adapters", "8"]
    words += ["--rounds", str(args.rounds), "--side", str(side), "--batch-size", "8"]
    with tempfile.TemporaryDirectory() as root:
        return summed(many_adapters.measure(many_adapters.parse_arguments(words), Path(root)))


def summed(result: dict[str, Any]) -> dict[str, Any]:
    """A result of `many_adapters`, its times as medians with intervals."""
    times = {name: step.median_interval(values) for name, values in result["seconds"].items()}
    found = {name: numbers(median, 1e3) for name, median in times.items()}
    rows = dict(result["seconds"])
    ratio = step.ratio(rows, "mixed", "one by one")
    loads = step.ratio(rows, "load beside many", "load beside one")
    return {
        **{name: value for name, value in result.items() if name != "seconds"},
        "ms": found,
        "n": {name: len(values) for name, values in result["seconds"].items()},
        "mixed_over_one_by_one": numbers(ratio),
        "load_beside_many_over_one": numbers(loads),
    }


def prefix(args: argparse.Namespace, network: str, target: str) -> dict[str, Any]:
    """Epochs of training with the frozen prefix computed once (that pass included) over the same epochs without."""
    try:
        from peft_surgical import CachedPrefix
    except ImportError:
        return {"skipped": "this version of the package has no CachedPrefix"}
    entry, device = step.NETWORKS[network], torch.device(args.device)
    epochs, count = (2, 4) if args.tiny else (15, 8 * args.batch_size)
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, entry.side, entry.side, generator=draw)
    rows = TensorDataset(images, torch.randint(0, 10, (count,), generator=draw))
    base = entry.build()
    seconds: dict[str, list[float]] = {"cached": [], "uncached": []}
    losses, said = {}, ""
    for _ in range(3):  # the first round warms up
        for name, taken in seconds.items():
            model = step.hold_statistics(get_peft_model(copy.deepcopy(base), SurgicalConfig(target=target))).to(device)
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
            synchronize(device)
            start = time.perf_counter()
            off = "not asked for" if name == "uncached" else None
            with CachedPrefix(model, rows, batch_size=args.batch_size, autocast=torch.bfloat16, off=off) as cached:
                for _epoch in range(epochs):
                    for x, y in DataLoader(cached.dataset, args.batch_size):
                        with torch.autocast(device.type, dtype=torch.bfloat16):
                            loss = F.cross_entropy(model(x.to(device)).float(), y.to(device))
                        loss.backward()
                        optimizer.step()
                        optimizer.zero_grad()
                synchronize(device)
                taken.append(time.perf_counter() - start)
                said = str(cached) if name == "cached" else said
            losses[name] = float(loss.detach())
    timed = {name: values[1:] for name, values in seconds.items()}
    ratios = [a / b for a, b in zip(timed["cached"], timed["uncached"], strict=True)]
    return {
        "network": network,
        "target": target,
        "images": count,
        "epochs": epochs,
        "prefix": said,
        "seconds": timed,
        "losses": losses,
        "cached_over_uncached": numbers(step.median_interval(ratios)),
    }


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def snr(args: argparse.Namespace) -> dict[str, Any]:
    """The snr score of a ResNet-50's first block against a loop of backward passes, an input each."""
    words = ["--network", "test_resnet" if args.tiny else "resnet50", "--device", args.device]
    words += ["--inputs", "4" if args.tiny else "64", "--side", "32" if args.tiny else "224"]
    found = scores.measure(scores.parse_arguments([*words, "--rounds", str(max(2, args.rounds // 2))]))
    return found | {name: numbers(step.Interval(*found[name])) for name in ("ratio", "over_batch")}


def start_launch(args: argparse.Namespace, root: Path) -> subprocess.Popen[bytes]:
    """Begin ``accelerate launch`` of the Waterbirds recipe on a miniature copy of its data, in its own process."""
    sys.path.insert(0, str(ROOT / "tests"))
    import miniatures

    split = {"train": (40, 4, 4, 16), "validation": (14, 14, 10, 10), "test": (12, 12, 8, 8)}
    miniatures.waterbirds_folder(root, miniatures.grouped_rows(split), shade=60)
    miniatures.tiny_resnet(root / "resnet")
    config = "one_gpu.yaml" if args.device.startswith("cuda") else None
    command = [sys.executable, "-m", "accelerate.commands.launch", *(["--cpu"] if config is None else [])]
    command += [] if config is None else ["--config_file", str(ROOT / "recipes" / "accelerate" / config)]
    command += [str(ROOT / "recipes" / "waterbirds.py"), "--data", str(root), "--model", str(root / "resnet")]
    command += ["--output", str(root / "out"), "--seeds", "0", "--epochs", "2", "--source-epochs", "1", "--lr", "1e-2"]
    command += ["--head-lr", "1e-1", "--batch-size", "16", "--tuning-images", "16", "--target", "block1"]
    command += ["--cpu"] if config is None else ["--precision", "bf16"]
    own = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "home"), "OMP_NUM_THREADS": "1"}
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, **own, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with Path(root, "log").open("w") as log:  # not a pipe, which nobody would empty meanwhile
        return subprocess.Popen(command, env=variables, cwd=root, stdout=log, stderr=subprocess.STDOUT)


class Launch:
    """A recipe under ``accelerate launch`` on one GPU, from reading the images to the table, beside other work."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.seconds = 0.0

    def start(self, args: argparse.Namespace) -> None:
        """Begin, in a folder of its own."""
        self.folder = tempfile.TemporaryDirectory()
        self.begin = time.perf_counter()
        self.process = start_launch(args, Path(self.folder.name))

    def wait(self) -> None:
        """Until it is done, so that it takes no time from what is measured next."""
        if self.process is not None and not self.seconds:
            try:
                self.process.wait(timeout=LAUNCH_LIMIT)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.seconds = round(time.perf_counter() - self.begin, 1)

    def result(self, args: argparse.Namespace) -> dict[str, Any]:
        """Its seconds and its table; a RuntimeError with its output if it failed."""
        if self.process is None:
            self.start(args)
        self.wait()
        assert self.process is not None
        with self.folder as root:
            if self.process.returncode:
                output = Path(root, "log").read_text(encoding="utf-8", errors="replace")
                raise RuntimeError(f"exit code {self.process.returncode} after {self.seconds} s: {output[-3000:]}")
            table = Path(root, "out", "table.md").read_text(encoding="utf-8")
            there = Path(root, "out", "adapter", "adapter_model.safetensors").is_file()
        return {"seconds": self.seconds, "adapter": there, "table": table}


def sections(args: argparse.Namespace) -> list[Section]:
    """All of them, the most wanted first."""
    networks = {"vit": "tiny_vit", "resnet": "tiny_resnet"} if args.tiny else {"vit": "vit_b16", "resnet": "resnet50"}
    vit, resnet = networks.values()
    found = []
    for kind, targets in CELLS.items():
        for target in targets:
            how = {"autocast": True, "inference": target in ("block1", "last1"), "lr": 1e-4}
            work = functools.partial(training, network=networks[kind], target=target, **how)
            found.append(Section(f"autocast {networks[kind]} {target}", 9, work))
    found.append(Section("adapters", 30, adapters))
    late = [("vit_base_patch16_224", "block12", 224), ("resnet50", "block4", 224)]
    if args.tiny:
        late = [("test_vit", "block6", 160), ("test_resnet", "block4", 64)]
    for network, target, side in late:
        work = functools.partial(mixed, network=network, target=target, side=side)
        found.append(Section(f"mixed {network} {target}", 10, work))
    for target in ("head", "block6" if args.tiny else "block12"):
        found.append(Section(f"prefix {vit} {target}", 20, functools.partial(prefix, network=vit, target=target)))
    found.append(Section("snr", 10, snr))
    # Compiling keeps the CPU busy before anything is timed: the recipe runs meanwhile.
    launch = Launch()

    def compiled(args: argparse.Namespace, network: str) -> dict[str, Any]:
        if "launch" not in args.skip and launch.process is None:
            launch.start(args)
        how = {"autocast": True, "compile": True, "inference": False, "lr": 1e-4, "methods": ["ours", "hand"]}
        return training(args, network, "block1", ready=launch.wait, **how)

    found.append(Section(f"compile {vit} block1", 50, functools.partial(compiled, network=vit)))
    found.append(Section("launch", 0, launch.result))
    found.append(Section(f"bf16 {vit} block1", 9, functools.partial(training, network=vit, target="block1", **BF16)))
    found.append(Section(f"compile {resnet} block1", 70, functools.partial(compiled, network=resnet)))
    return found


# --- the file ---


def versions() -> dict[str, str]:
    """Installed packages; one that is run from its sources has none."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "from source"
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the sections that were asked for and write the file after each."""
    start, file = time.perf_counter(), Path(args.json)
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"sections": {}}
    report |= {"machine": step.machine(args.device), "versions": versions(), "minutes": args.minutes}
    report |= {"batch_size": args.batch_size, "rounds": args.rounds, "repeat": args.repeat, "tiny": args.tiny}
    for section in sections(args):
        if not any(section.name.startswith(word) for word in args.only) or section.name.startswith(tuple(args.skip)):
            continue
        used = time.perf_counter() - start
        begin = time.perf_counter()
        if used + section.seconds > 60 * args.minutes:
            report["sections"][section.name] = {"skipped": f"{used:.0f} s of {60 * args.minutes:.0f} s were used"}
        else:
            try:
                report["sections"][section.name] = section.work(args)
            except (Exception, SystemExit) as error:
                last = "".join(traceback.format_exception(error)[-2:])
                report["sections"][section.name] = {"error": last.strip()[-4000:]}
        report["sections"][section.name]["took"] = round(time.perf_counter() - begin, 1)
        report["seconds"] = round(time.perf_counter() - start, 1)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(report, indent=1) + "\n")
        said = report["sections"][section.name]
        word = said.get("error", said.get("skipped", "done")).splitlines()[-1]
        print(f"{report['seconds']:6.1f} s  {section.name}: {word}", flush=True)
    return report


# --- the table ---


def shown(found: Sequence[float | None] | None) -> str:
    return "-" if found is None else step.shown(step.Interval(*(math.inf if x is None else x for x in found)))


def tables(report: Mapping[str, Any]) -> str:
    """The sections as Markdown, with what failed or was left out."""
    rows, others, absent = [], [], []
    for name, found in report["sections"].items():
        if "error" in found or "skipped" in found:
            absent.append(f"{name}: {found.get('skipped') or 'failed, ' + found['error'].splitlines()[-1]}")
        elif "training" in found:
            ours, hand = found["training"]["ours"], found["training"]["hand"]
            cache, passes = found["training"].get("cache"), found.get("inference", {})
            rows.append([
                name.rpartition(" ")[0] + f" {found['target']}",
                shown(ours["over_hand"]),
                f"{ours['images_per_second']:,.0f}",
                f"{hand['images_per_second']:,.0f}",
                "-" if cache is None else shown(cache["over_hand"]),
                *(shown(passes[method]["over_hand"] if method in passes else None) for method in ("ours", "merged")),
                *(f"{found['memory'][method] / 1e9:.2f}" for method in ("ours", "hand")),
                str(ours["n"]),
            ])  # fmt: skip
        elif "ms" in found:
            others += [[f"{name}: {what}", *ms(times), str(found["n"][what])] for what, times in found["ms"].items()]
            for what in ("mixed_over_one_by_one", "load_beside_many_over_one"):
                if found.get(what) is not None:
                    others.append([f"{name}: {what.replace('_', ' ')}", shown(found[what]), "", ""])
        elif "cached_over_uncached" in found:
            what = f"{name}: cached / uncached, {found['epochs']} epochs"
            others.append([what, shown(found["cached_over_uncached"]), "", ""])
        elif "ratio" in found:
            others.append([f"{name}: over a loop, {found['inputs']} inputs", shown(found["ratio"]), "", ""])
        elif name == "launch":
            others.append(["accelerate launch of a recipe on a miniature", f"{found['seconds']} s", "", ""])
    header = ["cell", "step: ours / hand", "ours, images/s", "hand, images/s", "cache / hand", "forward: ours / hand"]
    header += ["merged / hand", "memory (GB): ours", "hand", "n"]
    place = report["machine"]["gpu"] or report["machine"]["cpu"]
    caption = (
        f"{place}; batches of {report['batch_size']}, {report['repeat']} calls in a row count as one; medians over "
        "interleaved rounds with 95% intervals. autocast: float32 weights under bfloat16 autocast; bf16: weights in "
        f"bfloat16. {', '.join(f'{name} {v}' for name, v in report['versions'].items())}."
    )
    text = TextTable(header, rows, caption).markdown() + "\n"
    note = "Times of this package in the same run; mixed batches have an adapter for each row."
    text += TextTable(["", "median", "95% interval", "n"], others, note).markdown() + "\n"
    return text + "".join(f"- {line}\n" for line in absent)


def ms(times: Sequence[float | None]) -> list[str]:
    return [f"{times[0]:.3g} ms", "too few rounds" if times[2] is None else f"{times[1]:.3g} to {times[2]:.3g}"]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cuda")
    add("--minutes", type=float, default=3, help="no section begins that would end later (default: 3)")
    add("--batch-size", type=int, help="default: 64, tiny: 2")
    add("--rounds", type=int, help="default: 12, tiny: 2")
    add("--repeat", type=int, help="calls in a row that count as one; default: 4, tiny: 1")
    add("--adapters", type=int, help="default: 100, tiny: 3")
    add("--only", nargs="+", default=[""], metavar="WORD", help="sections whose names begin so; default: all")
    add("--skip", nargs="+", default=[], metavar="WORD", help="sections to leave out")
    add("--tiny", action="store_true", help="tiny networks, few rounds: to see that it runs")
    add("--json", default="outputs/benchmarks/gpu.json")
    add("--markdown", help="also write the tables to this file")
    add("--from-json", metavar="FILE", help="measure nothing, draw the tables of this file")
    args = parser.parse_args(argv)
    usual = {"batch_size": (64, 2), "rounds": (12, 2), "repeat": (4, 1), "adapters": (100, 3)}
    for name, (full, tiny) in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, tiny if args.tiny else full)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    report = json.loads(Path(args.from_json).read_text(encoding="utf-8")) if args.from_json else run(args)
    if args.markdown:
        Path(args.markdown).write_text(tables(report), encoding="utf-8")


if __name__ == "__main__":
    main()
