"""What the candidates that a search throws away are still good for: soups, segments and ensembles of them.

::

    python recipes/soups.py --rows OUTPUT/rows.jsonl --adapters OUTPUT/adapters --data FOLDER --models MODELS

takes the adapters that ``recipes/cifar10c.py --test-images 800 --output OUTPUT`` has left, and trains nothing. All
candidates of a cell (one network, task and seed: ``all``, each block and the head, each at its chosen rate) start from
one base, so that a mean of their deltas is a network, too (model soups, Wortsman et al. 2022). Each way is compared
with the single candidate that validates best:

    ============ ====================================================================================
    two          mean of the deltas of the best two
    every        mean of the deltas of all candidates
    greedy       Wortsman et al.'s: the next best joins while validation accuracy does not fall
    segment      between the best two, the share of 0, 1/4, 1/2, 3/4 and 1 that validates best
    ensemble     mean of the probabilities of the best two; two networks, so no adapter
    sum          sum of the deltas of the blocks and the head
    ============ ====================================================================================

Best: by accuracy on the validation images, of equals the smaller loss. All are shown, so nothing was chosen among
them; test images choose nothing.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from paper.cifar_networks import NETWORKS, load_network, normalise
from paper.cifar_tasks import read_cifar, task_images
from paper.rows import chosen_runs
from peft_surgical import combine_adapters
from peft_surgical.errors import DataError, run_in_words
from peft_surgical.evaluation import TextTable, plus_minus, predict_logits
from peft_surgical.training.ledger import Ledger, Run

CANDIDATES = ("all", "block1", "block2", "block3", "head")
WAYS = ("two", "every", "greedy", "segment", "ensemble", "sum")
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the second best, on the segment; of equals the first."""


