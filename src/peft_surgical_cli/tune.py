"""``peft-surgical tune`` and ``compare``: choose what to tune on one's own images, and methods side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from .options import ImagesArgument, Model, Output, SharedOptions, with_shared_options
from .terminal import console, table

if TYPE_CHECKING:
    from peft_surgical.experiment.outputs import Tuned


@with_shared_options
def tune_command(
    model: Model,
    data: ImagesArgument,
    output: Output,
    shared: SharedOptions,
    target: Annotated[
        str,
        typer.Option(
            help="What to tune: block2, 'block1 + head', all; auto-rgn, auto-snr, auto-fisher or auto-sensitivity, "
            "which tune the blocks that score best (as a method, auto-rgn trains all tensors, each at its own rate: "
            "--method auto-rgn); or a search that trains candidates: race, cross-val, greedy, and auto, which compares "
            "each third of the network, all of it and the head, looks for the learning rate, and trains the best on "
            "all labelled images.",
        ),
    ] = "auto",
    method: Annotated[str | None, typer.Option(help="Instead: a method, such as auto-rgn, lp-ft or full.")] = None,
    num_blocks: Annotated[
        int | None, typer.Option(min=1, help="With auto-rgn and the like: so many neighbours.", show_default="1")
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Or: at most this share of the parameters.")] = None,
    source: Annotated[str | None, typer.Option(help="Data to measure forgetting on.")] = None,
    seed: Annotated[int, typer.Option(help="Of drawn parts, training order and a new head.")] = 0,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Then push the adapter to the Hub; the command `push` says more."),
    ] = None,
) -> None:
    """Tune a part of a network on one's own images; the adapter, a report and a figure are written to a folder.

    Run again after Ctrl-C, the same command goes on from where it was. It also takes the options of transformers'
    script run_image_classification.py, such as --model_name_or_path and --train_dir.
    """
    import transformers

    from peft_surgical.experiment.api import tune

    transformers.logging.set_verbosity_error()
    found = tune(
        model,
        data,
        target,
        method=method,
        num_blocks=num_blocks,
        budget=budget,
        source=source,
        output=output,
        seed=seed,
        **shared.settings(),
    )
    if found is not None:
        _print(found, str(output))
        if push is not None and found.adapter is not None:
            from peft_surgical.hub import push_adapter

            done = push_adapter(found.adapter, push, datasets=_on_hub(data), complete=False)
            console().print(escape(f"Pushed: {done.url}"), soft_wrap=True)


def _on_hub(data: str) -> list[str]:
    """The repository that holds the data, for a card; none where it is a file or folder here."""
    return [] if Path(data).expanduser().exists() else [data.partition(":")[0]]


def _print(found: Tuned, folder: str) -> None:
    from peft_surgical.evaluation.selected import Gain
    from peft_surgical.experiment.outputs import LOADING
    from peft_surgical.keys import CONFIG, FIGURE, REPORT, WEIGHTS
    from peft_surgical.training.ledger import Ledger

    out, report, settings = console(), found.report, found.report.settings
    rate = "" if settings["lr"] is None else f", learning rate {settings['lr']:g}"
    cost, seconds, saved = settings["cost"], settings["taken"]["seconds"], settings["taken"]["saved"]
    title = f"{report.model}: {report.target}{rate}; all runs together cost {cost:.0f} training steps"
    title += "" if seconds is None else f" in {seconds:.0f} s"
    title += f", of which the cached prefix saved {saved / cost:.0%}" if cost and saved > 0 else ""
    numbers = ("%", "95% interval", "n")
    rows = table("", "data", *numbers, "selection", title=escape(title), numbers=numbers)
    for one in report:
        ends = f"{100 * one.low:.1f} to {100 * one.high:.1f}"
        cells = (one.name, one.dataset, f"{100 * one.value:.1f}", ends, str(one.n), one.selection)
        rows.add_row(*map(escape, cells))
    out.print(rows)
    out.print()
    if (gain := (settings["selection"] or {}).get("gain")) is not None:
        out.print(f"{Gain(**gain)}.", soft_wrap=True)
    if (looked := settings.get("test")) is not None:
        found_of = looked["accuracy_of_class"].items()
        shares = [f"{escape(name)} {100 * share:.0f} %" for name, share in found_of if share is not None]
        out.print(
            f"By class, on test images: {', '.join(shares[:20])}. {looked['mistakes']} are wrong.", soft_wrap=True
        )
    if settings["head"] != "kept":
        out.print(f"The head is {settings['head']}.", soft_wrap=True)
    if found.adapter is None:
        out.print("Not to tune validates best: there is no adapter. The model stays as it is.", soft_wrap=True)
    runs = Ledger(found.folder / "ledger.jsonl")
    others = f"{REPORT} (these numbers), {FIGURE}, {runs.file.name} ({len(runs)} runs)"
    adapter = "" if found.adapter is None else f"the adapter ({WEIGHTS}, {CONFIG}), "
    out.print(escape(f"In {folder}: {adapter}{others}"), soft_wrap=True)
    if found.adapter is not None:
        out.print("Reloaded from there, it gives the same logits bit for bit. To load it:\n")
        out.print(escape(LOADING.format(report=f"{folder}/{REPORT}", folder=folder)), soft_wrap=True)


@with_shared_options
def compare_command(
    model: Model,
    data: ImagesArgument,
    output: Output,
    shared: SharedOptions,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="none, targets (block1, 'block1 + head', all), methods (auto-rgn, lp-ft, l2-sp, ...) and searches "
            "(race, cross-val, greedy, auto).",
            show_default="none all head block1 auto-rgn race",
        ),
    ] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="One or more.", show_default="0 1 2")] = None,
) -> None:
    """Compare methods on one's own images, over seeds; learning rates are chosen on the validation images of seed 0.

    Run again after Ctrl-C, the same command goes on from where it was. Under
    `accelerate launch --num_processes N -m peft_surgical compare ...` processes share the runs.
    """
    import transformers

    from peft_surgical.errors import RowsFailedError
    from peft_surgical.experiment.api import compare
    from peft_surgical.experiment.comparison import HEADINGS, TABLE, compared
    from peft_surgical.keys import FIGURE, REPORT

    transformers.logging.set_verbosity_error()
    given: dict[str, Any] = {name: value for name, value in (("methods", methods), ("seeds", seeds)) if value}
    found = compare(model, data, output=output, **given, **shared.settings())
    if found is None:
        return
    out = console()
    shown = table(*HEADINGS, numbers=HEADINGS[1:-1])
    for cells in compared(found.report):
        shown.add_row(*map(escape, cells))
    out.print(shown)
    out.print()
    out.print(escape(found.report.settings["caption"]), soft_wrap=True)
    out.print(escape(f"In {output}: {REPORT}, {TABLE}, {FIGURE}, ledger.jsonl"), soft_wrap=True)
    if found.failed:
        raise RowsFailedError(dict(found.rows), dict(found.failed))
