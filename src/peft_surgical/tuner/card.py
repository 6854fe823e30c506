"""The page ``README.md`` beside an adapter on disk: what it is, how it is loaded, and its numbers where there are any.

PEFT would put its template there, whose every section says "[More Information Needed]". The card of an adapter on the
Hub says more; see ``peft_surgical.hub.cards``. This page names no folder, so that it may be pushed as it is.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..config import SurgicalConfig, SurgicalType
from ..evaluation import Report
from ..keys import CARD, CONFIG

TAGS = ("peft", "surgical-fine-tuning")
IMPORT = "import peft_surgical"
"""What has to run before PEFT knows the method; cards have it in their metadata, under the key `LOAD_WITH`."""
LOAD_WITH = "load_with"
PAGE_MARK = (
    "<!-- peft-surgical writes this page anew when the adapter is saved. Delete this line to keep your changes. -->"
)
"""On every page that may be written anew."""
_EMPTY = "[More Information Needed]"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")

_PAGE = """\
---
{metadata}
---
{mark}

# Surgical adapter: {target}

Deltas of `{target}` for {base}, made with `peft-surgical` by surgical fine-tuning, which tunes one part of a pretrained
network and leaves the rest as it is. The base is not in this folder.

## Use

```python
import peft_surgical  # without it PEFT answers KeyError: 'SURGICAL'
from peft import PeftModel

model = PeftModel.from_pretrained(base, folder).eval()  # base: the network above; folder: where this page lies
```

For a base of timm or transformers, `peft_surgical.load_adapted(folder)` opens that, too. `peft-surgical show` lists
what was tuned and how far it moved.

## Results

{results}"""


def is_repository(name: str | None) -> bool:
    """Whether this is ``owner/name`` on the Hub, as far as a name can tell."""
    return name is not None and _REPOSITORY.fullmatch(name) is not None and not Path(name).is_dir()


def write_card(folder: str | os.PathLike[str], report: Report | None = None) -> None:
    """Write the page of the adapter in a folder, or remove it where there is no adapter. One's own page stays.

    Args:
        folder: Where the adapter's config lies.
        report: Of this adapter. None says that nothing was measured.
    """
    page, file = Path(folder, CARD), Path(folder, CONFIG)
    if not may_replace(page):
        return
    plain = SurgicalConfig.from_json_file(str(file)) if file.is_file() else {}
    if plain.get("peft_type") == SurgicalType.SURGICAL.value:
        config = SurgicalConfig(**{k: v for k, v in plain.items() if k in SurgicalConfig.__dataclass_fields__})
        page.write_text(_page(config, report), encoding="utf-8")
    elif not plain:
        page.unlink(missing_ok=True)


def may_replace(page: Path) -> bool:
    """Whether nobody has written this page: there is none, it is PEFT's template, or it is from here."""
    if not page.is_file():
        return True
    text = page.read_text(encoding="utf-8")
    return PAGE_MARK in text or _EMPTY in text


def target_of(config: SurgicalConfig) -> str:
    """What an adapter tunes, in words."""
    said = config.target or config.target_modules
    if said:
        return said if isinstance(said, str) else " + ".join(said)
    return f"{len(config.tensor_names or ())} tensors by name"


def _page(config: SurgicalConfig, report: Report | None) -> str:
    base = config.base_model_name_or_path
    on_hub = is_repository(base)
    more: dict[str, Any] = {LOAD_WITH: IMPORT}
    data = ModelCardData(base_model=base if on_hub else None, library_name="peft", tags=list(TAGS), **more)
    named = f"[`{base}`](https://huggingface.co/{base})" if on_hub else f"`{Path(base).name}`" if base else "its base"
    none = "Nothing was measured when this adapter was saved.\n"
    return _PAGE.format(
        metadata=data.to_yaml(),
        mark=PAGE_MARK,
        target=target_of(config),
        base=named,
        results=report.to_markdown() if report is not None and report.measurements else none,
    )
