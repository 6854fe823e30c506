"""What half a file costs: adapters of the CIFAR-10-C recipe saved again with 16-bit deltas.

::

    python recipes/cifar10c.py --data PATH --models MODELS ...                # leaves outputs/cifar10c
    python benchmarks/delta_dtype.py --data PATH --models MODELS              # a few seconds per adapter and dtype

Takes the adapters that the recipe's rows name: those whose learning rate and epoch validation images chose. Each is
reloaded as it is (and must give the accuracy in the rows), saved with ``delta_dtype`` bfloat16 and float16, reloaded
onto the base, and evaluated on the same test images of its seed. A number is the mean over corruptions per seed, then
over seeds, with Student's t interval over seeds. Finished evaluations are kept in a JSON-lines file and not repeated.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from peft_surgical.errors import DataError
from peft_surgical.evaluation import TextTable, accuracy, mean_interval, predict_logits
from peft_surgical.files import file_sha256
from peft_surgical.training.ledger import Ledger, Run

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from paper.cifar import read_images, split
from paper.cifar_networks import load_network, normalise

WEIGHTS = "adapter_model.safetensors"
# Between two machines, kernels differ in the last bits, which may move an image or two; not more.
SAME_ACCURACY = 0.005


def chosen_runs(folder: Path, targets: Sequence[str]) -> list[Run]:
    """The rows of these targets that have an adapter: those that are reported."""
    rows = [run for run in Ledger(folder / "rows.jsonl") if "adapter" in run.result]
    if found := [run for run in rows if run.key["method"] in targets]:
        return found
    there = ", ".join(sorted({run.key["method"] for run in rows})) or "nothing"
    raise DataError(f"{folder} has no finished row for {', '.join(targets)}: its rows are about {there}")


@functools.lru_cache(maxsize=4)
def test_images(args: argparse.Namespace, corruption: str, seed: int, tune: int, validation: int, severity: int):
    """The images (normalised) and labels on which the run was tested."""
    images = read_images(args.data, corruption, severity)
    rows = split(images.labels, seed, tune, validation).test
    return images.pixels[rows], images.labels[rows]


def logits_of(args: argparse.Namespace, network: str, folder: Path, pixels: Tensor) -> tuple[PeftModel, Tensor]:
    model = PeftModel.from_pretrained(load_network(network, args.models), folder)
    return model, predict_logits(model, normalise(pixels, network))


def evaluate(args: argparse.Namespace, run: Run, key: dict[str, Any]) -> dict[str, Any]:
    """Save one adapter in every dtype and see what changes."""
    source = run.key
    amounts = (source["tuning_images"], source["validation_images"], source["severity"])
    pixels, labels = test_images(args, source["task"], source["seed"], *amounts)
    folder = Path(args.run, "adapters", run.result["adapter"])
    model, before = logits_of(args, source["network"], folder, pixels)
    result: dict[str, Any] = {"n": len(labels), "accuracy": accuracy(before, labels)}
    if abs(result["accuracy"] - run.result["test"]) > SAME_ACCURACY:
        raise DataError(
            f"{folder} gives {result['accuracy']:.4f} where the rows say {run.result['test']:.4f}: pass the data "
            "and the weights with which it was made"
        )
    result["bytes"] = (folder / WEIGHTS).stat().st_size
    for dtype in key["dtypes"]:
        model.peft_config["default"].delta_dtype = dtype
        with tempfile.TemporaryDirectory() as scratch:
            model.save_pretrained(scratch)
            _, after = logits_of(args, source["network"], Path(scratch), pixels)
            result[dtype] = {
                "accuracy": accuracy(after, labels),
                "changed": int((before.argmax(1) != after.argmax(1)).sum()),
                "logits": float((before - after).abs().max()),
                "bytes": Path(scratch, WEIGHTS).stat().st_size,
            }
    changed = ", ".join(f"{dtype} {result[dtype]['changed']}" for dtype in key["dtypes"])
    print(f"{run.result['adapter']}: predictions changed of {result['n']}: {changed}", flush=True)
    return result


def points_by_seed(pairs: Sequence[tuple[Run, dict[str, Any]]], dtype: str) -> list[float]:
    """Per seed, accuracy in ``dtype`` minus accuracy in fp32, mean over corruptions, in points."""
    seeds: dict[int, list[float]] = defaultdict(list)
    for run, result in pairs:
        seeds[run.key["seed"]].append(100 * (result[dtype]["accuracy"] - result["accuracy"]))
    return [fmean(values) for values in seeds.values()]


HEADER = [
    "network",
    "target",
    "dtype",
    "accuracy - fp32 (points)",
    "changed predictions",
    "max logit change",
    "file / fp32",
]


def rows(pairs: Sequence[tuple[Run, dict[str, Any]]], dtypes: Sequence[str]) -> list[list[str]]:
    """One row per network, target and dtype, in the order of HEADER."""
    groups: dict[tuple[str, str], list[tuple[Run, dict[str, Any]]]] = defaultdict(list)
    for run, result in pairs:
        groups[run.key["network"], run.key["method"]].append((run, result))
    lines = []
    for (network, target), members in groups.items():
        for dtype in dtypes:
            values, results = points_by_seed(members, dtype), [result for _, result in members]
            text = f"{values[0]:+.3f} (one seed)"
            if len(values) > 1:
                value, low, high = mean_interval(values)
                text = f"{value:+.3f} ({low:+.3f} to {high:+.3f})"
            changed, n = sum(r[dtype]["changed"] for r in results), sum(r["n"] for r in results)
            size = sum(r[dtype]["bytes"] for r in results) / sum(r["bytes"] for r in results)
            logits = max(r[dtype]["logits"] for r in results)
            lines.append([network, target, dtype, text, f"{changed} of {n}", f"{logits:.2g}", f"{size:.2f}"])
    return lines


def caption(pairs: Sequence[tuple[Run, dict[str, Any]]]) -> str:
    corruptions = sorted({run.key["task"] for run, _ in pairs})
    seeds = sorted({run.key["seed"] for run, _ in pairs})
    n = sorted({result["n"] for _, result in pairs})
    return (
        f"Adapters of the CIFAR-10-C recipe, {len(pairs)} in all: corruptions {', '.join(corruptions)}; seeds "
        f"{', '.join(map(str, seeds))}; n = {', '.join(map(str, n))} test images each. Difference: mean over "
        "corruptions, then over seeds, with Student's t 95% interval over seeds; no choice was made on test images. "
        "A test image counts once per adapter among the changed predictions."
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", default="outputs/cifar10c", help="the recipe's output folder (default: outputs/cifar10c)")
    add("--data", required=True, help="as for the recipe: folder of .parquet or .npy files, or one file")
    add("--models", help="folder with the networks' weights (default: PEFT_SURGICAL_SHARED)")
    add("--targets", nargs="+", default=["block1", "all"])
    add("--dtypes", nargs="+", choices=["bfloat16", "float16"], default=["bfloat16", "float16"])
    add("--corruption", nargs="+", help="default: all that are finished")
    add("--threads", type=int, help="torch threads")
    add("--json", default="outputs/benchmarks/delta_dtype.jsonl", help="finished evaluations; what is there is kept")
    add("--markdown", help="also write the table to this file")
    return parser.parse_args(argv, namespace=_Arguments())


class _Arguments(argparse.Namespace):
    # By identity, so that the images of a run can be cached by the arguments.
    __hash__ = object.__hash__
    __eq__ = object.__eq__


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    ledger, pairs = Ledger(args.json), []
    for run in chosen_runs(Path(args.run), args.targets):
        if args.corruption and run.key["task"] not in args.corruption:
            continue
        weights = Path(args.run, "adapters", run.result["adapter"], WEIGHTS)
        key = {"benchmark": "delta_dtype", "dtypes": args.dtypes, "weights": file_sha256(weights)}
        key |= {"data": run.key["data"], "seed": run.key["seed"]}
        pairs.append((run, ledger.run(key, functools.partial(evaluate, args, run)).result))
    if not pairs:
        raise DataError(f"no finished adapter for {', '.join(args.corruption)} in {args.run}")
    table = TextTable(HEADER, rows(pairs, args.dtypes), caption(pairs))
    table.show()
    if args.markdown:
        table.save(args.markdown)


if __name__ == "__main__":
    main()
