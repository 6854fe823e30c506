"""What becomes of a study's adapter: its card beside it, and, where asked for, its place on the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from peft_surgical.adapters.adapter import read_adapter
from peft_surgical.data.layouts import is_hub_id
from peft_surgical.errors import ConfigError
from peft_surgical.evaluation import Report
from peft_surgical.experiment.outputs import LOADING
from peft_surgical.hub.cards import About, card_of
from peft_surgical.hub.pushing import push_adapter
from peft_surgical.keys import CARD, REPORT

from .findings import ADAPTER


def check_handover(args: argparse.Namespace, *, has_source_step: bool, by_name: bool) -> None:
    """Refuse a push that could not end well, before anything is trained.

    Args:
        args: Options of `protocol.parser_of`.
        has_source_step: Whether the network would be trained on the source first.
        by_name: Whether `load_base` opens the network.

    Raises:
        ConfigError: Names what is missing, and how to give it.
    """
    if args.push_to_hub is None:
        return
    if args.license is None:
        raise ConfigError("--push-to-hub: the adapter's card needs its licence: give --license, such as apache-2.0")
    if has_source_step and args.source_checkpoint is None:
        raise ConfigError(
            "--push-to-hub: the adapter would be of a network that only this folder has. Push the network of the "
            "source step first, and give its id by --source-checkpoint"
        )
    if not by_name:
        raise ConfigError(
            f"--push-to-hub: others cannot open {args.model!r} by its name. Leave it out, and push the adapter by "
            "peft_surgical.hub.push_adapter(..., loading=...), which says how"
        )


def datasets_of(args: argparse.Namespace) -> list[str]:
    """The data's repository, where it is one."""
    on_hub = args.data is not None and is_hub_id(str(args.data)) and not Path(args.data).expanduser().exists()
    return [str(args.data)] if on_hub else []


def hand_over(args: argparse.Namespace, report: Report, folder: Path) -> str | None:
    """Write the card beside the adapter, and push it where that is asked for.

    Without ``--license`` there is no card: nothing here knows the licence, and a card does not guess.

    Args:
        args: Options of `protocol.parser_of`.
        report: Of the study.
        folder: Of the study.

    Returns:
        The address of the pushed commit, or None.

    Raises:
        SurgicalError: The Hub refused, or the adapter is not what was evaluated.
    """
    adapter = folder / ADAPTER
    if not adapter.is_dir():
        return None
    (adapter / CARD).unlink(missing_ok=True)  # PEFT's own, which is not filled in
    if args.license is not None:
        lines = LOADING.format(report=str(adapter / REPORT), folder=str(adapter))
        about = About(
            repo=args.push_to_hub or f"local/{folder.name}",
            license=args.license,
            datasets=tuple(datasets_of(args)),
            base=report.model,
            loading=lines,
            opens=False,
        )
        saved = read_adapter(adapter)
        card_of(saved.config, report, saved.summary(), about).save(adapter / CARD)
    if args.push_to_hub is None:
        return None
    pushed = push_adapter(adapter, args.push_to_hub, license=args.license, datasets=datasets_of(args), report=report)
    return pushed.url
