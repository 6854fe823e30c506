"""One commit of an adapter's files on the Hub: all of them or none, and announced only once it is known to be there."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RevisionNotFoundError

from ..errors import AdapterError
from ..files import file_sha256, shown
from ..keys import CARD, CONFIG, FIGURE, PICKLE, RECORD_FILE, REPORT, WEIGHTS
from .remote import HUB_ERRORS, TRIES, patiently, status_of, waits

OWN = (CARD, CONFIG, WEIGHTS, PICKLE, RECORD_FILE, REPORT, FIGURE)
"""Files that belong to an adapter: those that a push does not bring are an older adapter's, and go."""
_CONFLICTS = frozenset({409, 412})


@dataclass(frozen=True)
class Commit:
    """A commit that is on the Hub.

    Attributes:
        oid: Its hash.
        url: Its page.
        revision: The branch that it is on, or the pull request's ``refs/pr/N``.
        pr_url: The pull request's page.
    """

    oid: str
    url: str
    revision: str
    pr_url: str | None = None


@dataclass(frozen=True)
class Goal:
    """Where to push, and how; see `huggingface_hub.HfApi.create_commit`."""

    repo: str
    revision: str | None = None
    private: bool | None = None
    create_pr: bool = False
    message: str = "Upload a surgical adapter"
    description: str | None = None


def hub(token: str | bool | None = None) -> HfApi:
    """huggingface_hub's client. Endpoint, proxies and stored tokens are its own business."""
    return HfApi(token=token, library_name="peft-surgical", library_version=version("peft-surgical"))


def commit_files(files: Mapping[str, Path], goal: Goal, token: str | bool | None = None) -> Commit:
    """Put files into a repository, in one commit on top of the one that is there now.

    A lost answer is looked into: the commit counts if the branch holds exactly these files. If somebody else has
    committed in the meantime, nothing is pushed.

    Args:
        files: Path in the repository -> file.
        goal: Where to. The repository and its branch are made if they do not exist.
        token: By default the one that was logged in with.

    Raises:
        AdapterError: The repository is public and ``private`` was asked for; another commit came first; or what is
            there afterwards is not what was sent.
        OSError: The Hub, as huggingface_hub has it.
    """
    api = hub(token)
    patiently(lambda: api.create_repo(goal.repo, private=goal.private, exist_ok=True))
    head = _head(api, goal)
    if goal.private and head.private is False:
        raise AdapterError(
            f"{goal.repo} exists and is public, and private=True was asked for: nothing was pushed. Make it private in "
            "its settings, or choose another name"
        )
    there = {sibling.rfilename for sibling in head.siblings or ()}
    stale = sorted(there & set(OWN) - set(files))
    commit = _commit(api, goal, files, stale, str(head.sha))
    if wrong := _differing(api, goal.repo, commit.oid, files):
        raise AdapterError(f"the commit {commit.oid} of {goal.repo} lacks {shown(wrong)} as it was sent: push again")
    return commit


def _head(api: HfApi, goal: Goal) -> Any:
    """What the branch is at now; it is made where it does not exist."""
    try:
        return patiently(lambda: api.model_info(goal.repo, revision=goal.revision))
    except RevisionNotFoundError:
        branch = goal.revision
        if branch is None or branch.startswith("refs/"):
            raise
    patiently(lambda: api.create_branch(goal.repo, branch=branch, exist_ok=True))
    return patiently(lambda: api.model_info(goal.repo, revision=branch))


def _commit(api: HfApi, goal: Goal, files: Mapping[str, Path], stale: list[str], head: str) -> Commit:
    attempt = 0
    while True:
        # Made anew for each attempt: huggingface_hub notes in them how far they came.
        operations: list[Any] = [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()),
            *(CommitOperationDelete(path_in_repo=name) for name in stale),
        ]
        try:
            made = api.create_commit(
                goal.repo,
                operations,
                commit_message=goal.message,
                commit_description=goal.description,
                revision=goal.revision,
                create_pr=goal.create_pr,
                parent_commit=head,
            )
            return Commit(made.oid, made.commit_url, made.pr_revision or goal.revision or "main", made.pr_url)
        except HUB_ERRORS as error:
            # A second attempt at a pull request could be a second one.
            found = None if goal.create_pr else _arrived(api, goal, files, head, error)
            if found is not None:
                return found
            wait = None if goal.create_pr else waits(error, attempt)
            attempt += 1
            if wait is None or attempt == TRIES:
                raise
        time.sleep(wait)


def _arrived(api: HfApi, goal: Goal, files: Mapping[str, Path], head: str, error: Exception) -> Commit | None:
    """The commit, if it is there although its answer was lost.

    Raises:
        AdapterError: Another one is there.
    """
    try:
        now = str(patiently(lambda: api.model_info(goal.repo, revision=goal.revision)).sha)
        mine = now != head and not _differing(api, goal.repo, now, files)
    except HUB_ERRORS:
        raise error from None  # nothing can be said
    if mine:
        return Commit(now, f"{api.endpoint}/{goal.repo}/commit/{now}", goal.revision or "main")
    if now != head or status_of(error) in _CONFLICTS:
        raise AdapterError(
            f"{goal.repo} has changed while this was being pushed (from commit {head[:12]} to {now[:12]}): nothing was "
            "pushed. Look at what came first, and push again"
        ) from error
    return None


def _differing(api: HfApi, repo: str, commit: str, files: Mapping[str, Path]) -> list[str]:
    """Files that are not at a commit as they are here, by their hashes."""
    entries = patiently(lambda: list(api.list_repo_tree(repo, recursive=True, revision=commit)))
    there: dict[str, Any] = {entry.path: entry for entry in entries}
    wrong = []
    for name, file in files.items():
        entry = there.get(name)
        lfs = getattr(entry, "lfs", None)
        same = lfs.sha256 == file_sha256(file) if lfs else getattr(entry, "blob_id", None) == _blob(file)
        if not same:
            wrong.append(name)
    return wrong


def _blob(file: Path) -> str:
    """The name that git gives a file's content."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
