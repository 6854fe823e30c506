"""``peft-surgical merge ADAPTER --output DIR``: base and adapter as one plain checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .pull import AdapterArgument, BaseOption, Revision
from .terminal import console


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
