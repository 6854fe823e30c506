"""No cost of its own: a training step and an inference pass against the same network without this package.

::

    python benchmarks/step.py                                        # about 12 minutes on two quiet CPU cores
    python benchmarks/step.py --networks vit_b16 --targets block1 block6 head all --batch-size 16
    python benchmarks/step.py --from-json outputs/benchmarks/step.jsonl --markdown table.md

One cell is one network and one target. Its methods start from the same random weights, see the same batch and use the
same optimizer without weight decay:

- *ours*: ``get_peft_model`` with ``SurgicalConfig(target=...)``;
- *hand*: plain torch, ``requires_grad_(False)`` outside the target;
- *peft*: ``LNTuningConfig`` on the target's modules, PEFT's nearest method (it trains a copy of each module; raw
  parameters outside any module, such as a ViT's ``pos_embed``, are out of its reach);
- *lora*: ``LoraConfig(r=8)`` on the target's convolutions and linear maps, which trains less and other tensors;
- *cache*: hand, with the activations in front of the target computed beforehand, by code written for this network
  (training only; not where there is nothing in front of the target);
- *full*: plain torch, every parameter trained.

All hold the normalisation statistics, so the work is equal and the losses of ours and hand must agree before anything
is timed. Then rounds: every method once per round, in an order that changes from round to round, so that what else the
machine does hits all alike. A number is the median over rounds of the ratio within a round, with the distribution-free
95% interval between two order statistics. For the target ``all``, hand and full are the same network: their ratio shows
the noise. Finished cells are kept in a JSON-lines file and not repeated.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import itertools
import math
import os
import platform
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would report on itself for every cell

import numpy as np
import timm
import torch
import torch.nn.functional as F
from peft import LNTuningConfig, LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.profiler import ProfilerActivity, profile

from peft_surgical import SurgicalConfig, anatomy_of
from peft_surgical.choosing.models import logits_of
from peft_surgical.evaluation import Interval, TextTable
from peft_surgical.training.ledger import Ledger, Run

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from paper.cifar_networks import SHARED_VARIABLE, ResNet26
from peft_surgical.blocks import parse, resolve

WEIGHTS = "adapter_model.safetensors"
METHODS = ("ours", "hand", "peft", "lora", "cache", "full")
CHECKED_STEPS = 3
# Relative. On a bf16 base ours keeps fp32 deltas. No float16: trained by hand, its optimizer state underflows to NaN.
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}


class Network(NamedTuple):
    """A network to measure: how to build it, its input, and the cells of a run without arguments.

    Attributes:
        build: Makes it with random weights.
        side: Height and width of its input.
        batch_size: Default. A ViT's step at 16 would alone take longer than all other cells; what the package adds
            does not depend on the batch, so a smaller one can only make its share look larger.
        targets: Default.
        images: (n, side) -> images; None for noise.
    """

    build: Callable[[], nn.Module]
    side: int
    batch_size: int
    targets: tuple[str, ...]
    images: Callable[[int, int], Tensor] | None = None


def transformers_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(num_labels=1000))


def shared(*path: str) -> Path:
    """A file of the folder that ``PEFT_SURGICAL_SHARED`` names: real weights and photographs."""
    if not os.environ.get(SHARED_VARIABLE):
        raise SystemExit(f"this network has real weights: set {SHARED_VARIABLE} to the folder that holds {path[0]}/")
    return Path(os.environ[SHARED_VARIABLE], *path)


def efficientnet_lite0() -> nn.Module:
    network = timm.create_model("tf_efficientnet_lite0")
    network.load_state_dict(load_file(shared("models", "efficientnet_lite0_imagenet", "model.safetensors")))
    return network


def photographs(n: int, side: int) -> Tensor:
    """The first ``n`` photographs of PACS, one class after the other, normalised as the network expects."""
    by_class = [sorted(folder.iterdir()) for folder in sorted(shared("data", "pacs", "photo").iterdir())]
    files = [file for group in itertools.zip_longest(*by_class) for file in group if file][:n]
    rows = [Image.open(file).convert("RGB").resize((side, side)) for file in files]
    return torch.stack([torch.from_numpy(np.array(row)) for row in rows]).permute(0, 3, 1, 2) / 127.5 - 1


GOAL_TARGETS = ("block1", "head", "all")
NETWORKS = {
    "resnet26": Network(ResNet26, 32, 64, ("block1", "block2", "head", "all")),
    # zero_init_last would give most convolutions a gradient of exactly zero, which no pretrained network has.
    "resnet50": Network(functools.partial(timm.create_model, "resnet50", zero_init_last=False), 224, 16, GOAL_TARGETS),
    "vit_b16": Network(functools.partial(timm.create_model, "vit_base_patch16_224"), 224, 4, ("block1",)),
    "vit_b16_hf": Network(transformers_vit, 224, 4, ("block1",)),
    "lite0": Network(efficientnet_lite0, 224, 16, ("block6", "head", "all"), photographs),
    # For tests.
    "tiny_resnet": Network(functools.partial(timm.create_model, "test_resnet"), 32, 2, GOAL_TARGETS),
    "tiny_vit": Network(functools.partial(timm.create_model, "test_vit"), 160, 2, GOAL_TARGETS),
}
DEFAULT_NETWORKS = tuple(name for name in NETWORKS if not name.startswith("tiny"))


class Goal(NamedTuple):
    """What to be measured against, for 224 px and a batch of at least 16."""

    text: str
    phase: str
    whole: bool
    most: float


GOALS = (
    Goal("training step, one block", "training", False, 1.03),
    Goal("training step, all", "training", True, 1.05),
    Goal("inference unmerged, one block", "inference", False, 1.03),
)


# --- statistics ---


def median_interval(values: Sequence[float]) -> Interval:
    """Median with the 95% interval between two order statistics, which assumes nothing but independent rounds.

    With k values cut off at each end, the interval misses the median with probability 2 P(Binomial(n, 1/2) <= k). Below
    six values no cut reaches 95%: the interval is then everything from 0 up.
    """
    ordered, n = sorted(values), len(values)
    missed, cut = 0.0, -1
    while missed + 2 * math.comb(n, cut + 1) / 2**n <= 0.05:
        cut += 1
        missed += 2 * math.comb(n, cut) / 2**n
    low, high = (ordered[cut], ordered[n - 1 - cut]) if cut >= 0 else (0.0, math.inf)
    return Interval(median(ordered), low, high)


def ratio(seconds: dict[str, list[float]], method: str, base: str) -> Interval | None:
    """Median over rounds of the time of ``method`` over that of ``base`` in the same round."""
    if method not in seconds or base not in seconds:
        return None
    return median_interval([a / b for a, b in zip(seconds[method], seconds[base], strict=True)])


def interleave(
    calls: dict[str, Callable[[], object]],
    seconds: float,
    rounds: int,
    wait: Callable[[], object],
    repeat: int = 1,
) -> dict[str, list[float]]:
    """Seconds per call, every method once per round, for at least so many seconds and so many rounds.

    Args:
        calls: Name of a method -> what is timed.
        seconds: At least, in all.
        rounds: At least.
        wait: Waits for the device.
        repeat: Calls between two waits, of which the mean counts: a GPU is to work while the CPU prepares the next.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    names, done, end = list(calls), 0, time.perf_counter() + seconds
    while done < rounds or time.perf_counter() < end:
        turn = done % len(names)
        order = names[turn:] + names[:turn]
        gc.collect()
        gc.disable()  # as timeit does: a collection would hit whichever method is running
        for name in order if done // len(names) % 2 == 0 else reversed(order):
            wait()
            start = time.perf_counter()
            for _ in range(repeat):
                calls[name]()
            wait()
            taken[name].append((time.perf_counter() - start) / repeat)
        gc.enable()
        done += 1
    return {name: [float(f"{value:.6g}") for value in values] for name, values in taken.items()}


