"""``peft-surgical pull REPO``: an adapter from the Hub, verified."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .terminal import console

Repo = Annotated[str, typer.Argument(help="owner/name on the Hub.", show_default=False)]
AdapterArgument = Annotated[str, typer.Argument(help="A folder, or owner/name on the Hub.", show_default=False)]
BaseOption = Annotated[str | None, typer.Option(help="The base, if the adapter does not tell.", show_default=False)]
Revision = Annotated[str | None, typer.Option(help="A branch, a tag or a commit.", show_default="main")]


def pull_command(
    repo: Repo,
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
