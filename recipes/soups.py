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

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from paper.cifar_cells import cell_parser, found_in_cells, images_of
from paper.cifar_networks import load_network
from paper.cifar_tables import BLOCKS
from peft_surgical import combine_adapters
from peft_surgical.errors import DataError, run_in_words
from peft_surgical.evaluation import TextTable, plus_minus, predict_logits
from peft_surgical.training.ledger import Run

CANDIDATES = ("all", *BLOCKS)
WAYS = ("two", "every", "greedy", "segment", "ensemble", "sum")
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the second best candidate that are tried on the segment; of those that validate equally the smallest."""


class _Cell:
    """The candidates of one network, task and seed, and the images that validate and test."""

    def __init__(self, args: argparse.Namespace, network: str, task: str, runs: Mapping[str, Run]) -> None:
        images = images_of(args.data, network, task, runs["all"])
        self.base = load_network(network, args.models)
        self.images = {part: images[part][0] for part in ("validation", "test")}
        self.labels = {part: images[part][1] for part in ("validation", "test")}
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
        logits = {
            "two": self.mean(self.order[:2]),
            "every": self.mean(self.order),
            "greedy": self.greedy(),
            "segment": self.segment(),
            "ensemble": together,
            "sum": self.mixed(dict.fromkeys(BLOCKS, 1.0)),
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
    parser = cell_parser(__doc__)
    adapters = "the adapters of these rows; needed where a cell is not in --ledger yet"
    parser.add_argument("--adapters", metavar="FOLDER", help=adapters)
    args = parser.parse_args(argv)
    found = found_in_cells(
        parser,
        args,
        "soups",
        CANDIDATES,
        lambda network, task, runs: _Cell(args, network, task, runs).measured(),
        found_for=lambda runs: {"adapters": [run.result["adapter"] for run in runs.values()]},
        needed=("adapters", "data"),
    )
    shown = table({what: [one for _, one in each] for what, each in found.items()}, args.seeds)
    shown.show()
    if args.markdown:
        shown.save(args.markdown)


if __name__ == "__main__":
    sys.exit(run_in_words(main))
