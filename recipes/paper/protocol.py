"""A published protocol as a value, and the command line that every recipe makes of it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft_surgical.bases.transforms import AUGMENTS
from peft_surgical.choosing.methods import METHODS
from peft_surgical.evaluation.metrics import check_metrics
from peft_surgical.training.fitting import OPTIMIZERS, FitSettings
from peft_surgical.training.ledger import Run
from peft_surgical.training.search import NONE, SELECTION_SEED, Candidate

from .pretraining import SourceTraining

_TUNED = ("full", "gradual-first-last", "gradual-last-first", "l1-sp", "auto-snr", "auto-rgn", "cross-val")
TABLE_4 = (NONE, *_TUNED)
"""The rows of the paper's Table 4, by the names of their methods here."""
CROSS_VAL, CROSS_VAL_WIDE = "cross-val", "cross-val-wide"
"""The paper's Cross-Val, whose candidates are the blocks; and the package's search, which also has all and none."""
AUTO_SNR = "auto-snr"
"""The method whose threshold the paper tunes."""
THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Its candidates here; the paper says that it tunes the threshold, not among which."""


@dataclass(frozen=True)
class Protocol:
    """How a paper adapts a network to a data set: the defaults of a recipe's options.

    Attributes:
        name: Name of the data set.
        data: What ``--data`` is by default, a Hub id; None where it has to be given.
        layouts: What ``--data`` may be, in words.
        model: Id of the network that the paper tunes.
        rows: Targets, methods and searches of the comparison; ``none`` leaves the network as it is.
        lrs: Learning rates to choose from.
        head_lrs: The same where the head alone is tuned.
        fitting: How a run is trained; rate and seed are set for each.
        metrics: Names of `evaluation.metrics.JUDGES`; the first selects.
        source: How the network is first trained on the source domain; None where the pretrained one is used as it is.
        published: Row -> what the paper reports, in percent, for this model and optimizer.
        published_elsewhere: (model, optimizer) -> the same for others that the paper has, too.
        reference: Where in the paper all this is.
        rates: Optimizer -> what to choose from in place of ``lrs`` and ``head_lrs`` where the user asks for it.
        sources: Setting (``lr``, ``batch_size``, ``tuning``, ...) -> where it is from, if not from ``reference``: a
            place in the paper or its reference code; ``chosen here`` where neither says; ``departure: `` and what they
            say.
        parts: Part of the data -> what it is, for `audit`.
    """

    name: str
    data: str | None
    layouts: str
    model: str
    rows: tuple[str, ...]
    lrs: tuple[float, ...]
    head_lrs: tuple[float, ...]
    fitting: FitSettings
    metrics: tuple[str, ...] = ("accuracy",)
    source: SourceTraining | None = None
    published: Mapping[str, float] = field(default_factory=dict)
    published_elsewhere: Mapping[tuple[str, str], Mapping[str, float]] = field(default_factory=dict)
    reference: str = ""
    rates: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_metrics(self.metrics)

    @property
    def folder(self) -> str:
        """Default of ``--output``."""
        return f"outputs/{self.name.lower().replace(' ', '_')}"


def as_asked(protocol: Protocol, args: argparse.Namespace) -> Protocol:
    """The protocol with the paper's numbers for the model and optimizer that a user asks for; none where it has none.

    A folder counts as the protocol's model, of which it may be a copy.

    Args:
        protocol: With the numbers of its own model and optimizer.
        args: Options of `parser_of`.
    """
    model = protocol.model if Path(args.model).expanduser().is_dir() else args.model
    if (model, args.optimizer) == (protocol.model, protocol.fitting.optimizer):
        return protocol
    return replace(protocol, published=protocol.published_elsewhere.get((model, args.optimizer), {}))


def parser_of(protocol: Protocol, doc: str | None) -> argparse.ArgumentParser:
    """The options that all recipes share, with the protocol's defaults; a recipe adds its own.

    Args:
        protocol: The defaults.
        doc: The recipe's docstring, shown by ``--help``.
    """
    # A recipe may give an option anew, such as several numbers of images in place of one.
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, conflict_handler="resolve"
    )
    fitting, paper = protocol.fitting, protocol.reference

    def stated(option: str, default: str = "%(default)s") -> str:
        origin = protocol.sources.get(option, paper)
        return f"default: {default} ({origin})" if origin else f"default: {default}"

    def rates(option: str, default: tuple[float, ...], place: int) -> str:
        asked = {fitting.optimizer: default} | {name: pair[place] for name, pair in protocol.rates.items()}
        said = [f"{' '.join(f'{rate:g}' for rate in values)} with {name}" for name, values in asked.items()]
        return stated(option, ", ".join(said) if len(said) > 1 else said[0].partition(" with ")[0])

    add = parser.add_argument_group("data and network").add_argument
    brought: dict[str, Any] = {"required": True} if protocol.data is None else {"default": protocol.data}
    shown = "" if protocol.data is None else "; default: %(default)s"
    add("--data", metavar="PATH", help=f"{protocol.layouts}{shown}", **brought)
    opens = f"a timm id, a transformers id, or a folder; {stated('model')}"
    add("--model", default=protocol.model, metavar="ID", help=opens)
    if protocol.source is not None:
        trained = "a network that is trained on the source already, by id or folder: the source step is left out"
        add("--source-checkpoint", metavar="ID", help=trained)
        add("--source-only", action="store_true", help="stop after the source step")
        first, its = protocol.source.fitting, protocol.source.reference
        add("--source-epochs", type=int, default=first.epochs, help=f"default: {first.epochs} ({its})")
        how = f"default: {first.optimizer} ({its})"
        add("--source-optimizer", choices=tuple(OPTIMIZERS), default=first.optimizer, help=how)
        usual = {first.optimizer: first.lr} | dict(protocol.source.rates)
        said = ", ".join(f"{rate:g} with {name}" for name, rate in usual.items())
        add("--source-lr", type=float, help=f"default: {said} (chosen here)")
    where = protocol.sources.get("tuning", paper)
    add("--tuning-images", type=int, metavar="N", help=f"images to tune on; default: {where}")
    add("--validation-images", type=int, metavar="N", help="images to choose with; default: as above")
    add("--augment", choices=AUGMENTS, default="none", help="of the images to tune on; default: %(default)s")

    add = parser.add_argument_group("what is compared").add_argument
    targets = (
        "targets to tune, such as block1, block2-4, 'stem + block1', all, and searches: auto, race, greedy, "
        "cross-val over blocks, cross-val-wide also over all and none; "
        f"default, with the methods: {' '.join(protocol.rows)}"
    )
    add("--target", nargs="+", default=[], metavar="T", help=targets)
    methods = f"methods instead of, or beside, targets: {', '.join(METHODS)}; l1-sp@0.001 sets a method's option"
    add("--method", nargs="+", default=[], metavar="M", help=methods)
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="S", help="default: 0 1 2")
    shown = " ".join(f"{one:g}" for one in THRESHOLDS)
    snr = f"thresholds of auto-snr that validation chooses from, none for the package's; default: {shown} (chosen here)"
    add("--thresholds", nargs="*", type=float, default=THRESHOLDS, metavar="T", help=snr)
    held_out = "also measure the kept adapter on held-out images of the source"
    add("--forgetting", action="store_true", help=held_out)
    fifths = "for auto: each candidate trains so many fifths of a run; default: %(default)s"
    add("--effort", type=int, choices=range(1, 6), default=1, help=fifths)

    add = parser.add_argument_group("how a run is trained").add_argument
    tried = rates("lr", protocol.lrs, 0), rates("head_lr", protocol.head_lrs, 1)
    add("--lr", nargs="+", type=float, default=protocol.lrs, help=f"rates to choose from; {tried[0]}")
    add("--head-lr", nargs="+", type=float, default=protocol.head_lrs, help=f"the same for the head alone; {tried[1]}")
    own: dict[str, Any] = {"default": fitting.optimizer, "help": stated("optimizer")}
    add("--optimizer", choices=tuple(OPTIMIZERS), action=_with_rates(protocol), **own)
    schedules = ("constant", "cosine", "linear")
    add("--scheduler", choices=schedules, default=fitting.lr_scheduler, help=stated("scheduler"))
    add("--epochs", type=int, default=fitting.epochs, help=stated("epochs"))
    add("--batch-size", type=int, default=fitting.batch_size, help=f"of all processes together; {stated('batch_size')}")
    parts = "parts that a process takes its share of a batch in, to save memory; default: %(default)s"
    add("--accumulation", type=int, default=1, help=parts)
    pulls = "pulls towards the pretrained weights, where the paper's pulls towards zero"
    decay = fitting.weight_decay
    add("--weight-decay", type=float, default=decay, help=f"{pulls}; {stated('weight_decay')}")
    add("--norm-stats", choices=("frozen", "target", "all"), default="frozen", help="default: %(default)s")
    add("--precision", choices=("bf16", "fp16"), help="default: float32")

    add = parser.add_argument_group("output and machine").add_argument
    add("--output", default=protocol.folder, metavar="DIR", help="default: %(default)s; goes on from there")
    add("--dry-run", action="store_true", help="show what would be done, and train nothing")
    add("--report-to", default="none", help="tensorboard, wandb, ...: as for Trainer; default: %(default)s")
    add("--push-to-hub", metavar="REPO", help="push the kept adapter with its card and report")
    add("--license", help="of the adapter, such as apache-2.0: without it there is no card")
    share = "what several processes share: the batches of each run (DDP), or the runs; default: %(default)s"
    add("--spread", choices=("batches", "runs"), default="batches", help=share)
    add("--workers", type=int, default=0, metavar="N", help="processes that load images; default: 0")
    add("--cpu", action="store_true", help="leave an accelerator alone")
    recomputed = "compute what is frozen before the target again in every epoch: same results"
    add("--no-cache", action="store_true", help=recomputed)
    return parser


def _with_rates(protocol: Protocol) -> type[argparse.Action]:
    """``--optimizer``, which takes the rates of that optimizer along unless the user gives some, before or after."""

    class Chosen(argparse.Action):
        def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
            namespace.optimizer = values
            lrs, head_lrs = protocol.rates.get(values, (protocol.lrs, protocol.head_lrs))
            # What a user gives is a list, a default is a tuple.
            if isinstance(namespace.lr, tuple):
                namespace.lr = lrs
            if isinstance(namespace.head_lr, tuple):
                namespace.head_lr = head_lrs

    return Chosen


def rows_of(protocol: Protocol, target: Sequence[str], method: Sequence[str]) -> list[str]:
    """The rows that are asked for, ``none`` first, each once; the protocol's where none are."""
    asked = [*target, *method] or list(protocol.rows)
    return list(dict.fromkeys([NONE, *asked]))