# --- the methods ---


def hold_statistics(model: nn.Module) -> nn.Module:
    """Training mode but for BatchNorm."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    return model


def estimate_statistics(model: nn.Module, x: Tensor) -> None:
    """Give BatchNorm the statistics of ``x``.

    With the ones it starts from, the activations of a random network explode, a few steps bring the loss to exactly
    zero, and what is timed from then on is arithmetic on zeros and denormal numbers.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def modules_within(module: nn.Module, names: set[str], path: str = "") -> Iterator[str]:
    """Paths of the highest modules whose parameters are all in ``names``.

    Not the containers: networks iterate over them, which PEFT's wrapper around one does not support.
    """
    own = {name for name, _ in module.named_parameters(prefix=path)}
    if path and own and own <= names and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        yield path
        return
    for name, child in module.named_children():
        yield from modules_within(child, names, f"{path}.{name}" if path else name)


def ln_tuned(model: nn.Module, config: LNTuningConfig) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unsupported layer type")  # PEFT, about counting a block's features
        return get_peft_model(model, config)


def tuned_layers(model: nn.Module, names: set[str]) -> list[str]:
    """Paths of the convolutions and linear maps whose weights are in ``names``; not of those that LoRA cannot split."""
    modules = dict(model.named_modules())
    found = [name.removesuffix(".weight") for name in sorted(names) if name.endswith(".weight")]
    kinds = (nn.Linear, nn.Conv2d)
    return [path for path in found if isinstance(modules[path], kinds) and getattr(modules[path], "groups", 1) == 1]


