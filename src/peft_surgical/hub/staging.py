"""What is pushed, gathered in a folder of its own: a whole adapter, proven, before anything is sent.

A live model is saved, loaded again onto its own base and compared bit for bit. The record of the base is opened, and
the adapter loaded onto what comes of it. So nothing is pushed that cannot be loaded.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict

from ..adapters.contents import contents_of, read_config
from ..config import SurgicalConfig
from ..errors import AdapterError, ConfigError, DataError
from ..evaluation import Report
from ..files import canonical_json, shown, write_atomically
from ..keys import CONFIG, FIGURE, REPORT, WEIGHTS
from .cards import Weights
from .rebuilding import BaseName, attached, completed, fingerprint_without_whole, rebuild, record_of, recorded
from .records import BaseRecord, write_record

_FOLDERS = re.compile(r"(?<!\S)/(?:[^/\s]+/)+(?=[^/\s])")
"""What comes before the name in an absolute path that is a word of a text."""
_LARGEST = 10  # tensors that a card's figure has room for


@dataclass(frozen=True)
class Staged:
    """An adapter in the folder from which it will be pushed.

    Attributes:
        folder: Where config and weights lie.
        config: The config, read from there.
        record: Of the base, as far as it is known; None where nothing says how it is built.
        base_parameters: Values in the parameters of the base, where the base is at hand.
    """

    folder: Path
    config: SurgicalConfig
    record: BaseRecord | None
    base_parameters: int | None = None


def stage_model(model: PeftModel, adapter_name: str | None, folder: Path) -> Staged:
    """Save an adapter of a live model, load it again onto the model's own base, and compare.

    Args:
        model: With one surgical adapter or more; it stays as it is.
        adapter_name: Which; None takes the only active one.
        folder: Empty.

    Raises:
        AdapterError: There is no such adapter, or what is loaded is not what was saved.
    """
    name = _chosen(model, adapter_name)
    scratch = folder / "saved"
    model.save_pretrained(scratch, selected_adapters=[name])
    saved = scratch if name == "default" else scratch / name
    network = copy.deepcopy(model).cpu().unload()
    parameters = sum(p.numel() for p in network.parameters())
    config = read_config(saved)
    record = None
    with contextlib.suppress(DataError):
        record = record_of(network, config)
    if record is not None:
        record = replace(record, fingerprint=fingerprint_without_whole(network, config))
    again = PeftModel.from_pretrained(network, saved, adapter_name=name, torch_device="cpu")
    before, after = (
        get_peft_model_state_dict(m, adapter_name=name, save_embedding_layers=False) for m in (model, again)
    )
    wrong = [key for key in {**before, **after} if not _equal(before.get(key), after.get(key))]
    if wrong or again.peft_config[name].scale != model.peft_config[name].scale:
        raise AdapterError(
            f"adapter {name!r} is not what was saved when it is loaded again ({shown(wrong or ['scale'])}): nothing "
            "was pushed. Please report this as a bug"
        )
    for file in (CONFIG, WEIGHTS):
        shutil.move(saved / file, folder / file)
    shutil.rmtree(scratch)
    return Staged(folder, config, record, parameters)


def stage_folder(source: Path, folder: Path) -> Staged:
    """Copy an adapter that was saved, with the report and the figure that lie beside it, after verifying it.

    Raises:
        AdapterFileError: It is not a whole surgical adapter.
    """
    for name in (CONFIG, WEIGHTS, REPORT, FIGURE):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    # The copy is what is verified and pushed, whatever becomes of the source meanwhile.
    config = read_config(folder if (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file() else source)
    return Staged(folder, config, recorded(source, config))


def base_for_others(staged: Staged, asked: BaseName | None, report: Report | None) -> BaseRecord:
    """What others are to open as the adapter's base.

    Args:
        staged: The adapter.
        asked: The base as the user names it: an id, or the arguments of `load_base` (``name``, ``label_names``,
            ``num_classes``, ``head``) and ``revision``. None trusts the record, or what the report says.
        report: Of ``peft-surgical tune``, which tells how the base was opened.

    Raises:
        ConfigError: Nothing says which base it is, or others cannot open it.
    """
    record = completed(staged.record, asked, report)
    if record.is_folder:
        raise ConfigError(
            f"the base is the folder {record.id}, which nobody else has: push it too, and say base= with its repository"
        )
    return record


def prove(staged: Staged, record: BaseRecord, token: str | bool | None) -> Staged:
    """Open the base as its record says, put the adapter on it, and write both down.

    Args:
        staged: The adapter.
        record: Of the base, from `base_for_others`.
        token: For the base.

    Raises:
        ConfigError: It cannot be opened with the head that it had.
        BaseMismatchError: It is another one.
    """
    base, found = rebuild(record, staged.config, token=token)
    parameters = sum(p.numel() for p in base.model.parameters())
    attached(base, staged.folder)
    found = replace(found, weights_sha256=staged.config.weights_sha256)
    write_record(staged.folder, found)
    return replace(_named(staged, found.id, found.revision), record=found, base_parameters=parameters)


def described(staged: Staged, words: str | None) -> Staged:
    """The adapter of a network that nobody can open by name: what its config says is in words, or nothing."""
    return replace(_named(staged, words, None), record=None)


def _named(staged: Staged, base: str | None, revision: str | None) -> Staged:
    """Write into the config what others call the base: on this machine, it may have been a folder."""
    plain = {**staged.config.to_dict(), "base_model_name_or_path": base, "revision": revision}
    plain["selection"] = _without_folders(plain["selection"])
    write_atomically(staged.folder / CONFIG, canonical_json(plain))
    return replace(staged, config=read_config(staged.folder))


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_without_folders(key): _without_folders(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_folders(part) for part in value]
    if not isinstance(value, str):
        return value
    return Path(value).name if os.path.isabs(value) else _FOLDERS.sub("", value)


def weights_of(staged: Staged) -> Weights:
    """The adapter's file in numbers, for its card."""
    contents = contents_of(staged.folder)
    return Weights(
        bytes=contents.file_bytes,
        sha256=contents.sha256,
        tensors=len(contents.deltas),
        parameters=sum(part.parameters for part in contents.parts),
        base_parameters=staged.base_parameters,
        dtypes=contents.dtypes,
        statistics=contents.statistics,
        parts=tuple((part.name, part.parameters, part.norm) for part in contents.parts),
        parts_are=contents.parts_are,
        largest=tuple((delta.name, delta.norm) for delta in contents.deltas[:_LARGEST]),
    )


def _chosen(model: PeftModel, adapter_name: str | None) -> str:
    names = [name for name, config in model.peft_config.items() if isinstance(config, SurgicalConfig)]
    if adapter_name is None:
        active = [name for name in model.active_adapters if name in names]
        if len(active) != 1:
            raise AdapterError(
                f"{len(active)} surgical adapters are active: say which one to push, adapter_name= one of {names}"
            )
        return active[0]
    if adapter_name not in names:
        raise AdapterError(
            f"no surgical adapter {adapter_name!r} on this model; there are {', '.join(names) or 'none'}"
        )
    return adapter_name


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether two tensors are the same bytes: 0.0 and -0.0 differ, NaN equals itself."""
    if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    first, second = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(first, second)