class _Cell:
    """The candidates of one network, task and seed, and the images that validate and test."""

    def __init__(self, args: argparse.Namespace, network: str, task: str, runs: Mapping[str, Run]) -> None:
        key = next(iter(runs.values())).key
        sizes = {"tuning": key["tuning_images"], "validation": key["validation_images"], "test": key["test_images"]}
        data = read_cifar(task, args.data, seed=key["seed"], **sizes)
        pixels, self.base = task_images(task, str(args.data)), load_network(network, args.models)
        self.images, self.labels = {}, {}
        for part, rows in (("validation", data.validation), ("test", data.test)):
            at = torch.tensor([int(name.split()[-1]) for name in rows["file"]])
            self.images[part] = normalise(pixels.pixels[at], network)
            self.labels[part] = pixels.labels[at]
        self.adapters = {name: Path(args.adapters, run.result["adapter"]) for name, run in runs.items()}
        found = {name: self.logits(self.load(folder)) for name, folder in self.adapters.items()}
        for name, run in runs.items():
            tested = self.accuracy(found[name], "test")
            if abs(tested - run.result["test"]) > 1.5 / run.result["n"]:  # other batches may turn an image over
                raise DataError(
                    f"{self.adapters[name]} gets {tested:.4f} of the test images right, its row says "
                    f"{run.result['test']:.4f}: name the --rows, --data and --models that it was measured with"
                )
        self.found = found
        self.order = sorted(found, key=lambda name: (-self.accuracy(found[name]), self.loss(found[name])))

    def load(self, folder: Path) -> nn.Module:
        return PeftModel.from_pretrained(copy.deepcopy(self.base), folder).eval()

    def logits(self, model: nn.Module) -> dict[str, Tensor]:
        return {part: predict_logits(model, images) for part, images in self.images.items()}

    def mixed(self, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """Logits of the base plus the weighted sum of some candidates' deltas."""
        with tempfile.TemporaryDirectory() as folder:
            names, place = list(weights), Path(folder, "mixed")
            combine_adapters([self.adapters[name] for name in names], [weights[name] for name in names], output=place)
            return self.logits(self.load(place))

    def mean(self, names: Sequence[str]) -> dict[str, Tensor]:
        return self.mixed(dict.fromkeys(names, 1 / len(names)))

    def accuracy(self, logits: Mapping[str, Tensor], part: str = "validation") -> float:
        return (logits[part].argmax(1) == self.labels[part]).double().mean().item()

    def loss(self, logits: Mapping[str, Tensor]) -> float:
        return F.cross_entropy(logits["validation"], self.labels["validation"]).item()

    def greedy(self) -> dict[str, Tensor]:
        kept, best = self.order[:1], self.found[self.order[0]]
        for name in self.order[1:]:
            tried = self.mean([*kept, name])
            if self.accuracy(tried) >= self.accuracy(best):
                kept, best = [*kept, name], tried
        return best

    def segment(self) -> dict[str, Tensor]:
        first, second = self.order[:2]
        tried = [self.mixed({first: 1 - share, second: share}) for share in SHARES]
        return max(tried, key=self.accuracy)

    def measured(self) -> dict[str, float]:
        """Test accuracy by way, with ``single``, and ``oracle``, the candidate that tests best."""
        best = [self.found[name] for name in self.order[:2]]
        together = {part: torch.stack([one[part].softmax(1) for one in best]).mean(0) for part in best[0]}
        parts = [name for name in CANDIDATES if name != "all"]
        logits = {
            "two": self.mean(self.order[:2]),
            "every": self.mean(self.order),
            "greedy": self.greedy(),
            "segment": self.segment(),
            "ensemble": together,
            "sum": self.mixed(dict.fromkeys(parts, 1.0)),
        }
        tested = {name: self.accuracy(one, "test") for name, one in self.found.items()}
        found = {way: self.accuracy(one, "test") for way, one in logits.items()}
        return {"single": tested[self.order[0]], **found, "oracle": max(tested.values())}


def table(cells: Mapping[tuple[str, str], Sequence[Mapping[str, float]]], seeds: Sequence[int]) -> TextTable:
    """Points above the single candidate: mean over corruptions and networks, over CIFAR-Flip, and over all."""
    means = {what: {way: fmean(one[way] for one in found) for way in found[0]} for what, found in cells.items()}
    lines = []
    for way in (*WAYS, "oracle"):
        gains = {what: found[way] - found["single"] for what, found in means.items()}
        own = [[gain for (_, task), gain in gains.items() if (task == "flip") is flipped] for flipped in (False, True)]
        shown = [plus_minus(some, sign="+") for some in [*own, list(gains.values())]]
        ends = [f"{100 * end(gains.values()):+.1f}" for end in (min, max)]
        lines.append([way, *shown, *ends])
    single = fmean(found["single"] for found in means.values())
    caption = (
        f"Points of test accuracy above the candidate that validates best, which has {100 * single:.1f}% on average; "
        f"mean over {len(means)} cells (network and task, seeds {', '.join(map(str, seeds))}) ± half the 95% interval "
        "(Student's t) over cells. Oracle: the candidate that tests best, which nobody can choose."
    )
    return TextTable(["way", "CIFAR-10-C", "CIFAR-Flip", "all", "worst cell", "best cell"], lines, caption)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", required=True, help="what recipes/cifar10c.py measured")
    add("--adapters", metavar="FOLDER", help="the adapters of these rows; needed where a cell is not in --ledger yet")
    add("--data", help="folder of <corruption>.parquet")
    add("--models", help="folder with the networks' weights; default: PEFT_SURGICAL_SHARED")
    add("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS), help="default: %(default)s")
    add("--seeds", nargs="+", type=int, default=[0], help="default: 0")
    add("--ledger", help="finished cells; default: soups.jsonl beside --rows")
    add("--markdown", metavar="FILE", help="also write the table to this file")
    args = parser.parse_args(argv)
    rows, ledger = Ledger(args.rows).runs(), Ledger(args.ledger or Path(args.rows).with_name("soups.jsonl"))
    tasks = sorted({run.key["task"] for run in rows})
    cells: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for network in args.networks:
        for task in tasks:
            found: list[Mapping[str, Any]] = []
            for seed in args.seeds:
                key = {"recipe": "soups", "network": network, "task": task, "seed": seed}
                if ledger.find(key) is None and (runs := chosen_runs(rows, network, task, seed, CANDIDATES)):
                    if not (args.adapters and args.data):
                        parser.error(f"{network} on {task} is not in {ledger.file}: give --adapters and --data")
                    ledger.append(key, _Cell(args, network, task, runs).measured())
                    print(f"{network}, {task}, seed {seed}: {ledger.find(key)}", flush=True)
                found += [result] if (result := ledger.find(key)) else []
            if len(found) == len(args.seeds):
                cells[network, task] = found
    if not cells:
        raise DataError(f"{args.rows} has no task with rows of {', '.join(CANDIDATES)} for seeds {args.seeds}")
    shown = table(cells, args.seeds)
    shown.show()
    if args.markdown:
        shown.save(args.markdown)


if __name__ == "__main__":
    sys.exit(run_in_words(main))
