"""`pull`: an adapter from the Hub or the cache, verified; and the folder of an adapter, wherever it is."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..adapters.contents import read_config
from ..errors import AdapterFileError
from ..files import commit, file_sha256
from ..keys import CARD, CONFIG, PICKLE, WEIGHTS
from .cards import SHA256
from .commits import OWN, hub
from .remote import explained, patiently

FILES = tuple(name for name in OWN if name != PICKLE)
"""What is fetched: nothing else of a repository is of use, and a pickle is of harm."""


@dataclass(frozen=True)
class Pulled:
    """An adapter that was fetched from the Hub, or found in the cache, and verified.

    Attributes:
        repo: The repository.
        folder: Where it is now.
        oid: Hash of the commit that it is of.
        sha256: Of the adapter file.
        in_card: Whether it was compared with the card's.
    """

    repo: str
    folder: Path
    oid: str
    sha256: str
    in_card: bool


def pull(
    repo: str,
    output: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    verify: bool = False,
    force: bool = False,
    token: str | bool | None = None,
) -> Pulled:
    """Fetch an adapter at one commit, and verify it: whole, unaltered, complete, finite.

    Offline, or while the Hub cannot be reached, it comes from huggingface_hub's cache, if it is whole there.

    Args:
        repo: ``owner/name``.
        output: A folder to put it into; an adapter there is replaced, as a whole. None leaves it in the cache.
        revision: A branch, a tag or a commit.
        verify: Also compare the file with the SHA-256 in the card.
        force: Fetch again what is in the cache.
        token: By default the one that was logged in with.

    Raises:
        ConfigError: ``repo`` is no name of a repository.
        AdapterFileError: There is no whole surgical adapter, or the card has another SHA-256.
        AdapterError: The repository cannot be reached.
    """
    with explained("pull", repo, revision):
        validate_repo_id(repo)
        if "/" not in repo:
            raise HFValidationError(repo)
        folder = Path(
            patiently(
                lambda: snapshot_download(
                    repo, revision=revision, allow_patterns=list(FILES), force_download=force, token=token
                )
            )
        )
        if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
            _refuse(repo, folder.name, missing[0], token)
    try:
        config = read_config(folder)
    except AdapterFileError as error:
        raise AdapterFileError(f"{repo}: {error} (force=True fetches it again)") from error
    digest = config.weights_sha256 or file_sha256(folder / WEIGHTS)
    if verify:
        check_card(repo, folder)
    target = folder if output is None else _put(folder, Path(output))
    return Pulled(repo, target, folder.name, digest, verify)


def locate(
    source: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> tuple[Path, bool]:
    """The folder of an adapter, and whether it is the Hub's.

    Args:
        source: A folder, or a repository, which is pulled.
        revision: Of a repository.
        token: For a repository.

    Raises:
        ConfigError: It is neither.
        AdapterFileError: There is no whole surgical adapter.
        AdapterError: The repository cannot be reached.
    """
    place = Path(source)
    if place.is_dir():
        return place, False
    return pull(os.fspath(source), revision=revision, token=token).folder, True


def check_card(repo: str, folder: Path) -> None:
    """Raise `AdapterFileError` unless the card in a folder has the SHA-256 of the adapter file beside it."""
    said = None
    if (folder / CARD).is_file():
        said = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data.get(SHA256)
    if said is None:
        raise AdapterFileError(
            f"the card of {repo} has no {SHA256}, so nothing ties its numbers to this file: push_adapter writes it"
        )
    found = file_sha256(folder / WEIGHTS)
    if said != found:
        raise AdapterFileError(
            f"the card of {repo} is of another file (SHA-256 {str(said)[:12]}...) than {WEIGHTS} ({found[:12]}...): "
            "its numbers are not this adapter's. Ask its author, or take an earlier revision"
        )


def _refuse(repo: str, oid: str, missing: str, token: str | bool | None) -> None:
    api = hub(token)
    files = patiently(lambda: api.list_repo_files(repo, revision=oid))
    pickle = (
        f" It has {PICKLE}, a pickle, which can run code when it is read: ask its author for {WEIGHTS}."
        if PICKLE in files
        else ""
    )
    raise AdapterFileError(f"{repo} has no {missing}, so there is no adapter to load.{pickle}")


def _put(folder: Path, target: Path) -> Path:
    """Copy an adapter to a folder, in whose place there is a whole one at every moment."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        for name in FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, Path(scratch, name))
        commit(Path(scratch), target)
    for name in FILES:  # of an older adapter
        if not (folder / name).is_file():
            (target / name).unlink(missing_ok=True)
    return target