def runs_behind(rows: Sequence[str], thresholds: Sequence[float], blocks: Sequence[str]) -> list[str]:
    """The rows that have to be run: Auto-SNR once for each threshold, and every block for Cross-Val."""
    return list(dict.fromkeys(name for row in rows for name in _behind(row, thresholds, blocks)))


def _behind(row: str, thresholds: Sequence[float], blocks: Sequence[str]) -> list[str]:
    if row == AUTO_SNR and thresholds:
        return [f"{AUTO_SNR}@{one:g}" for one in thresholds]
    return [*blocks] if row == CROSS_VAL else ["cross-val"] if row == CROSS_VAL_WIDE else [row]


def reported_rows(
    rows: Sequence[str], thresholds: Sequence[float], blocks: Sequence[str], found: Mapping[str, Sequence[Run]]
) -> dict[str, list[Run]]:
    """The rows that were asked for, from those behind them.

    Auto-SNR has the threshold that validates best on `SELECTION_SEED`, as rates are chosen, Cross-Val on each seed the
    block that validates best; both have the cost of all that were tried.

    Args:
        rows: That were asked for.
        thresholds: As for `runs_behind`.
        blocks: The network's, the head among them.
        found: Row of `runs_behind` -> its runs in the order of the seeds.
    """
    reported: dict[str, list[Run]] = {}
    for row in rows:
        tried = [list(found[name]) for name in _behind(row, thresholds, blocks)]
        if row not in (AUTO_SNR, CROSS_VAL) or len(tried) == 1:
            reported[row] = tried[0]
            continue
        by_seed = list(zip(*tried, strict=True))
        places = [run.key["seed"] for run in tried[0]]
        selecting = by_seed[places.index(SELECTION_SEED) if SELECTION_SEED in places else 0]
        reported[row] = []
        for same in by_seed:
            judged = selecting if row == AUTO_SNR else same
            place = max(range(len(same)), key=lambda i: judged[i].result["validation"])
            chosen = str(Candidate(same[place].key["method"], same[place].key["lr"]))
            cost = sum(run.result["cost"] for run in same)
            reported[row].append(Run(same[place].key, {**same[place].result, "cost": cost, "chosen": chosen}))
    return reported


