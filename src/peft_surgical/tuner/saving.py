"""Saving: what of an adapter goes into a file, files that are replaced whole, and the page beside them.

PEFT writes the weights and then the config, each in place: a kill between the two leaves one adapter's weights beside
another's config. Here PEFT writes into a hidden folder of its own, whose files then take the place of the old ones in a
way that leaves a whole adapter at any time; see `commit`.

PEFT's page ``README.md`` says "[More Information Needed]" in every section. The page here says what the adapter is, how
it is loaded, and its numbers where there are any. It names no folder, so that it may be pushed as it is; the card of an
adapter on the Hub says more, see ``peft_surgical.hub.cards``.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open

from ..config import SurgicalConfig, SurgicalType
from ..errors import AdapterError
from ..evaluation import Report
from ..files import is_finite, shown
from ..folders import commit, staging
from ..keys import CARD, CONFIG, DELTA, HOLDER, PREFIX, PROCESSOR, WEIGHTS, neutral_key, tensor_name
from ..results import published
from ..texts import markdown_code, markdown_text

TAGS = ("peft", "surgical-fine-tuning")
IMPORT = "import peft_surgical"
"""What has to run before PEFT knows the method; cards have it in their metadata, under the key `LOAD_WITH`."""
LOAD_WITH = "load_with"
PAGE_MARK = (
    "<!-- peft-surgical writes this page anew when the adapter is saved. Delete this line to keep your changes. -->"
)
"""Part of every page that may be written anew."""
_EMPTY = "[More Information Needed]"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")

_PAGE = """\
---
{metadata}
---
{mark}

# Surgical adapter: {title}

Deltas of {target} for {base}, made with `peft-surgical` by surgical fine-tuning, which tunes one part of a pretrained
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


def whole_state(state: Mapping[str, torch.Tensor], config: SurgicalConfig, adapter: str) -> dict[str, torch.Tensor]:
    """What is saved of an adapter: its tensors gathered from all processes, its deltas in the config's dtype.

    Raises:
        AdapterError: What would be written is not finite, or not all there. What was saved before stays.
    """
    found = {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in state.items()}
    held = {tensor_name(key.replace("_orig_mod.", "")) for key in found}
    if found and (lost := [name for name in config.tensor_names or () if name not in held]):
        raise AdapterError(
            f"Adapter {adapter!r} was not saved: {shown(lost)} of it is no longer in the model. Something has put "
            "another module in the place of the one that it was attached to."
        )
    written = found
    if config.delta_dtype is not None:
        dtype = getattr(torch, config.delta_dtype)
        written = {key: value.to(dtype) if f".{DELTA}." in f".{key}" else value for key, value in found.items()}
    if broken := [key for key, value in written.items() if not is_finite(value)]:
        if is_finite(found[broken[0]]):
            reason = f"{broken[0]} has values that {config.delta_dtype} cannot hold. Leave delta_dtype out"
        else:
            reason = f"{broken[0]} holds NaN or Inf: the run diverged. Try a smaller learning rate"
        raise AdapterError(f"Adapter {adapter!r} was not saved, {reason}. What was saved before is as it was.")
    return written


