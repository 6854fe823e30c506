"""The snr score, which needs the gradient of every input alone: time and memory against plain torch.

::

    python benchmarks/scores.py                                  # 64 inputs of a ResNet-26 at 32 px
    python benchmarks/scores.py --network resnet50 --side 64

*score* is ``score_blocks(network, batches, "snr")``, *loop* a backward pass for each input with running means and
variances of its gradients, *batch* one backward pass of all inputs together, which knows no variance: the least that
could be done. The scores of the first two must agree. A ratio is the median over interleaved rounds with the
distribution-free 95% interval between two order statistics; memory is the most bytes of tensors held at once beyond
those there before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import step
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_surgical import anatomy_of, score_blocks
from peft_surgical.errors import DataError
from peft_surgical.evaluation import TextTable

METHODS = ("score", "loop", "batch")


def loop(network: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """The snr of every block, an input at a time: Welford's running mean and sum of squared deviations."""
    parameters = dict(network.named_parameters())
    mean = {name: torch.zeros_like(value) for name, value in parameters.items()}
    deviations = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for i in range(len(x)):
        loss = F.cross_entropy(network(x[i : i + 1]), y[i : i + 1])
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            change = gradient - mean[name]
            mean[name] += change / (i + 1)
            deviations[name] += change * (gradient - mean[name])
    found = {}
    for block in anatomy_of(network):
        ratios = []
        for name in block.tensors:
            if name in parameters:
                variance = deviations[name].double() / (len(x) - 1)
                ratios.append(torch.where(variance > 0, mean[name].double().square() / variance, 0.0).flatten())
        found[block.name] = float(torch.cat(ratios).mean())
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Check that the scores agree, then time them."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # the two sum in another order, and 10 bits would show it
    network = (step.ResNet26() if args.network == "resnet26" else timm.create_model(args.network)).to(device)
    x = torch.randn(args.inputs, 3, args.side, args.side, device=device)
    y = torch.randint(0, 10, (args.inputs,), device=device)
    step.estimate_statistics(network, x)
    network.eval()
    wait: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    calls: dict[str, Callable[[], Any]] = {
        "score": lambda: score_blocks(network, [(x, y)], "snr", chunk_size=args.chunk_size).block_scores,
        "loop": lambda: loop(network, x, y),
        "batch": lambda: torch.autograd.grad(F.cross_entropy(network(x), y), list(network.parameters())),
    }
    found, memory = {}, {}
    for name, call in calls.items():
        found[name], memory[name] = step.peak_memory(call, device)
    for block, value in found["loop"].items():
        if abs(found["score"][block] - value) > 1e-2 * abs(value):
            raise DataError(f"the snr of {block} is {found['score'][block]:.6g}, a loop finds {value:.6g}")
    seconds = step.interleave(calls, 0, args.rounds, wait)
    ratios = {name: list(step.ratio(seconds, "score", name) or ()) for name in METHODS[1:]}
    return {
        "network": args.network,
        "inputs": args.inputs,
        "side": args.side,
        "n": args.rounds,
        "seconds": {name: list(step.median_interval(values)) for name, values in seconds.items()},
        "ratio": ratios["loop"],
        "over_batch": ratios["batch"],
        "memory": memory,
    }


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--network", default="resnet26", help="resnet26 or a timm model (default: resnet26)")
    add("--inputs", type=int, default=64)
    add("--side", type=int, default=32, help="height and width of the images (default: 32)")
    add("--rounds", type=int, default=8)
    add("--chunk-size", type=int, help="inputs at once (default: the package's choice)")
    add("--threads", type=int, help="torch threads")
    add("--device", default="cpu")
    add("--markdown", help="also write the table to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    found = measure(args)
    where = step.machine(args.device)
    place = where["gpu"] or f"{where['cpu']}, {where['threads']} of {where['cores']} cores"
    lines = [
        [name, f"{1e3 * found['seconds'][name][0]:.0f} ms", f"{found['memory'][name] / 1e6:.0f} MB"] for name in METHODS
    ]
    caption = (
        f"snr of {args.inputs} inputs of {args.network} at {args.side} px, float32; {place}; n = {args.rounds}. "
        f"score / loop {step.shown(step.Interval(*found['ratio']))}, "
        f"score / batch {step.shown(step.Interval(*found['over_batch']))}."
    )
    table = TextTable(["", "time", "peak memory"], lines, caption)
    table.show()
    if args.markdown:
        table.save(args.markdown)


if __name__ == "__main__":
    main()
