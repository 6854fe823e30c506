"""Talking to the Hub through huggingface_hub: downloads and commits of adapters, retries, and errors in words.

A commit holds all of an adapter's files or none, and is reported only once it is known to be there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,  # the root of httpx's errors, of whichever httpx this huggingface_hub is built on
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash

from ..errors import AdapterError, AdapterFileError, ConfigError, SurgicalError
from ..files import file_sha256, shown
from ..keys import CARD, CONFIG, FIGURE, PICKLE, PROCESSOR, RECORD_FILE, REPORT, WEIGHTS

_T = TypeVar("_T")

FILES = (CARD, CONFIG, WEIGHTS, RECORD_FILE, REPORT, FIGURE, PROCESSOR)
"""The files of an adapter in a repository. Nothing else is downloaded, and no pickle."""
HUB_ERRORS = (HTTPError, OSError, EntryNotFoundError, RuntimeError, ValueError)
"""What huggingface_hub raises for a request, a file, an upload in a thread, an answer or an argument."""

TRIES = 5
LONGEST_WAIT = 60.0
"""Seconds; a server that asks for a longer wait is an error."""
_CONFLICTS = (409, 412)
_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
_LOGIN = "log in with `hf auth login`, set HF_TOKEN, or pass token="


def hub(token: str | bool | None = None) -> HfApi:
    """huggingface_hub's client, which reads endpoint, proxies and stored tokens from the environment."""
    return HfApi(token=token, library_name="peft-surgical", library_version=version("peft-surgical"))


def download(repo: str, revision: str | None = None, token: str | bool | None = None, force: bool = False) -> Path:
    """The folder in huggingface_hub's cache, named after the commit, with the files of an adapter, not yet verified.

    Offline, or while the Hub cannot be reached, it is what was fetched before, if that is whole. ``force`` fetches it
    again.

    Raises:
        ConfigError: ``repo`` is not the name of a repository.
        AdapterFileError: Config or weights are missing there.
        AdapterError: The repository cannot be reached.
    """
    with explained("pull", repo, revision):
        validate_repo_id(repo)
        if "/" not in repo:
            raise HFValidationError(repo)
        options: dict[str, Any] = {"allow_patterns": list(FILES), "force_download": force, "token": token}
        folder = Path(patiently(lambda: snapshot_download(repo, revision=revision, **options)))
        if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
            files = patiently(lambda: hub(token).list_repo_files(repo, revision=folder.name))
            pickle = f" It has {PICKLE}, a pickle, which can run code when it is read: ask its author for {WEIGHTS}."
            raise AdapterFileError(
                f"{repo} has no {missing[0]}, so there is no adapter to load.{pickle if PICKLE in files else ''}"
            )
    return folder


def patiently(call: Callable[[], _T]) -> _T:
    """Call again after a timeout, a lost connection, 429 or 5xx: for what may be done twice.

    huggingface_hub retries by itself when it downloads and uploads files, but not its other requests.
    """
    attempt = 0
    while True:
        try:
            return call()
        except HUB_ERRORS as error:
            wait = _wait(error, attempt)
            attempt += 1
            if wait is None or attempt == TRIES:
                raise
        time.sleep(wait)


