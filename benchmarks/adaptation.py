"""What MEMO costs by target: images per second of the stem against all tensors, and of each against a loop by hand.

::

    python benchmarks/adaptation.py --threads 1 --markdown docs/results/adaptation-speed.md    # about a minute
    MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 python benchmarks/adaptation.py --threads 1

For each target two methods adapt the ResNet-26 (random weights: the time does not depend on them) to the same images:

- *ours*: `Memo` on ``SurgicalConfig(target=...)``;
- *hand*: plain torch with the same views and losses, ``requires_grad_(False)`` outside the target, and a whole
  ``load_state_dict`` after every image where it is episodic, as in MEMO's published code.

Rounds as in ``benchmarks/step.py``: every method once per round, in an order that changes from round to round. A number
is the median over rounds of the ratio within a round, with the distribution-free 95% interval. Time is CPU time of the
process, which other work on the machine disturbs least; run it with one thread. The second command keeps glibc from
handing memory back to the system after every image, only to ask for it again.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from peft import get_peft_model
from step import machine, median_interval
from torch import Tensor, nn

from peft_surgical import SurgicalConfig, anatomy_of
from peft_surgical.adaptation.objectives import Memo, marginal_entropy
from peft_surgical.adaptation.views import AugMix, generator_at
from peft_surgical.evaluation import TextTable

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from paper.cifar_networks import ResNet26
from peft_surgical.blocks import parse, resolve

LR = 1e-5
"""So small that the network stays what it is from round to round."""
HEADER = [
    "target",
    "mode",
    "images per CPU second",
    "time / time of all, ours",
    "time: ours / hand",
    "views, share of the time",
]


def by_hand(network: nn.Module, target: str, views: AugMix, episodic: bool) -> Callable[[Tensor], Tensor]:
    """MEMO on a plain network of which everything but the target is frozen."""
    names = set(resolve(parse(target), anatomy_of(network)))
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in names)
    moving = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer, start = torch.optim.SGD(moving, lr=LR), copy.deepcopy(network.state_dict())
    seen = 0

    def adapt(images: Tensor) -> Tensor:
        nonlocal seen
        logits = []
        for image in images:
            loss = marginal_entropy(network(views(image, generator_at(0, seen))))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                logits.append(network(image[None]))
            if episodic:
                network.load_state_dict(start)
            seen += 1
        return torch.cat(logits)

    return adapt


def methods(targets: Sequence[str], episodic: bool, count: int) -> dict[tuple[str, str], Callable[[Tensor], Tensor]]:
    """(target, ours or hand) -> what adapts to images. All start from the same weights."""
    torch.manual_seed(0)
    network, views = ResNet26().eval(), AugMix(count)
    made: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {}
    for target in targets:
        model = get_peft_model(copy.deepcopy(network), SurgicalConfig(target=target))
        made[target, "ours"] = Memo(model, lr=LR, views=views, episodic=episodic, collapse_window=0)
        made[target, "hand"] = by_hand(copy.deepcopy(network), target, views, episodic)
    return made


def measure(targets: Sequence[str], episodic: bool, views: int, images: int, rounds: int) -> list[list[str]]:
    """The lines of one mode.

    Raises:
        RuntimeError: If ours and hand do not predict the same.
    """
    stream = torch.rand(images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    made = methods(targets, episodic, views)
    first = {name: adapt(stream) for name, adapt in made.items()}  # and a warm-up
    for target in targets:
        if not torch.allclose(first[target, "ours"], first[target, "hand"], atol=1e-3):
            raise RuntimeError(f"{target}: ours and hand differ: what is timed would not be the same work")
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in made}
    making: list[float] = []
    for number in range(rounds):
        for name in random.Random(number).sample(list(made), len(made)):
            start = time.process_time()
            made[name](stream)
            seconds[name].append(time.process_time() - start)
        start = time.process_time()
        for position, image in enumerate(stream):
            AugMix(views)(image, generator_at(0, position))
        making.append(time.process_time() - start)

    def ratio(above: Sequence[float], below: Sequence[float]) -> str:
        found = median_interval([a / b for a, b in zip(above, below, strict=True)])
        return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"

    lines = []
    for target in targets:
        ours, hand = seconds[target, "ours"], seconds[target, "hand"]
        rate, whole = images / median(ours), seconds["all", "ours"]
        mode = "episodic" if episodic else "online"
        lines.append([target, mode, f"{rate:.1f}", ratio(ours, whole), ratio(ours, hand), ratio(making, ours)])
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--targets", nargs="+", default=["stem", "block1", "head"], help="beside all")
    add("--views", type=int, default=32)
    add("--images", type=int, default=4, help="per round and method")
    add("--rounds", type=int, default=9)
    add("--threads", type=int)
    add("--markdown", help="also write the table to this file")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    targets = list(dict.fromkeys([*args.targets, "all"]))
    lines = [
        line for episodic in (False, True) for line in measure(targets, episodic, args.views, args.images, args.rounds)
    ]
    where = ", ".join(f"{name} {value}" for name, value in machine("cpu").items())
    caption = (
        f"ResNet-26 at 32 px, MEMO with {args.views} views and one step of SGD per image, {args.rounds} rounds of "
        f"{args.images} images; CPU time, median of ratios within a round with its 95% interval. {where}; torch "
        f"{torch.__version__}, {torch.get_num_threads()} thread(s)."
    )
    if given := [f"{name}={value}" for name, value in os.environ.items() if name.startswith("MALLOC_")]:
        caption += f" {', '.join(sorted(given))}."
    table = TextTable(HEADER, lines, caption)
    print(table.markdown())
    if args.markdown:
        table.save(args.markdown)


if __name__ == "__main__":
    main()
