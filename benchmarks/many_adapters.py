"""Many adapters on one base: what they cost in memory, to load, to switch between, and to serve in one batch.

::

    python benchmarks/many_adapters.py --threads 1                      # 100 adapters of block1 on a ResNet-50, minutes
    python benchmarks/many_adapters.py --adapters 10 --rounds 8 --markdown table.md

The network has random weights and the adapters random deltas, which changes no cost. Each adapter is saved, and loaded
by an `AdapterPool` that has room for all. Its output must equal, bit for bit, that of a plain copy of the network whose
tensors are overwritten; a mixed batch must equal these row by row, up to the rounding of another batch size. Then
rounds: every measurement once per round, on adapters drawn at random, so that what else the machine does hits all
alike. A number is the median with the distribution-free 95% interval between two order statistics.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from peft import PeftModel, get_peft_model
from step import machine, median_interval
from torch import Tensor, nn

from peft_surgical import SurgicalConfig
from peft_surgical.adapters.adapter import Adapter, read_adapter
from peft_surgical.adapters.pool import AdapterPool
from peft_surgical.errors import DataError
from peft_surgical.evaluation import Interval, TextTable

TOLERANCE = 1e-4  # of logits, relative to the largest: other batch sizes take other kernels


def save_adapters(network: nn.Module, target: str, count: int, root: Path) -> list[str]:
    """Folders of adapters with random deltas."""
    model = get_peft_model(copy.deepcopy(network), SurgicalConfig(target=target))
    first = read_adapter(model)
    folders = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        deltas = {
            name: 0.01 * torch.randn(delta.shape, generator=generator, dtype=delta.dtype)
            for name, delta in first.deltas.items()
        }
        folders.append(str(root / f"site{seed}"))
        Adapter(folders[-1], first.config, deltas, {}, {}).save(folders[-1])
    return folders


@torch.no_grad()
def plain_output(network: nn.Module, folder: str, images: Tensor) -> Tensor:
    """The output of a copy of the network, its tensors overwritten: one model per adapter."""
    own = copy.deepcopy(network)
    parameters = dict(own.named_parameters())
    for name, delta in read_adapter(folder).scaled().items():
        parameters[name].add_(delta.to(parameters[name].device))
    return own(images)


def tensor_bytes(network: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def timed(call: Callable[[], Any], wait: Callable[[], Any]) -> float:
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


@torch.no_grad()
def measure(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    device = torch.device(args.device)
    wait: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    network = timm.create_model(args.network).eval().to(device)
    images = torch.randn(args.batch_size, 3, args.side, args.side, generator=torch.Generator().manual_seed(1)).to(
        device
    )
    folders = save_adapters(network, args.target, args.adapters, root)
    plain = copy.deepcopy(network)
    own = {folder: plain_output(plain, folder, images) for folder in folders}

    before = tensor_bytes(network)
    pool = AdapterPool(network, budget_bytes=10**12)
    loads = []
    for folder in folders:

        def first_use(folder: str = folder) -> None:
            with pool.use(folder):
                pass

        loads.append(timed(first_use, wait))
    result: dict[str, Any] = {
        "base": before,
        "tuned": pool.state().bytes,
        "tensors": tensor_bytes(network),
        "files": sum(path.stat().st_size for path in root.rglob("*") if path.is_file()),
        "parameters": pool.state().bytes // args.adapters // 4,
    }
    equal = 0
    for folder in folders:
        with pool.use(folder) as model:
            equal += torch.equal(model(images), own[folder])
    if equal < len(folders) and device.type == "cpu":  # a GPU may take another kernel for the same sum
        raise DataError(f"{len(folders) - equal} of {len(folders)} adapters give another output than their own model")
    seconds, farthest = rounds(args, pool, plain, images, own, wait)
    if farthest > (TOLERANCE if device.type == "cpu" else 1e-2):  # a GPU's convolutions may round to TF32
        raise DataError(f"a mixed batch differs from one model per adapter by {farthest:.2g} of the largest logit")
    part = max(len(loads) // 5, 1)
    loading = {"load": loads, "first": loads[:part], "last": loads[-part:]}
    return {**result, "equal": equal, "farthest": farthest, "seconds": {**loading, **seconds}}


def rounds(
    args: argparse.Namespace,
    pool: AdapterPool,
    plain: nn.Module,
    images: Tensor,
    own: dict[str, Tensor],
    wait: Callable[[], Any],
) -> tuple[dict[str, list[float]], float]:
    """Seconds of every measurement in every round, and the largest error of a mixed batch."""
    draw, farthest = random.Random(0), 0.0
    few = PeftModel.from_pretrained(copy.deepcopy(plain), next(iter(own)), adapter_name="pooled")
    seconds: dict[str, list[float]] = {}
    for number in range(args.rounds + 2):
        one, other = draw.sample(list(own), 2)
        batch = draw.sample(list(own), min(len(images), len(own)))
        batch += [draw.choice(batch) for _ in range(len(images) - len(batch))]
        with pool.use(other) as model:
            names = [name for name in model.peft_config if name != model.active_adapter]

        def switch(folder: str = one) -> None:
            with pool.use(folder):
                pass

        def alone(folder: str = one) -> Tensor:
            with pool.use(folder) as used:
                return used(images)

        def together(batch: list[str] = batch) -> Tensor:
            with pool.mixed(batch) as used:
                return used(images)

        def one_by_one(batch: list[str] = batch) -> None:
            for row, folder in enumerate(batch):
                with pool.use(folder) as used:
                    used(images[row : row + 1])

        def base_and_back(model: PeftModel = model) -> None:
            with model.disable_adapter():
                pass

        def load(among: PeftModel, folder: str = one) -> None:
            among.load_adapter(folder, "further")

        calls: dict[str, Callable[[], Any]] = {
            "switch": switch,
            "set_scale": lambda model=model, name=names[0]: model.base_model.set_scale(name, 1.0),
            "disable_adapter": base_and_back,
            "load beside one": lambda: load(few),
            "load beside many": lambda model=model: load(model),
            "set_adapter": lambda model=model, name=names[0]: model.set_adapter(name, inference_mode=True),
            "alone": alone,
            "mixed": together,
            "one by one": one_by_one,
            "plain": lambda: plain(images),
        }
        for name in draw.sample(list(calls), len(calls)):
            taken = timed(calls[name], wait)
            if name.startswith("load"):
                (few if name == "load beside one" else model).delete_adapter("further")
            if number >= 2:  # the first two warm up
                seconds.setdefault(name, []).append(taken)
        found = together()
        for row, folder in enumerate(batch):
            scale = float(own[folder][row].abs().max())
            farthest = max(farthest, float((found[row] - own[folder][row]).abs().max()) / scale)
    return seconds, farthest


WHAT = {
    "load": "load from disk, verified (first use)",
    "first": "of these the first fifth",
    "last": "of these the last fifth, beside the others",
    "switch": "switch in the pool",
    "set_adapter": "switch by set_adapter",
    "set_scale": "set_scale",
    "disable_adapter": "disable_adapter, and back",
    "load beside one": "load_adapter beside one adapter",
    "load beside many": "load_adapter beside all",
    "plain": "forward of the plain network",
    "alone": "switch and forward of a batch",
    "mixed": "forward of a mixed batch, an adapter per row",
    "one by one": "the same rows one by one",
}


def shown(seconds: Sequence[float]) -> list[str]:
    found: Interval = median_interval(seconds)
    unit, factor = ("µs", 1e6) if found.value < 1e-3 else ("ms", 1e3)
    return [
        f"{factor * found.value:.3g} {unit}",
        f"{factor * found.low:.3g} to {factor * found.high:.3g}",
        str(len(seconds)),
    ]


def caption(args: argparse.Namespace, result: dict[str, Any], where: dict[str, Any]) -> str:
    busy = f"load average {os.getloadavg()[2]:.1f} over the last 15 minutes"  # a busy machine shows in every time
    place = where["gpu"] or f"{where['cpu']}, {where['threads']} of {where['cores']} cores, {busy}"
    mega = {name: f"{result[name] / 1e6:.1f} MB" for name in ("base", "tuned", "tensors", "files")}
    exact = "exactly their sum" if result["tensors"] == result["base"] + result["tuned"] else "not their sum"
    return (
        f"{args.adapters} adapters of {args.target} ({result['parameters']:,} parameters each) on {args.network}, "
        f"random weights, float32, {args.side} px, batches of {args.batch_size}; {place}. All {result['equal']} "
        "outputs equal those of one plain model per adapter bit for bit; rows of mixed batches differ by at most "
        f"{result['farthest']:.1g} of the largest logit. Memory: base {mega['base']}, adapters {mega['tuned']}, all "
        f"tensors {mega['tensors']}, {exact}. Folders on disk: {mega['files']}. "
        "Medians over rounds (of loading: over adapters) with the 95% interval between order statistics."
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--network", default="resnet50", help="a timm model (default: resnet50)")
    add("--target", default="block1")
    add("--adapters", type=int, default=100)
    add("--side", type=int, default=64, help="height and width of the images (default: 64)")
    add("--batch-size", type=int, default=8)
    add("--rounds", type=int, default=30)
    add("--threads", type=int, help="torch threads")
    add("--device", default="cpu")
    add("--markdown", help="also write the table to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as root:
        result = measure(args, Path(root))
    header = ["", "median", "95% interval", "n"]
    lines = [[what, *shown(result["seconds"][name])] for name, what in WHAT.items()]
    table = TextTable(header, lines, caption(args, result, machine(args.device)))
    table.show()
    if args.markdown:
        table.save(args.markdown)


if __name__ == "__main__":
    main()
