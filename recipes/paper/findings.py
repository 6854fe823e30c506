"""What a study leaves in its folder: report, table, figure, and the adapter of the row that validates best."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn

from peft_surgical.adapters.adapter import read_adapter
from peft_surgical.data.layouts import is_hub_id
from peft_surgical.errors import ConfigError
from peft_surgical.evaluation import Measurement, Report, TextTable, measure
from peft_surgical.experiment.comparison import TABLE, bars, chosen_of, rule_of
from peft_surgical.experiment.experiment import Experiment
from peft_surgical.experiment.keeping import Kept, keep_adapter
from peft_surgical.experiment.outputs import LOADING, draw_or_warn
from peft_surgical.experiment.subject import Rows
from peft_surgical.hub.cards import About, card_of
from peft_surgical.hub.pushing import push_adapter
from peft_surgical.keys import CARD, FIGURE, REPORT
from peft_surgical.results import published
from peft_surgical.training.ledger import Run
from peft_surgical.training.search import NONE

from .protocol import Protocol, rule_of_row

ADAPTER = "adapter"
"""Folder of the kept adapter, in that of the study."""


def write_study(
    protocol: Protocol,
    experiment: Experiment,
    found: Mapping[str, list[Run]],
    seeds: Sequence[int],
    *,
    unit: float = 1.0,
    forgetting: bool = False,
) -> Report:
    """Report, table, figure and adapter of a comparison that is complete.

    Args:
        protocol: What was compared.
        experiment: That ran it.
        found: Row -> runs to report, as `choosing.run_grid` gives them.
        seeds: In the order of the runs.
        unit: Share of a batch of all processes in one of those that costs are counted in.
        forgetting: Whether to measure the kept adapter on held-out images of the source.

    Raises:
        ConfigError: ``forgetting`` without such images.
        AdapterError: The adapter does not reload to what was evaluated.
    """
    folder, metrics = experiment.folder, experiment.metrics
    measured = [
        _measured(protocol, experiment, row, metric, runs, seeds) for row, runs in found.items() for metric in metrics
    ]
    best = _best(found)
    kept = None
    if best is not None:
        selection = {"asked": best, "rows": {row: _validation(runs) for row, runs in found.items()}}
        kept = keep_adapter(experiment, found[best][0], selection, folder / ADAPTER)
        if forgetting:
            measured += _forgotten(protocol, experiment, kept, seeds[0])
    data = experiment.data(seeds[0])
    settings = {
        **experiment.shared,
        "dataset": protocol.name,
        "seeds": list(seeds),
        "metrics": list(metrics),
        "batch": round(experiment.fitting.batch_size / unit),
        "parts": {part: len(rows) for part, rows in data.parts.items()},
        "data_parts": dict(data.origin),
        "published": dict(protocol.published),
        "reference": protocol.reference,
        "cost": {row: unit * fmean(run.result["cost"] for run in runs) for row, runs in found.items()},
        "chosen": {row: [chosen_of(run) for run in runs] for row, runs in found.items()},
        "by_seed": {row: [run.result["test"] for run in runs] for row, runs in found.items()},
        "versions": {name: version(name) for name in ("peft-surgical", "peft", "torch", "transformers")},
    }
    if best is not None and kept is not None:
        settings |= {
            "run": experiment.digest(found[best][0].key),
            "adapter": {"row": best, "seed": seeds[0], "rule": "best mean validation over seeds, of the first seed"},
            "open": kept.opening,
            "head": kept.head,
            "moved": kept.moved,
        }
    report = Report(experiment.model, best or NONE, tuple(measured), settings)
    first = [m for m in measured if m.name.startswith(f"{metrics[0]} of ")]
    title = f"{protocol.name}, test, 95% intervals"
    with published(folder) as stage:
        report.save(stage / REPORT)
        if kept is not None:
            (stage / ADAPTER).mkdir()
            report.save(stage / ADAPTER / REPORT)
        (stage / TABLE).write_text(findings_table(protocol, report, list(found)), encoding="utf-8")
        draw_or_warn(lambda: bars(first, list(found), f"{metrics[0].replace('_', ' ')} (%)", title, stage / FIGURE))
    experiment.tidy()
    return report


def _measured(
    protocol: Protocol, experiment: Experiment, row: str, metric: str, runs: list[Run], seeds: Sequence[int]
) -> Measurement:
    name, dataset, rule = f"{metric} of {row}", f"{protocol.name}, test", rule_of_row(row) or rule_of(experiment, row)
    if "measured" not in runs[0].result:
        n = len(experiment.rows("test", seeds[0]))
        return measure(name, [run.result["test"] for run in runs], dataset=dataset, n=n, seeds=seeds, selection=rule)
    numbers = [run.result["measured"][metric] for run in runs]
    n = min(number[3] for number in numbers)
    if len(runs) > 1:
        return measure(name, [number[0] for number in numbers], dataset=dataset, n=n, seeds=seeds, selection=rule)
    value, low, high, n = numbers[0]
    interval = "MOVER" if metric == "average_group_accuracy" else "wilson"
    return Measurement(name, dataset, value, low, high, interval, n, tuple(seeds), rule)


def _best(found: Mapping[str, list[Run]]) -> str | None:
    """The row that tunes something and validates best over the seeds; of equals the first."""
    tuned = {row: _validation(runs) for row, runs in found.items() if runs[0].key["method"] != NONE}
    return max(tuned, key=lambda row: tuned[row]) if tuned else None


def _validation(runs: list[Run]) -> float:
    return fmean(run.result["validation"] for run in runs)


def held_out(protocol: Protocol, parts: Mapping[str, Any]) -> Any:
    """The images of the source that nothing was trained on.

    Raises:
        ConfigError: There are none.
    """
    for name in ("source_test", "source_validation"):
        if name in parts:
            return parts[name]
    raise ConfigError(f"--forgetting: {protocol.name} has no held-out images of the source here; leave it out")


def source_accuracy(protocol: Protocol, experiment: Experiment, network: nn.Module, seed: int) -> tuple[float, int]:
    """Accuracy of a network on the held-out images of the source, and how many these are."""
    part = held_out(protocol, experiment.data(seed).parts)
    rows = Rows(part, experiment.base(seed).transform_eval, False, experiment.outputs)
    found = experiment.judge(["accuracy"], experiment.logits(network, rows), rows.label_tensor, None)
    return found["accuracy"], len(rows)


def _forgotten(protocol: Protocol, experiment: Experiment, kept: Kept, seed: int) -> list[Measurement]:
    measured = []
    for name, network in (("accuracy before", experiment.base(seed).model), ("accuracy", kept.model)):
        value, n = source_accuracy(protocol, experiment, network, seed)
        rule = "none" if name == "accuracy before" else "the adapter that is kept; no source image selects"
        dataset = f"{protocol.name}, source"
        measured.append(measure(name, [value], dataset=dataset, n=n, seeds=[seed], selection=rule))
    return measured


def findings_table(protocol: Protocol, report: Report, rows: Sequence[str]) -> str:
    """The comparison as Markdown, with what the paper reports beside it."""
    metrics, settings = report.settings["metrics"], report.settings
    header = ["row", *(f"{metric.replace('_', ' ')} (%)" for metric in metrics), "paper (%)", "cost", "chosen"]
    lines = []
    for row in rows:
        found = [report.find(f"{metric} of {row}") for metric in metrics]
        numbers = [f"{100 * m.value:.1f} ({100 * m.low:.1f} to {100 * m.high:.1f})" for m in found]
        number = protocol.published.get(row)
        chosen = ", ".join(dict.fromkeys(settings["chosen"][row]))
        lines.append([row, *numbers, "-" if number is None else f"{number:g}", f"{settings['cost'][row]:.0f}", chosen])
    rules = "; ".join(dict.fromkeys(report.find(f"{metrics[0]} of {row}").selection for row in rows))
    seeds = ", ".join(map(str, settings["seeds"]))
    kind = "over images" if len(settings["seeds"]) == 1 else "Student's t over seeds, which draw what tunes"
    paper = (
        f"Paper: {protocol.reference}, with another source network and other draws"
        if protocol.published
        else "The paper has no numbers for this network, optimizer and target"
    )
    caption = (
        f"{protocol.name}, {report.model}: test part, n = {settings['parts']['test']} images, seeds {seeds}, 95% "
        f"intervals ({kind}). Selection: {rules}; no test image selects. Cost: steps of a run, or of a "
        f"whole search, with batches of {settings['batch']}. {paper}."
    )
    return TextTable(header, lines, caption).markdown()


# --- What becomes of a study's adapter: its card beside it, and, where asked for, its place on the Hub. ---


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
        report: Report of the study.
        folder: Folder of the study.

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