def suffix(model: nn.Module, target: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]] | None:
    """The first module of a late block or the head, and what follows from that module's input, written by hand.

    None where there is nothing in front of the target, or where nobody has written it for this network.
    """
    if target == "head":
        head = next(module for module in reversed(list(model.modules())) if isinstance(module, nn.Linear))
        return head, head
    number = re.fullmatch(r"block(\d+)", target)
    first = int(number[1]) - 1 if number else 0
    if not first:
        return None
    after: Sequence[Callable[[Tensor], Tensor]]
    if isinstance(model, ResNet26):
        blocks = [model.layer1, model.layer2, model.layer3]
        after = (model.bn, F.relu, lambda x: F.avg_pool2d(x, 8).flatten(1), model.fc)
    elif isinstance(model, timm.models.ResNet):
        blocks, after = [model.layer1, model.layer2, model.layer3, model.layer4], (model.forward_head,)
    elif isinstance(model, timm.models.VisionTransformer):
        blocks, after = list(model.blocks), (model.norm, model.forward_head)
    elif isinstance(model, timm.models.EfficientNet):
        blocks, after = list(model.blocks), (model.conv_head, model.bn2, model.forward_head)
    else:
        return None

    def run(x: Tensor) -> Tensor:
        for part in (*blocks[first:], *after):
            x = part(x)
        return x

    return blocks[first], run


def features_before(model: nn.Module, module: nn.Module, x: Tensor) -> Tensor:
    """The input of ``module`` in a forward of ``model``."""
    found = []
    handle = module.register_forward_pre_hook(lambda module, given: found.append(given[0].detach()))
    with torch.no_grad():
        model(x)
    handle.remove()
    return found[0]