def _wait(error: Exception, attempt: int) -> float | None:
    """Seconds after which to ask again, as the server says or doubling; None if asking again will not help."""
    cause = _first(error, HTTPError)
    status = status_of(error)
    if cause is None or (status is not None and status not in _AGAIN):
        return None
    response = getattr(cause, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    wait = float(asked) if asked.isdigit() else float(2**attempt)
    return wait if wait <= LONGEST_WAIT else None


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an error, or of what caused it; None where nothing was answered."""
    response = getattr(_first(error, HTTPError), "response", None)
    return None if response is None else int(response.status_code)


def _first(error: BaseException, kind: type[BaseException]) -> BaseException | None:
    """The error itself, or the nearest of its causes, that is of this kind."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, kind):
        seen = seen.__cause__
    return seen


@contextmanager
def explained(doing: str, repo: str, revision: str | None = None, tried: str = "") -> Iterator[None]:
    """Turn what huggingface_hub raises into an error of this package that says what to do.

    Args:
        doing: What is being done, such as ``"pull"``.
        repo: The repository.
        revision: The branch, tag or commit that is asked for.
        tried: What was looked for elsewhere before, in words.

    Raises:
        ConfigError: ``repo`` is not the name of a repository.
        AdapterError: Everything else, with the original as its cause.
    """
    try:
        yield
    except SurgicalError:
        raise
    except HFValidationError as error:
        message = f"cannot {doing} {repo!r}: it is neither a folder here nor owner/name on the Hub"
        raise ConfigError(f"{message}; {tried}" if tried else message) from error
    except HUB_ERRORS as error:
        message = f"cannot {doing} {repo}: {_reason(error, repo, revision)}"
        raise AdapterError(f"{message}; {tried}" if tried else message) from error


def _reason(error: Exception, repo: str, revision: str | None) -> str:
    status, place = status_of(error), f"revision {revision!r}" if revision else "its main branch"
    if isinstance(error, GatedRepoError):
        return f"access to {repo} is granted by its owner. Ask for it on the repository's page, then {_LOGIN}"
    if status == 401 and "Invalid credentials" in str(error):
        return f"the token is not known to the Hub: {_LOGIN}"
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        return f"there is no such repository, or it is private and the token may not see it: {_LOGIN}"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no {place}: name a branch, a tag or a commit of it"
    if _first(error, OfflineModeIsEnabled):
        return "it is not in the cache as a whole, and HF_HUB_OFFLINE forbids to ask: go online once"
    if status == 403:
        return f"the token has no permission for this: {_LOGIN}, with a token that may write"
    if status == 429:
        return "too many requests, the Hub asks to wait: try again later"
    if status is not None and status >= 500:
        return f"the Hub answered with an error of its own ({status}): try again later"
    text = " ".join(str(error).split()) or type(error).__name__
    short = text if len(text) < 300 else f"{text[:300]}..."
    if isinstance(error, (LocalEntryNotFoundError, HTTPError)) and status is None:
        return f"the Hub cannot be reached ({short}), and {place} is not in the cache: try again"
    return short


@dataclass(frozen=True)
class Pushed:
    """An adapter that is on the Hub.

    Attributes:
        repo: The repository.
        url: Page of the commit.
        oid: Hash of the commit, for ``revision=``.
        revision: The branch, or ``refs/pr/N``.
        pr_url: Page of the pull request, where one was asked for.
        sha256: SHA-256 of the adapter file, which its card has, too.
        files: Names of the files that were pushed.
    """

    repo: str
    url: str
    oid: str
    revision: str
    pr_url: str | None
    sha256: str
    files: tuple[str, ...]


def commit_files(
    files: Mapping[str, Path],
    repo: str,
    *,
    revision: str | None,
    private: bool | None,
    create_pr: bool,
    message: str,
    description: str | None,
    token: str | bool | None,
) -> Pushed:
    """Put files (path in the repository -> file) into a repository, in one commit on top of the one that is there now.

    The repository and its branch are made if they do not exist. Files that an older adapter left there go in the same
    commit. Where the answer is lost, the commit counts if the branch holds exactly these files. If somebody else has
    committed in the meantime, nothing is pushed.

    Raises:
        AdapterError: The repository is public and ``private`` was asked for; another commit came first; or what is
            there afterwards is not what was sent.
        OSError: What huggingface_hub raises.
    """
    api = hub(token)
    patiently(lambda: api.create_repo(repo, private=private, exist_ok=True))
    head = _head(api, repo, revision)
    if private and head.private is False:
        raise AdapterError(
            f"{repo} exists and is public, and private=True was asked for: nothing was pushed. Make it private in its "
            "settings, or choose another name"
        )
    stale = sorted({sibling.rfilename for sibling in head.siblings or ()} & {*FILES, PICKLE} - set(files))
    options: Any = {"commit_message": message, "commit_description": description, "create_pr": create_pr}

    def attempt() -> tuple[str, str, str, str | None]:
        # Made anew for each attempt: huggingface_hub notes in them how far they came.
        operations: list[Any] = [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()),
            *(CommitOperationDelete(path_in_repo=name) for name in stale),
        ]
        try:
            made: Any = api.create_commit(repo, operations, revision=revision, parent_commit=head.sha, **options)
        except HUB_ERRORS as error:
            oid = None if create_pr else _arrived(api, repo, revision, files, str(head.sha), error)
            if oid is None:
                raise
            return oid, f"{api.endpoint}/{repo}/commit/{oid}", revision or "main", None
        return made.oid, made.commit_url, made.pr_revision or revision or "main", made.pr_url

    # A second attempt at a pull request could open a second one.
    oid, url, place, pr_url = attempt() if create_pr else patiently(attempt)
    if wrong := _differing(api, repo, oid, files):
        raise AdapterError(f"the commit {oid} of {repo} lacks {shown(wrong)} as it was sent: push again")
    return Pushed(repo, url, oid, place, pr_url, file_sha256(files[WEIGHTS]), tuple(files))


def _head(api: HfApi, repo: str, branch: str | None) -> Any:
    """What the branch is at now; it is made where it does not exist."""
    try:
        return patiently(lambda: api.model_info(repo, revision=branch))
    except RevisionNotFoundError:
        if branch is None or branch.startswith("refs/"):
            raise
    patiently(lambda: api.create_branch(repo, branch=branch, exist_ok=True))
    return patiently(lambda: api.model_info(repo, revision=branch))


def _arrived(
    api: HfApi, repo: str, revision: str | None, files: Mapping[str, Path], head: str, error: Exception
) -> str | None:
    """The hash of the commit, if it is there although its answer was lost.

    Raises:
        AdapterError: Another one is there.
    """
    try:
        now = str(patiently(lambda: api.model_info(repo, revision=revision)).sha)
        mine = now != head and not _differing(api, repo, now, files)
    except HUB_ERRORS:
        raise error from None  # what is there cannot be seen
    if mine:
        return now
    if now != head or status_of(error) in _CONFLICTS:
        raise AdapterError(
            f"{repo} has changed while this was being pushed (from commit {head[:12]} to {now[:12]}): nothing was "
            "pushed. Look at what came first, and push again"
        ) from error
    return None


def _differing(api: HfApi, repo: str, commit: str, files: Mapping[str, Path]) -> list[str]:
    """Files that are not at a commit as they are here, by their hashes."""
    there: dict[str, Any] = {
        entry.path: entry
        for entry in patiently(lambda: list(api.list_repo_tree(repo, recursive=True, revision=commit)))
    }
    wrong = []
    for name, file in files.items():
        entry = there.get(name)
        lfs = getattr(entry, "lfs", None)
        if lfs.sha256 != file_sha256(file) if lfs else getattr(entry, "blob_id", None) != git_hash(file.read_bytes()):
            wrong.append(name)
    return wrong
