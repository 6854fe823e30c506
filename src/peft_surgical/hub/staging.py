"""What is pushed, gathered in a folder of its own and proven there, before anything is sent.

A live model is saved, loaded again onto its own base and compared bit for bit. The record of the base is opened, and
the adapter loaded onto the result. So nothing is pushed that cannot be loaded.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from peft import PeftModel, get_peft_model_state_dict

from ..adapters.adapter import chosen, read_config
from ..errors import AdapterError, ConfigError, DataError
from ..evaluation import Report
from ..files import canonical_json, shown, write_atomically
from ..fingerprints import fingerprint
from ..keys import CONFIG, FIGURE, REPORT, WEIGHTS
from .cards import About
from .pulling import attached, rebuild
from .records import (
    BaseName,
    BaseRecord,
    completed,
    fingerprint_without_whole,
    record_of,
    recorded,
    write_record,
)

_UNNAMED = "a network that is not on the Hub"
_BRING_THE_BASE = """\
import peft_surgical
from peft import PeftModel

model = PeftModel.from_pretrained(base, "{repo}").eval()  # base: the network that it was made on"""
_PATH = re.compile(r"(?<!\S)(?:/|[A-Za-z]:[/\\])[^\s,;]+")
"""A word of a text that is an absolute path."""


def stage_model(model: PeftModel, adapter_name: str | None, folder: Path) -> tuple[BaseRecord | None, int]:
    """Save an adapter of a live model, load it again onto the model's own base, and compare.

    Returns:
        The record of the base as far as the network tells it, and the number of values in the base's parameters.

    Raises:
        AdapterError: There is no such adapter, or what is loaded is not what was saved.
    """
    name = chosen(model, adapter_name)
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
        fingerprint(get_peft_model_state_dict(m, adapter_name=name, save_embedding_layers=False))
        for m in (model, again)
    )
    wrong = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if wrong or again.peft_config[name].scale != model.peft_config[name].scale:
        raise AdapterError(
            f"adapter {name!r} is not what was saved when it is loaded again ({shown(wrong or ['scale'])}): nothing "
            "was pushed. Please report this as a bug"
        )
    for file in (CONFIG, WEIGHTS):
        shutil.move(saved / file, folder / file)
    shutil.rmtree(scratch)
    return record, parameters


def stage_folder(source: Path, folder: Path) -> BaseRecord | None:
    """Copy a saved adapter with the report and the figure beside it, and verify it; the record of its base."""
    for name in (CONFIG, WEIGHTS, REPORT, FIGURE):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    # The copy is what is verified and pushed, whatever becomes of the source meanwhile.
    config = read_config(folder if (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file() else source)
    return recorded(source, config)


def with_base(
    folder: Path,
    record: BaseRecord | None,
    asked: BaseName | None,
    report: Report | None,
    about: About,
    token: str | bool | None,
) -> About:
    """Open the base as others will, put the adapter in the folder on it, and write down there what the base is.

    Returns:
        ``about`` with what is known of the base.

    Raises:
        ConfigError: Nothing says which base it is, or others cannot open it with the head that it had.
        BaseMismatchError: It is another one.
    """
    if about.loading is not None:
        _name_base(folder, about.base, None)
        return about
    try:
        record = completed(record, asked, report)
        if record.is_folder:
            raise ConfigError(
                f"the base is the folder {record.id}, which nobody else has: push it too, and say base= with its "
                "repository"
            )
    except ConfigError as error:
        if about.complete:
            raise
        warnings.warn(f"the card does not name the base, and others have to bring it: {error}", stacklevel=4)
        _name_base(folder, None, None)
        return replace(about, base=_UNNAMED, loading=_BRING_THE_BASE.format(repo=about.repo), opens=False)
    config = read_config(folder)
    opened, found = rebuild(record, config, token=token)
    parameters = sum(p.numel() for p in opened.model.parameters())
    attached(opened, folder)
    write_record(folder, replace(found, weights_sha256=config.weights_sha256))
    _name_base(folder, found.id, found.revision)
    return replace(
        about,
        base=found.id,
        base_revision=found.revision,
        base_parameters=parameters,
        labelled=found.label_names is not None,
    )


def _name_base(folder: Path, base: str | None, revision: str | None) -> None:
    """Write into the config what others call the base: on this machine, it may have been a folder."""
    plain = {**read_config(folder).to_dict(), "base_model_name_or_path": base, "revision": revision}
    plain["selection"] = _scrubbed(plain["selection"])
    write_atomically(folder / CONFIG, canonical_json(plain))


def without_paths(report: Report, base: str | None = None) -> Report:
    """The report without absolute paths of this machine; the base's, where it is one, becomes ``base``."""
    places = [report.model, *(report.settings.get(name) for name in ("model", "data_from", "source_from"))]
    names = {text: PureWindowsPath(text).name for text in places if isinstance(text, str) and _is_absolute(text)}
    if base is not None and report.model in names:
        names[report.model] = base
    return Report.from_json(json.dumps(_scrubbed(json.loads(report.to_json()), names)))


def _scrubbed(value: Any, names: Mapping[str, str] | None = None) -> Any:
    """Plain JSON values without absolute paths: the last part of each path stays.

    Args:
        value: Strings are searched for paths at any depth.
        names: Path -> what to write for it, wherever it occurs. None takes a string that begins with a path for one
            path, blanks included.
    """
    if isinstance(value, Mapping):
        return {_scrubbed(key, names): _scrubbed(part, names) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_scrubbed(part, names) for part in value]
    if not isinstance(value, str):
        return value
    if names is None and _is_absolute(value):
        return PureWindowsPath(value).name  # it knows both separators
    for path in sorted(names or (), key=len, reverse=True):
        value = value.replace(path, (names or {})[path])
    return _PATH.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], value)


def _is_absolute(text: str) -> bool:
    return PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