def builders(base: nn.Module, target: str) -> tuple[dict[str, Callable[[], nn.Module]], set[str]]:
    """What makes each method's model from a copy of ``base``, and which of them train exactly the same tensors."""
    parameters = {name for name, _ in base.named_parameters()}
    tuned = set(resolve(parse(target), anatomy_of(base))) & parameters
    paths = list(modules_within(base, tuned))

    def hand(names: set[str]) -> nn.Module:
        model = copy.deepcopy(base)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        return model

    layers = "|".join(re.escape(path) for path in tuned_layers(base, tuned))
    made = {
        "ours": lambda: get_peft_model(copy.deepcopy(base), SurgicalConfig(target=target)),
        "hand": lambda: hand(tuned),
        "full": lambda: hand(parameters),
    }
    if layers:
        made["lora"] = lambda: get_peft_model(copy.deepcopy(base), LoraConfig(r=8, target_modules=layers))
    same = {"ours", "hand"} | ({"full"} if tuned == parameters else set())
    if paths:
        config = LNTuningConfig(target_modules="|".join(map(re.escape, paths)))
        made["peft"] = lambda: ln_tuned(copy.deepcopy(base), config)
        reached = {name for name in tuned if name.startswith(tuple(f"{path}." for path in paths))}
        same |= {"peft"} if reached == tuned else set()
    return made, same


def training_step(model: nn.Module, call: Callable[[Tensor], Tensor], args: argparse.Namespace, x: Tensor, y: Tensor):
    """The step of one method: forward, loss, backward, optimizer step, zero_grad; returns the loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if args.optimizer == "adamw":
        # Weight decay pulls a delta to zero and a weight to zero as well, which are two different points.
        optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    else:
        optimizer = torch.optim.SGD(trained, lr=args.lr, momentum=0.9)

    def step() -> Tensor:
        loss = F.cross_entropy(call(x).float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def peak_memory(work: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """What ``work`` returns, and the most bytes of tensors that it held at once, beyond those there before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        return result, torch.cuda.max_memory_allocated(device) - before
    # Exact and repeatable, where the resident size of the process depends on what the allocator gives back.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return result, most


# --- one cell ---


