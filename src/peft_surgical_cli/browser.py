"""``peft-surgical app``: the page in the browser. What is on it is in `peft_surgical_app`."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

LOCAL = ("127.0.0.1", "localhost", "::1")
"""Addresses that nobody else reaches."""


def app_command(
    models: Annotated[
        list[str] | None,
        typer.Option(
            help="Networks to choose from, instead of those that the page offers: ids of the Hub, or folders.",
            show_default=False,
        ),
    ] = None,
    folders: Annotated[
        Path | None,
        typer.Option(
            help="A folder of this machine: photographs and networks below it may be named by their path.",
            show_default="uploads only",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Keep uploads and runs here.", show_default="removed in the end")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = LOCAL[0],
    port: Annotated[int | None, typer.Option(min=1, max=65535, show_default="the first free one from 7860 on")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="Stop a run after so long.", show_default="never")
    ] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Open no browser.")] = False,
) -> None:
    """Open a page in the browser on which to tune, look at the result, and take the adapter home; Ctrl-C ends it."""
    from peft_surgical.errors import ConfigError
    from peft_surgical.extras import require

    require("gradio", "the page in the browser", "app")
    if folders is not None and not folders.expanduser().is_dir():
        raise ConfigError(f"--folders {folders} is no folder: name one that exists")
    if host not in LOCAL:
        reach = " and read what lies below --folders" if folders is not None else ""
        print(f"peft-surgical: warning: whoever reaches {host} can start runs here{reach}", file=sys.stderr)
    from peft_surgical_app.page import serve_page
    from peft_surgical_app.workspace import MODELS, AppSettings

    with contextlib.ExitStack() as stack:
        if output is None:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peft-surgical-app-")))
        else:
            place = output.expanduser().absolute()
            place.mkdir(parents=True, exist_ok=True)
        settings = AppSettings(
            place, tuple(models) if models else MODELS, folders=folders, minutes=minutes, own_login=host in LOCAL
        )
        serve_page(settings, host, port, show=not no_browser)
