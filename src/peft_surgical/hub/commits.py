"""One commit of an adapter's files on the Hub: all of them or none, and reported only once it is known to be there."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RevisionNotFoundError

from ..adapters.remote import FILES, HUB_ERRORS, hub, patiently, status_of
from ..errors import AdapterError
from ..files import file_sha256, shown
from ..keys import PICKLE, WEIGHTS

_CONFLICTS = (409, 412)


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
    there = {sibling.rfilename for sibling in head.siblings or ()}
    stale = sorted(there & {*FILES, PICKLE} - set(files))
    branch = revision or "main"

    def attempt() -> tuple[str, str, str, str | None]:
        # Made anew for each attempt: huggingface_hub notes in them how far they came.
        operations: list[Any] = [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()),
            *(CommitOperationDelete(path_in_repo=name) for name in stale),
        ]
        try:
            made = api.create_commit(
                repo,
                operations,
                commit_message=message,
                commit_description=description,
                revision=revision,
                create_pr=create_pr,
                parent_commit=head.sha,
            )
        except HUB_ERRORS as error:
            oid = None if create_pr else _arrived(api, repo, revision, files, str(head.sha), error)
            if oid is None:
                raise
            return oid, f"{api.endpoint}/{repo}/commit/{oid}", branch, None
        return made.oid, made.commit_url, made.pr_revision or branch, made.pr_url

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
        content = file.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # what git calls this content
        if lfs.sha256 != file_sha256(file) if lfs else getattr(entry, "blob_id", None) != blob:
            wrong.append(name)
    return wrong