def measure(
    args: argparse.Namespace, key: dict[str, Any], ready: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Check that the methods do the same work, then time them; ``ready`` is called before the first timing."""
    start = time.perf_counter()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    torch.manual_seed(0)
    network = NETWORKS[key["network"]]
    base = network.build().to(device, dtype)
    draw = network.images or (lambda n, side: torch.randn(n, 3, side, side))
    x = draw(key["batch_size"], key["side"]).to(device, dtype)
    y = torch.randint(0, 10, (key["batch_size"],), device=device)
    if network.images is None:  # random weights
        estimate_statistics(base, x)
    made, same = builders(base, key["target"])
    made = {name: make for name, make in made.items() if name in args.methods}
    same &= {*made}

    models, calls, steps, losses, memory = {}, {}, {}, {}, {}
    for name, make in made.items():

        def begin(make: Callable[[], nn.Module] = make) -> tuple[Any, ...]:
            model = hold_statistics(make())
            call = called(model, args)
            step = training_step(model, call, args, x, y)
            return model, call, step, [step() for _ in range(CHECKED_STEPS)]

        (models[name], calls[name], steps[name], losses[name]), memory[name] = peak_memory(begin, device)
        losses[name] = [float(loss) for loss in losses[name]]
    check_losses({name: losses[name] for name in same}, LOSS_TOLERANCE["bfloat16" if args.autocast else args.dtype])
    result: dict[str, Any] = {"memory": memory, "losses": losses, "same": sorted(same)}
    result["trained"] = sum(p.numel() for p in models["hand"].parameters() if p.requires_grad)
    result["prepared"] = round(time.perf_counter() - start, 1)
    if "cache" in args.methods and (part := suffix(model := hold_statistics(made["hand"]()), key["target"])):
        call = torch.compile(part[1]) if args.compile else part[1]
        with autocast(args):
            features = features_before(model, part[0], x)
        steps["cache"] = training_step(model, under(args, call), args, features, y)
        steps["cache"]()
    ready()
    result["training"] = interleave(steps, args.seconds, args.rounds, wait, args.repeat)
    result["seconds"] = round(time.perf_counter() - start, 1)
    if not args.inference:
        return result

    steps.clear()
    for name in {"full", "lora"} & {*calls}:  # full is, for inference, hand's network with other values
        calls.pop(name), models.pop(name)
    models["merged"] = copy.deepcopy(models["ours"]).merge_and_unload()
    equal = check_merged(models["merged"], models["ours"], base, x)
    result["merged"] = f"the base's own classes, outputs {'bit-equal' if equal else 'close'} to unmerged"
    result["bytes"] = saved_bytes(models, base)
    calls["merged"] = called(models["merged"], args)
    for model in models.values():
        model.eval()
    with torch.no_grad():
        passes = {name: lambda call=call: call(x) for name, call in calls.items()}
        interleave(passes, 0, 1, wait)  # warm
        result["inference"] = interleave(passes, args.seconds, args.rounds, wait, args.repeat)
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def autocast(args: argparse.Namespace) -> torch.autocast:
    """What `transformers.Trainer` runs a forward in with ``bf16=True``, where that was asked for."""
    return torch.autocast(torch.device(args.device).type, dtype=torch.bfloat16, enabled=args.autocast)


def under(args: argparse.Namespace, call: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """The logits of ``call``, in the precision that was asked for."""

    def logits(x: Tensor) -> Tensor:
        with autocast(args):
            return logits_of(call(x))

    return logits


def called(model: nn.Module, args: argparse.Namespace) -> Callable[[Tensor], Tensor]:
    """How a method's model is called: compiled and in reduced precision, where that was asked for."""
    return under(args, torch.compile(model) if args.compile else model)


def check_losses(losses: dict[str, list[float]], tolerance: float) -> None:
    """Raise unless the methods that train the same tensors have the same losses, and these move."""
    hand = losses["hand"]
    if hand[0] == hand[-1]:
        raise RuntimeError(f"{len(hand)} steps left the loss at {hand[0]}: nothing was trained, so nothing is compared")
    for name, values in losses.items():
        if not all(math.isclose(a, b, rel_tol=tolerance) for a, b in zip(values, hand, strict=True)):
            raise RuntimeError(f"{name} and hand do not do the same work: losses {values} against {hand}")


def check_merged(merged: nn.Module, ours: nn.Module, base: nn.Module, x: Tensor) -> bool:
    """Raise unless the merged network is made of the base's classes and computes what the unmerged one does.

    Returns whether it does so bit for bit, which the CPU must; a GPU may take another kernel for the same sum.
    """
    classes = [[(path, type(module)) for path, module in network.named_modules()] for network in (merged, base)]
    if classes[0] != classes[1]:
        raise RuntimeError("merging leaves modules that the base does not have")
    with torch.no_grad():
        before, after, untouched = (logits_of(model.eval()(x)) for model in (ours, merged, base))
    equal = torch.equal(before, after)
    if not (equal or (x.is_cuda and torch.allclose(before, after, rtol=1e-2, atol=1e-2))):
        raise RuntimeError(f"merging changes the outputs by up to {(before - after).abs().max():.3g}")
    if torch.equal(after, untouched):
        raise RuntimeError("the merged network is the base: the comparison would be empty")
    return equal


def saved_bytes(models: dict[str, nn.Module], base: nn.Module) -> dict[str, int]:
    """Size of the adapter files, and of a checkpoint of the whole network."""
    sizes = {"full": sum(tensor.nbytes for tensor in base.state_dict().values())}
    for name in ("ours", "peft"):
        if name in models:
            with tempfile.TemporaryDirectory() as folder:
                models[name].save_pretrained(folder)
                sizes[name] = Path(folder, WEIGHTS).stat().st_size
    return sizes


def machine(device: str) -> dict[str, Any]:
    """What the times depend on besides the settings."""
    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file() and (found := re.search(r"model name\s*:\s*(.+)", information.read_text())):
        cpu = found[1]
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def key_of(args: argparse.Namespace, network: str, target: str) -> dict[str, Any]:
    """Everything that a cell's numbers depend on: a cell of another machine or version is measured again."""
    entry = NETWORKS[network]
    key = {"benchmark": "step", "network": network, "target": target, "side": entry.side}
    key["batch_size"] = args.batch_size or entry.batch_size
    key |= {"optimizer": args.optimizer, "lr": args.lr, "dtype": args.dtype, "device": args.device}
    key |= {"compile": args.compile, "machine": machine(args.device)}
    key |= {"autocast": "bfloat16"} if args.autocast else {}
    return key | {"versions": {name: version(name) for name in ("peft-surgical", "peft", "torch", "timm")}}


# --- the table ---

TIMES = [
    "network",
    "target",
    "training: ours / hand",
    "ours / peft",
    "ours / lora",
    "cache / hand",
    "ours / full",
    "inference: ours / hand",
    "merged / hand",
    "rounds",
]
SIZES = ["network", "target", "memory (MB): ours", "hand", "peft", "full", "file (MB): ours", "peft", "full"]


def shown(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    bounds = "too few rounds" if math.isinf(interval.high) else f"{interval.low:.3f} to {interval.high:.3f}"
    return f"{interval.value:.3f} ({bounds})"


def place(run: Run) -> list[str]:
    return [f"{run.key['network']}, {run.key['side']} px, batch {run.key['batch_size']}", run.key["target"]]


def times(run: Run) -> list[str]:
    """One cell as texts, in the order of TIMES."""
    training, inference = run.result["training"], run.result["inference"]
    return [
        *place(run),
        *(shown(ratio(training, "ours", base)) for base in ("hand", "peft", "lora")),
        shown(ratio(training, "cache", "hand")),
        shown(ratio(training, "ours", "full")),
        *(shown(ratio(inference, method, "hand")) for method in ("ours", "merged")),
        f"{len(training['hand'])}, {len(inference['hand'])}",
    ]


def sizes(run: Run) -> list[str]:
    """One cell as texts, in the order of SIZES."""
    memory, saved = run.result["memory"], run.result["bytes"]
    texts = [f"{memory[name] / 1e6:.0f}" if name in memory else "-" for name in ("ours", "hand", "peft", "full")]
    return [*place(run), *texts, *(f"{saved[n] / 1e6:.2f}" if n in saved else "-" for n in ("ours", "peft", "full"))]


def verdicts(runs: Sequence[Run]) -> list[str]:
    """Each goal beside the worst of the cells that it is about; the noise, where a cell shows it."""
    lines = []
    for goal in GOALS:
        about = [run for run in runs if run.key["side"] == 224 and run.key["batch_size"] >= 16]
        found = [
            (interval, run)
            for run in about
            if (run.key["target"] == "all") == goal.whole
            and (interval := ratio(run.result[goal.phase], "ours", "hand"))
        ]
        line = f"Goal for {goal.text}, ours / hand at 224 px and batch 16: at most {goal.most}"
        if not found:
            lines.append(f"{line}; no cell here is about it.")
            continue
        worst, run = max(found, key=lambda pair: pair[0].value)
        word = "met" if worst.value <= goal.most else "missed"
        largest = f", the largest of {len(found)}" if len(found) > 1 else ""
        lines.append(f"{line}; {word}: {shown(worst)} on {run.key['network']} {run.key['target']}{largest}.")
    for run in runs:
        if run.key["target"] == "all":
            control = shown(ratio(run.result["training"], "full", "hand"))
            lines.append(f"Noise: full / hand on {run.key['network']} all, the same network twice: {control}.")
    return lines


def captions(runs: Sequence[Run]) -> tuple[str, str]:
    """How times and sizes came about, from the keys of the cells."""
    described = set()
    for key in (run.key for run in runs):
        machine, versions = key["machine"], ", ".join(f"{name} {v}" for name, v in sorted(key["versions"].items()))
        where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
        how = f"{key['dtype']}, {key['optimizer']}{', torch.compile' if key['compile'] else ''}"
        described.add(f"{where}; {how}; {versions}")
    return (
        "Ratios of times: median over interleaved rounds (95% interval); below 1 ours is faster. Training is forward, "
        "loss, backward, optimizer step and zero_grad. hand: frozen by hand; peft: LNTuningConfig on the same modules; "
        "lora: LoraConfig(r=8) on the same modules; cache: hand, with the activations in front of the target computed "
        "beforehand; full: all parameters trained; merged: ours after merge_and_unload, made of the base's own classes "
        f"with outputs bit-equal to unmerged. {'. '.join(sorted(described))}.",
        "Memory: the most bytes of tensors held at once while training (weights, gradients, optimizer state, "
        "activations). File: the adapter; for full, a checkpoint of all weights.",
    )


def show(runs: Sequence[Run], markdown: str | None) -> None:
    if not runs:
        print("no finished cell: nothing to show")
        return
    text = ""
    for header, cells, caption in zip((TIMES, SIZES), (times, sizes), captions(runs), strict=True):
        table = TextTable(header, [cells(run) for run in runs], caption)
        table.show(show_lines=True)
        text += table.markdown() + "\n"
    notes = verdicts(runs)
    print("\n".join(notes))
    if markdown:
        Path(markdown).write_text(text + "".join(f"- {line}\n" for line in notes), encoding="utf-8")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    known = {name: NETWORKS[name] for name in DEFAULT_NETWORKS}
    defaults = "; ".join(f"{name}: {' '.join(entry.targets)}" for name, entry in known.items())
    batches = ", ".join(f"{name} {entry.batch_size}" for name, entry in known.items())
    add("--networks", nargs="+", choices=list(NETWORKS), default=list(DEFAULT_NETWORKS))
    add("--targets", nargs="+", help=f"any target text, for every network (default {defaults})")
    add("--batch-size", type=int, help=f"for every network (default {batches})")
    add("--seconds", type=float, default=10, help="at least, for a cell's training, again for inference (default 10)")
    add("--rounds", type=int, default=10, help="at least, whatever they take (default 10)")
    add("--optimizer", choices=["adamw", "sgd"], default="adamw", help="sgd has momentum 0.9")
    add("--lr", type=float, help="default 1e-6, so that the loss stays away from zero; 1e-4 for bfloat16")
    add("--threads", type=int, help="torch threads (default: torch's own choice)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1")
    add("--dtype", choices=list(LOSS_TOLERANCE), default="float32", help="of the network and its input")
    add("--compile", action="store_true", help="torch.compile every method")
    add("--autocast", action="store_true", help="bfloat16 autocast, as Trainer's bf16=True")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="ours and hand are always measured")
    add("--repeat", type=int, default=1, help="calls in a row that count as one, for a GPU (default: 1)")
    add("--no-inference", dest="inference", action="store_false", help="measure training alone")
    add("--json", default="outputs/benchmarks/step.jsonl", help="finished cells, one per line; what is there is kept")
    add("--markdown", help="also write the table to this file")
    add("--from-json", metavar="FILE", help="measure nothing, draw the table of the cells in this file")
    args = parser.parse_args(argv)
    # A bfloat16 weight does not notice a step of 1e-6.
    args.lr = args.lr or (1e-6 if args.dtype == "float32" and not args.autocast else 1e-4)
    args.methods = [*dict.fromkeys(["ours", "hand", *args.methods])]
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.from_json:
        show(Ledger(args.from_json).runs(benchmark="step"), args.markdown)
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    ledger, runs = Ledger(args.json), []
    for network in args.networks:
        for target in args.targets or NETWORKS[network].targets:
            runs.append(ledger.run(key_of(args, network, target), lambda key: measure(args, key)))
            found, seconds = ratio(runs[-1].result["training"], "ours", "hand"), runs[-1].notes["seconds"]
            print(f"{network} {target}: training, ours / hand {shown(found)}; took {seconds:.0f} s", flush=True)
    show(runs, args.markdown)


if __name__ == "__main__":
    main()
