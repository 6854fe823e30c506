"""Threads take turns at one thing, in order of arrival; those who want the same of it share a turn."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

from ..errors import AdapterError


class Turns:
    """A queue for a model that can be in one state at a time.

    Nobody overtakes: who wants the state of the running turn joins it only if nobody else waits, so that a popular
    state does not keep the others out for ever.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()
        self._shared: Hashable = None
        self._users: set[int] = set()  # threads

    @contextmanager
    def turn(self, shared: Hashable, prepare: Callable[[], None]) -> Iterator[None]:
        """Wait for a turn and take it.

        Args:
            shared: Those who ask for an equal one may share.
            prepare: Called by the first, before the turn begins and while nobody else has one. If it raises, there is
                no turn.
        """
        me, ticket = threading.get_ident(), object()
        with self._changed:
            if me in self._users:
                raise AdapterError("This thread uses the pool's model already: end that block before the next begins.")
            self._queue.append(ticket)
            try:
                self._changed.wait_for(lambda: self._queue[0] is ticket and (not self._users or self._shared == shared))
                if not self._users:
                    self._shared = None
                    prepare()
                    self._shared = shared
                self._users.add(me)
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._users.discard(me)
                self._changed.notify_all()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Nobody prepares a turn within this block."""
        with self._changed:
            yield
