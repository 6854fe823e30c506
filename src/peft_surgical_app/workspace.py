"""Where the page keeps what visitors send and what their runs leave, and what a visitor may name."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_surgical.errors import ConfigError, DataError
from peft_surgical.folders import write_atomically
from peft_surgical.keys import REPORT

from .uploads import UploadLimits

MODELS = (
    "timm/resnet50.a1_in1k",
    "timm/tf_efficientnet_lite0.in1k",
    "timm/convnext_tiny.in12k_ft_in1k",
    "timm/vit_small_patch16_224.augreg_in21k_ft_in1k",
    "google/vit-base-patch16-224",
)
"""Networks that the page offers by default."""
_TOKEN = re.compile(r"[0-9a-f]{32}")
_HUB_ID = re.compile(r"(?:hf-hub:)?[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
_LAST = "last-run.json"


@dataclass(frozen=True)
class AppSettings:
    """What the page offers, and to whom.

    Attributes:
        root: Folder for uploads and runs.
        models: Networks to choose from, ids of the Hub or folders of this machine.
        any_model: Whether another id of the Hub may be typed.
        folders: A folder of this machine below which photographs and networks may be named by their path; None for
            none.
        limits: How much a visitor may send.
        own_login: Whether the Hub's token of this machine is used where none is typed: to read networks, and to push.
        minutes: How long a run may take; None for as long as it needs.
        hours: After how long without use a visitor's files are removed; None keeps them.
    """

    root: Path
    models: tuple[str, ...] = MODELS
    any_model: bool = True
    folders: Path | None = None
    limits: UploadLimits = field(default_factory=UploadLimits)
    own_login: bool = True
    minutes: float | None = None
    hours: float | None = None

    def model(self, text: str) -> str:
        """The network that a visitor named.

        Raises:
            ConfigError: It is none that may be used.
        """
        name = text.strip()
        if name in self.models:
            return str(Path(name).absolute()) if Path(name).is_dir() else name
        if self.folders is not None and (place := self._below(name)) is not None:
            return str(place)
        if self.any_model and _HUB_ID.fullmatch(name) and not Path(name).exists():
            return name
        others = ", or another id of the Hub" if self.any_model else ""
        below = "" if self.folders is None else f", or a folder below {self.folders}"
        raise ConfigError(f"{name!r} is no network that can be used here: choose one of the list{others}{below}")

    def folder(self, text: str) -> Path:
        """The folder of photographs that a visitor named.

        Raises:
            DataError: No folder may be named, or it is none below `folders`.
        """
        if self.folders is None:
            raise DataError("folders of this machine are not read: upload the photographs")
        place = self._below(text.strip())
        if place is None:
            raise DataError(f"{text.strip()!r} is no folder below {self.folders}: give its path from there")
        return place

    def _below(self, text: str) -> Path | None:
        assert self.folders is not None
        root = self.folders.expanduser().resolve()
        try:
            place = (root / text).resolve()
            return place if text and place.is_dir() and place.is_relative_to(root) else None
        except (OSError, ValueError):
            return None


@dataclass(frozen=True)
class Workspace:
    """What belongs to one visitor.

    Attributes:
        token: By which the visitor's browser is known.
        place: The folder.
    """

    token: str
    place: Path

    @property
    def uploads(self) -> Path:
        """The photographs that were sent."""
        return self.place / "photographs"

    @property
    def log(self) -> Path:
        """What libraries print during a run."""
        return self.place / "log.txt"

    def output(self, arguments: Mapping[str, Any]) -> Path:
        """The folder of a run, by its arguments and by the photographs in the folder that they name as ``data``.

        It is the same for the same photographs, so that a run that was stopped goes on; and another one for others, so
        that nothing is shown beside what older photographs left.
        """
        what = json.dumps([arguments, _contents(Path(arguments["data"]))], sort_keys=True)
        return self.place / "runs" / hashlib.sha256(what.encode()).hexdigest()[:12]

    def remember(self, data: Path, output: Path) -> None:
        """Note which run was started last."""
        write_atomically(self.place / _LAST, json.dumps({"data": str(data), "output": str(output)}))

    def last(self) -> tuple[Path, Path] | None:
        """Photographs and folder of the run that was started last."""
        file = self.place / _LAST
        if not file.is_file():
            return None
        known = json.loads(file.read_text(encoding="utf-8"))
        return Path(known["data"]), Path(known["output"])

    def finished(self) -> tuple[Path, Path] | None:
        """The same, if that run has ended with a report."""
        found = self.last()
        return found if found is not None and (found[1] / REPORT).is_file() else None


def _contents(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of each file in a folder: reading them all could take minutes."""
    files = ((file.relative_to(folder), file.stat()) for file in sorted(folder.rglob("*")) if file.is_file())
    return [(name.as_posix(), about.st_size, about.st_mtime_ns) for name, about in files]


class Workspaces:
    """The workspaces of all visitors.

    Args:
        settings: Where they lie, and how long they are kept.
    """

    def __init__(self, settings: AppSettings) -> None:
        self.settings = settings

    def of(self, token: Any) -> Workspace:
        """A visitor's own, or a new one for a token that is not known."""
        known = isinstance(token, str) and _TOKEN.fullmatch(token) is not None
        if known and (place := self.settings.root / token).is_dir():
            (place / ".used").touch()
            return Workspace(token, place)
        self._remove_old()
        fresh = secrets.token_hex(16)
        place = self.settings.root / fresh
        place.mkdir(parents=True, mode=0o700)
        (place / ".used").touch()
        return Workspace(fresh, place)

    def _remove_old(self) -> None:
        if self.settings.hours is None or not self.settings.root.is_dir():
            return
        for mark in self.settings.root.glob("*/.used"):
            if _TOKEN.fullmatch(mark.parent.name) and time.time() - mark.stat().st_mtime > 3600 * self.settings.hours:
                shutil.rmtree(mark.parent, ignore_errors=True)
