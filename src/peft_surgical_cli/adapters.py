"""Commands on saved adapters: ``list``, ``pull``, ``push``, ``merge`` and ``to-lora``."""

from __future__ import annotations

import dataclasses
import json as to_json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.markup import escape

from .stored import adapters_in, by_base, cached_adapters
from .terminal import console, table

if TYPE_CHECKING:
    from peft_surgical.adapters.lora import LoraConversion

AdapterArgument = Annotated[str, typer.Argument(help="A folder, or owner/name on the Hub.", show_default=False)]
BaseOption = Annotated[str | None, typer.Option(help="The base, if the adapter does not name it.", show_default=False)]
Revision = Annotated[str | None, typer.Option(help="A branch, a tag or a commit.", show_default="main")]


def list_command(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Look below these, too.", exists=True, file_okay=False, show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the adapters that are at hand: the Hub's in the cache, and those in folders."""
    found = by_base([*cached_adapters(), *adapters_in(folders or [])])
    if json:
        typer.echo(to_json.dumps({base: [one.to_dict() for one in rows] for base, rows in found.items()}, indent=2))
        return
    out = console()
    for base, rows in found.items():
        shown = table("adapter", "target", "commit", "size", title=escape(base), numbers=("size",))
        for one in rows:
            commit = " ".join([*one.refs, (one.commit or "")[:12]]).strip()
            shown.add_row(
                escape(one.name), escape(one.target), escape(commit), decimal(one.bytes) if one.is_whole else "-"
            )
        out.print(shown)
        out.print()
    if not found:
        out.print("No adapters: pull one, or name folders to look below.")
    elif any(not one.is_whole for rows in found.values() for one in rows):
        out.print("-: not fetched as a whole; pull it again.")


def push_command(
    adapter: Annotated[Path, typer.Argument(help="A folder that save_pretrained or tune wrote.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="owner/name; made if it does not exist.", show_default=False)],
    license: Annotated[
        str | None,
        typer.Option("--license", help="Of the deltas, by the Hub's identifier.", show_default=False),
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="What it was tuned on, a Hub id or more.", show_default=False)
    ] = None,
    no_dataset: Annotated[bool, typer.Option("--no-dataset", help="What it was tuned on is not on the Hub.")] = False,
    base: BaseOption = None,
    report: Annotated[Path | None, typer.Option(help="Its report.", show_default="report.json beside it")] = None,
    comparison: Annotated[
        list[Path] | None, typer.Option(help="Reports of other targets, such as none and all.", show_default=False)
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="A .png file.", show_default="figure.png beside it")] = None,
    license_name: Annotated[str | None, typer.Option(help="Name, with --license other.", show_default=False)] = None,
    license_link: Annotated[str | None, typer.Option(help="Link, with --license other.", show_default=False)] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Further tags of the card.", show_default=False)] = None,
    private: Annotated[bool, typer.Option("--private", help="Make it a private repository.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch.", show_default="main")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str, typer.Option(help="Message of the commit.")] = "Upload a surgical adapter",
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


def pull_command(
    repo: Annotated[str, typer.Argument(help="owner/name on the Hub.", show_default=False)],
    output: Annotated[Path | None, typer.Option(help="Put it into this folder.", show_default="the cache")] = None,
    revision: Revision = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare it with the SHA-256 in its card.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Fetch again what is in the cache.")] = False,
) -> None:
    """Fetch an adapter and verify it: whole, unaltered, complete, finite."""
    from peft_surgical.hub.pulling import pull

    found = pull(repo, output, revision=revision, verify=verify, force=force)
    card = ", as in its card" if verify else ""
    console().print(escape(f"{found.folder}\ncommit {found.commit}\nSHA-256 {found.sha256}{card}"), soft_wrap=True)


def merge_command(
    adapter: AdapterArgument,
    output: Annotated[Path, typer.Option(help="A new folder for the checkpoint.", show_default=False)],
    revision: Revision = None,
    base: BaseOption = None,
) -> None:
    """Merge an adapter into its base; timm or transformers loads the result without this package."""
    from peft_surgical.hub.pulling import LOADING_MERGED, merge_to

    record = merge_to(adapter, output, revision=revision, base=base).record
    how = LOADING_MERGED[record.library or "timm"].format(folder=output)
    console().print(escape(f"{output}: {record.architecture}. To load it:\n\n{how}"), soft_wrap=True)


def to_lora_command(
    adapter: AdapterArgument,
    output: Annotated[Path, typer.Option(help="A new folder for the LoRA adapter.", show_default=False)],
    rank: Annotated[int | None, typer.Option(help="Rank of all factors.", show_default=False)] = None,
    energy: Annotated[
        float | None, typer.Option(help="Or: keep this share of each delta's squared norm.", show_default=False)
    ] = None,
    factors_only: Annotated[
        bool, typer.Option("--factors-only", help="Leave out norms, biases and grouped convolutions.")
    ] = False,
    revision: Revision = None,
    base: BaseOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write an adapter as a LoRA adapter that PEFT loads without this package."""
    from peft_surgical.adapters.adapter import new_folder, read_adapter
    from peft_surgical.adapters.lora import to_lora
    from peft_surgical.hub.pulling import open_adapted

    new_folder(output)  # before a base is fetched
    opened = open_adapted(adapter, revision=revision, base=base)
    source = dataclasses.replace(read_adapter(opened.folder), name=adapter)  # of a repository, the same commit
    network = opened.model.unload()
    found = to_lora(source, network, rank=rank, energy=energy, keep=not factors_only, output=output)
    if json:
        typer.echo(to_json.dumps(found.to_dict(), indent=2))
    else:
        _print_conversion(found, output)


def _print_conversion(found: LoraConversion, output: Path) -> None:
    from peft_surgical.files import shown

    out = console()
    numbers = ("rank", "of", "L2 norm", "relative error")
    rows = table("tensor", "kept as", *numbers, numbers=numbers)
    for row in found.rows:
        rank, full = ("" if value is None else str(value) for value in (row.rank, row.full_rank))
        rows.add_row(escape(row.name), row.kept, rank, full, f"{row.norm:.4g}", f"{row.error:.2%}")
    out.print(rows)
    out.print()
    out.print(f"relative error of all deltas: {found.error:.2%}")
    if found.left_out:
        out.print(escape(f"left out: {shown(found.left_out)}"))
    out.print(f"{decimal(found.bytes_before)} before, {decimal(found.bytes)} as LoRA")
    out.print(escape(str(output)), soft_wrap=True)
