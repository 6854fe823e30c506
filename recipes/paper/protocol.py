"""A published protocol as a value, and the command line that every recipe makes of it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft_surgical.bases.transforms import AUGMENTS
from peft_surgical.choosing.methods import METHODS
from peft_surgical.evaluation.judging import check_metrics
from peft_surgical.training.fitting import OPTIMIZERS, FitSettings
from peft_surgical.training.search import NONE

from .pretraining import SourceTraining


@dataclass(frozen=True)
class Protocol:
    """How a paper adapts a network to a data set: the defaults of a recipe's options.

    Attributes:
        name: Of the data set.
        data: What ``--data`` is by default, a Hub id; None where it has to be given.
        layouts: What ``--data`` may be, in words.
        model: Id of the network that the paper tunes.
        rows: Targets, methods and searches of the comparison; ``none`` leaves the network as it is.
        lrs: Learning rates to choose from.
        head_lrs: The same where the head alone is tuned.
        fitting: How a run is trained; rate and seed are set for each.
        metrics: Names of `judging.JUDGES`; the first selects.
        source: How the network is first trained on the source domain; None where the pretrained one is used as it is.
        published: Row -> what the paper reports, in percent.
        reference: Where in the paper all this is.
        rates: Optimizer -> what to choose from in place of ``lrs`` and ``head_lrs`` where the user asks for it.
        chosen: Options (``lr``, ``batch_size``, ...) whose defaults are chosen here, since the paper's are not known.
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
    reference: str = ""
    rates: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = field(default_factory=dict)
    chosen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_metrics(self.metrics)

    @property
    def folder(self) -> str:
        """Default of ``--output``."""
        return f"outputs/{self.name.lower().replace(' ', '_')}"


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
        origin = "chosen here" if option in protocol.chosen else paper
        return f"default: {default} ({origin})" if origin else f"default: {default}"

    def rates(option: str, default: tuple[float, ...], place: int) -> str:
        asked = {fitting.optimizer: default} | {name: pair[place] for name, pair in protocol.rates.items()}
        said = [f"{' '.join(f'{rate:g}' for rate in values)} with {name}" for name, values in asked.items()]
        return stated(option, ", ".join(said) if len(said) > 1 else said[0].partition(" with ")[0])

    data = parser.add_argument_group("data and network")
    brought = {"required": True} if protocol.data is None else {"default": protocol.data}
    shown = "" if protocol.data is None else "; default: %(default)s"
    data.add_argument("--data", metavar="PATH", help=f"{protocol.layouts}{shown}", **brought)
    data.add_argument(
        "--model",
        default=protocol.model,
        metavar="ID",
        help=f"a timm id, a transformers id, or a folder; {stated('model')}",
    )
    if protocol.source is not None:
        data.add_argument(
            "--source-checkpoint",
            metavar="ID",
            help="a network that is trained on the source already, by id or folder: the source step is left out",
        )
        data.add_argument("--source-only", action="store_true", help="stop after the source step")
        data.add_argument(
            "--source-epochs",
            type=int,
            default=protocol.source.fitting.epochs,
            metavar="N",
            help=f"default: %(default)s ({protocol.source.reference})",
        )
    data.add_argument(
        "--tuning-images", type=int, metavar="N", help=f"images to tune on; default: the paper's ({paper})"
    )
    data.add_argument("--validation-images", type=int, metavar="N", help="images to choose with; default: as above")
    data.add_argument(
        "--augment", choices=AUGMENTS, default="none", help="of the images to tune on; default: %(default)s"
    )

    rows = parser.add_argument_group("what is compared")
    rows.add_argument(
        "--target",
        nargs="+",
        default=[],
        metavar="T",
        help="targets to tune, such as block1, block2-4, 'stem + block1', all, and searches: auto, race, cross-val, "
        f"greedy; default, with the methods: {' '.join(protocol.rows)}",
    )
    rows.add_argument(
        "--method",
        nargs="+",
        default=[],
        metavar="M",
        help=f"methods instead of, or beside, targets: {', '.join(METHODS)}",
    )
    rows.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="S", help="default: 0 1 2")
    rows.add_argument(
        "--forgetting", action="store_true", help="also measure the kept adapter on held-out images of the source"
    )

    run = parser.add_argument_group("how a run is trained")
    run.add_argument(
        "--lr",
        nargs="+",
        type=float,
        default=protocol.lrs,
        help=f"rates to choose from; {rates('lr', protocol.lrs, 0)}",
    )
    run.add_argument(
        "--head-lr",
        nargs="+",
        type=float,
        default=protocol.head_lrs,
        help=f"the same for the head alone; {rates('head_lr', protocol.head_lrs, 1)}",
    )
    run.add_argument(
        "--optimizer",
        choices=tuple(OPTIMIZERS),
        default=fitting.optimizer,
        action=_with_rates(protocol),
        help=stated("optimizer"),
    )
    run.add_argument(
        "--scheduler", choices=("constant", "cosine", "linear"), default=fitting.lr_scheduler, help=stated("scheduler")
    )
    run.add_argument("--epochs", type=int, default=fitting.epochs, help=stated("epochs"))
    run.add_argument(
        "--batch-size", type=int, default=fitting.batch_size, help=f"of all processes together; {stated('batch_size')}"
    )
    run.add_argument(
        "--accumulation",
        type=int,
        default=1,
        help="parts that a process takes its share of a batch in, to save memory; default: %(default)s",
    )
    run.add_argument(
        "--weight-decay",
        type=float,
        default=fitting.weight_decay,
        help=f"pulls towards the pretrained weights, where the paper's pulls towards zero; {stated('weight_decay')}",
    )
    run.add_argument("--norm-stats", choices=("frozen", "target", "all"), default="frozen", help="default: %(default)s")
    run.add_argument("--precision", choices=("bf16", "fp16"), help="default: float32")

    out = parser.add_argument_group("output and machine")
    out.add_argument(
        "--output", default=protocol.folder, metavar="DIR", help="default: %(default)s; goes on from there"
    )
    out.add_argument("--dry-run", action="store_true", help="show what would be done, and train nothing")
    out.add_argument(
        "--report-to", default="none", help="tensorboard, wandb, ...: as for Trainer; default: %(default)s"
    )
    out.add_argument("--push-to-hub", metavar="REPO", help="push the kept adapter with its card and report")
    out.add_argument("--license", help="of the adapter, such as apache-2.0: without it there is no card")
    out.add_argument(
        "--spread",
        choices=("batches", "runs"),
        default="batches",
        help="what several processes share: the batches of each run (DDP), or the runs; default: %(default)s",
    )
    out.add_argument("--workers", type=int, default=0, metavar="N", help="processes that load images; default: 0")
    out.add_argument("--cpu", action="store_true", help="leave an accelerator alone")
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
