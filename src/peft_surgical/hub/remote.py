"""Talking to the Hub through huggingface_hub: with patience where asking again does no harm, and errors in words."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

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

from ..errors import AdapterError, ConfigError, SurgicalError

_T = TypeVar("_T")

HUB_ERRORS = (HTTPError, OSError, EntryNotFoundError, RuntimeError, ValueError)
"""What huggingface_hub raises: of a request, a file, an upload in a thread, an answer or an argument."""

TRIES = 5
LONGEST_WAIT = 60.0  # seconds: what a server asks for beyond this is told to the user
_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
_LOGIN = "log in with `hf auth login`, set HF_TOKEN, or pass token="


def patiently(call: Callable[[], _T]) -> _T:
    """Call again after a timeout, a lost connection, 429 or 5xx: for what may be done twice.

    huggingface_hub is patient by itself when it downloads and uploads files, but not with its other requests.
    """
    for attempt in range(TRIES):
        try:
            return call()
        except HUB_ERRORS as error:
            wait = waits(error, attempt)
            if wait is None or attempt == TRIES - 1:
                raise
            time.sleep(wait)
    raise AssertionError("unreachable: the last attempt returns or raises")


def waits(error: Exception, attempt: int = 0) -> float | None:
    """Seconds after which to ask again, as the server says or doubling; None if asking again will not help."""
    cause = _first(error, HTTPError)
    status = status_of(error)
    if cause is None or (status is not None and status not in _AGAIN):
        return None
    response = getattr(cause, "response", None)
    said = response.headers.get("Retry-After", "") if response is not None else ""
    wait = float(said) if said.isdigit() else float(2**attempt)
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
        doing: What is being done: ``"pull"``.
        repo: The repository.
        revision: Of it.
        tried: What was looked for elsewhere before, in words.

    Raises:
        ConfigError: The name of the repository is none.
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
    if isinstance(error, (LocalEntryNotFoundError, HTTPError)) and status is None:
        return f"the Hub cannot be reached ({_short(error)}), and {place} is not in the cache: try again"
    return _short(error)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else f"{text[:300]}..."