def rule_of_row(row: str) -> str | None:
    """How `reported_rows` chooses, in words; None for rows that it leaves as they are."""
    rates = f"learning rates by validation of seed {SELECTION_SEED}, epoch by validation"
    if row == AUTO_SNR:
        return f"threshold and {rates}"
    return f"block by validation of each seed, {rates}" if row == CROSS_VAL else None


_OF_A_RUN = ("optimizer", "lr", "head_lr", "epochs", "batch_size", "scheduler", "weight_decay")
AUDITED = ("model", "tuning", "validation", "test", "source", *_OF_A_RUN)
"""Settings of `audit`, in order."""


def audit(protocol: Protocol, recipe: str) -> list[list[str]]:
    """Rows (recipe, setting, value here, verdict, source) of a protocol: what it is, and where that is from.

    The verdict is ``paper``, ``code`` for its reference code, ``ours`` where neither says, or ``departure``.
    """

    def rates(values: Sequence[float]) -> str:
        return ", ".join(f"{rate:g}" for rate in values)

    fitting, source = protocol.fitting, protocol.source
    values = {
        "model": protocol.model,
        **{part: protocol.parts.get(part, "") for part in ("tuning", "validation", "test")},
        "optimizer": fitting.optimizer,
        "lr": rates(protocol.lrs),
        "head_lr": rates(protocol.head_lrs),
        "epochs": str(fitting.epochs),
        "batch_size": str(fitting.batch_size),
        "scheduler": fitting.lr_scheduler,
        "weight_decay": f"{fitting.weight_decay:g}",
    }
    if source is not None:
        own = source.fitting
        values["source"] = f"{own.optimizer} {own.lr:g}, {source.method}, {own.epochs} epochs, batch {own.batch_size}"
    lines = []
    for setting in AUDITED:
        if setting in values:
            where = protocol.sources.get(setting, protocol.reference)
            where = source.reference if setting == "source" and source is not None else where
            verdicts = {"departure": "departure", "chosen here": "ours", "reference code": "code"}
            verdict = next((name for begins, name in verdicts.items() if where.startswith(begins)), "paper")
            lines.append([recipe, setting, values[setting], verdict, where.removeprefix("departure: ")])
    return lines
