"""``peft-surgical push ADAPTER REPO``: an adapter with its card, report and figure, to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.markup import escape

from .pull import BaseOption
from .terminal import console


def push_command(
    adapter: Annotated[Path, typer.Argument(help="A folder that save_pretrained or tune wrote.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="owner/name; made if it does not exist.", show_default=False)],
    license: Annotated[
        str | None, typer.Option("--license", help="Of the deltas, by the Hub's identifier.", show_default=False)
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="What it was tuned on, a Hub id or more.", show_default=False)
    ] = None,
    no_dataset: Annotated[bool, typer.Option("--no-dataset", help="That is not on the Hub.")] = False,
    base: BaseOption = None,
    report: Annotated[Path | None, typer.Option(help="Its numbers.", show_default="report.json beside it")] = None,
    comparison: Annotated[
        list[Path] | None, typer.Option(help="Reports of other targets, such as none and all.", show_default=False)
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="A .png file.", show_default="figure.png beside it")] = None,
    license_name: Annotated[str | None, typer.Option(help="Of --license other.", show_default=False)] = None,
    license_link: Annotated[str | None, typer.Option(help="Of --license other.", show_default=False)] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Further tags of the card.", show_default=False)] = None,
    private: Annotated[bool, typer.Option("--private", help="Make it a private repository.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch.", show_default="main")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload a surgical adapter",
) -> None:
    """Upload an adapter in one commit, after everything about it has been checked."""
    from peft_surgical.errors import ConfigError
    from peft_surgical.hub.pushing import push_adapter

    if dataset and no_dataset:
        raise ConfigError("--dataset and --no-dataset contradict each other: give one of them")
    done = push_adapter(
        adapter,
        repo,
        license=license,
        datasets=[] if no_dataset else dataset or None,
        report=report,
        comparison=comparison or (),
        figure=figure,
        base=base,
        license_name=license_name,
        license_link=license_link,
        tags=tag or (),
        private=True if private else None,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
    )
    out = console()
    weights = adapter / "adapter_model.safetensors"
    out.print(escape(f"{done.url}\n{', '.join(done.files)}; the weights have {decimal(weights.stat().st_size)}"))
    if done.pr_url:
        out.print(escape(f"Pull request: {done.pr_url}"))
    out.print(escape(f"SHA-256 {done.sha256}\nTo load it:\n"))
    at = "" if done.revision == "main" else f", revision={done.revision!r}"
    out.print(escape(f"from peft_surgical.hub import load_adapted\n\nmodel = load_adapted({repo!r}{at})"))