def saving_atomically(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``PeftModel.save_pretrained``: surgical adapters replace older ones whole, others are saved as ever."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        _refuse_beneath(self)
        surgical = any(isinstance(config, SurgicalConfig) for config in self.peft_config.values())
        if not surgical or os.path.isfile(save_directory):
            original(self, save_directory, *args, **kwargs)
            return
        given = signature.bind(self, save_directory, *args, **kwargs).arguments
        if not given.get("safe_serialization", True):
            raise AdapterError(
                "safe_serialization=False asks for a pickle, which can run code when it is read. Surgical adapters "
                "are saved as safetensors only: leave the argument out."
            )
        if given.get("save_embedding_layers") is True:
            raise AdapterError(
                "save_embedding_layers=True would put base tensors beside the deltas. Target the embedding "
                "(target='embedding + ...') to keep what it learns; leave the argument out."
            )
        rest = {**given.pop("kwargs", {}), **given, "save_embedding_layers": False}
        del rest["self"], rest["save_directory"]
        target = Path(save_directory)
        if rest.get("is_main_process") is False:
            # Other processes take part in gathering the tensors; they write nothing.
            original(self, save_directory, **rest)
            return
        with _in_words(target), staging(target) as stage:
            for place in (".", *self.peft_config):
                if (target / place / CARD).is_file():  # a page that a user wrote stays
                    (stage / place).mkdir(exist_ok=True)
                    shutil.copy2(target / place / CARD, stage / place / CARD)
            original(self, stage, **rest)
            for config in list(stage.rglob(CONFIG)):
                _check_written(config.with_name(WEIGHTS))
                write_card(config.parent)
            commit(stage, target)

    return save_pretrained


def _refuse_beneath(model: Any) -> None:
    """Raise AdapterError where another method is on top of a surgical adapter: PEFT would save that method alone."""
    tuner = getattr(model, "base_model", None)
    if getattr(tuner, "prefix", PREFIX) == PREFIX:
        return
    if any(f"{HOLDER}.{DELTA}." in name for name, _ in model.named_parameters()):
        raise AdapterError(
            f"{type(tuner).__name__} is on top of a surgical adapter, and would be saved without what that has "
            "learned. Save the surgical adapter and call merge_and_unload first, and put the other method on what "
            "that returns."
        )


@contextmanager
def _in_words(target: Path) -> Iterator[None]:
    """What safetensors says of a full disk is no OSError, and names no file."""
    try:
        yield
    except SafetensorError as error:
        raise AdapterError(
            f"The adapter was not saved to {target} ({error}). What was saved there before is as it was: free space, "
            "or save to another folder."
        ) from error


def publish_adapter(model: Any, folder: Path, root: Path | None = None, processor: Any = None) -> None:
    """Save a PeftModel's adapter among the results in ``root``, which holds ``folder``; a user's own page there stays.

    An image processor of transformers is saved beside it.

    Raises:
        ConfigError: There is an adapter in ``folder`` that is no result.
    """
    root = root if root is not None and folder.is_relative_to(root) else folder
    with published(root) as stage:
        place = stage / folder.relative_to(root)
        model.save_pretrained(place)
        if processor is not None:
            processor.to_json_file(place / PROCESSOR)
        if not may_replace(folder / CARD):
            (place / CARD).unlink()


def _check_written(file: Path) -> None:
    """Check what `whole_state` has not seen: the modules that PEFT saves whole, for ``modules_to_save``."""
    with safe_open(file, framework="pt") as held:
        keys = list(held.keys())
        if not keys:
            raise AdapterError(
                "The adapter was not saved: none of its tensors is in the model any more. Something has put other "
                "modules in the place of those that it was attached to."
            )
        for key in keys:
            if neutral_key(key) is None and not is_finite(held.get_tensor(key)):
                raise AdapterError(
                    f"The adapter was not saved: {key}, which modules_to_save names, holds NaN or Inf. The run "
                    "diverged: try a smaller learning rate. What was saved before is as it was."
                )


def is_repository(name: str | None) -> bool:
    """Whether this is ``owner/name`` on the Hub, as far as a name can tell."""
    return name is not None and _REPOSITORY.fullmatch(name) is not None and not Path(name).is_dir()


def write_card(folder: str | os.PathLike[str], report: Report | None = None) -> None:
    """Write the page of the adapter in a folder, or remove it where there is no adapter. A user's own page stays.

    Args:
        folder: Where the adapter's config lies.
        report: What was measured of this adapter, if anything.
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
    """Whether no user has written this page: there is none, it is PEFT's blank template, or this package wrote it."""
    if not page.is_file():
        return True
    text = page.read_text(encoding="utf-8", errors="replace")
    # A section of the template that somebody has filled in is theirs.
    return PAGE_MARK in text or text.count(_EMPTY) >= ModelCard.default_template_path.read_text("utf-8").count(_EMPTY)


def target_of(config: SurgicalConfig) -> str:
    """What an adapter tunes, in words."""
    if target := config.target or config.target_modules:
        return target if isinstance(target, str) else " + ".join(target)
    return f"{len(config.tensor_names or ())} tensors by name"


def _page(config: SurgicalConfig, report: Report | None) -> str:
    base = config.base_model_name_or_path
    on_hub = is_repository(base)
    more: dict[str, Any] = {LOAD_WITH: IMPORT}
    data = ModelCardData(base_model=base if on_hub else None, library_name="peft", tags=list(TAGS), **more)
    named = (
        f"[`{base}`](https://huggingface.co/{base})"
        if on_hub
        else markdown_code(Path(base).name)
        if base
        else "its base"
    )
    none = "Nothing was measured when this adapter was saved.\n"
    return _PAGE.format(
        metadata=data.to_yaml(),
        mark=PAGE_MARK,
        title=markdown_text(target_of(config)),
        target=markdown_code(target_of(config)),
        base=named,
        results=report.without_paths().to_markdown() if report is not None and report.measurements else none,
    )
