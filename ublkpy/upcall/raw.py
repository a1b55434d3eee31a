"""Targets that answer requests themselves, one by one, when they like; also as parts of others."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter

from ublkpy.tgt.base import Target
from ublkpy.upcall.failure import errno_of
from ublkpy.uring.map import Answer
from ublkpy.uring.queue import Queue, Request

_log = logging.getLogger(__name__)


class Raw:
    """Hands requests to ``Target.upcall``, of the target whose space they are in; what that raises is the answer to
    those that it left.
    """

    def __init__(self, queue: Queue, target: Target) -> None:
        self._queue = queue
        self._target = target

    def answer(self) -> None:
        for space, requests in groupby(self._queue.requests(), attrgetter("space")):
            self._tell(self._queue.who_answers(space) or self._target.upcall, list(requests))

    def _tell(self, answer: Answer, requests: Sequence[Request]) -> None:
        try:
            answer(requests)
            return
        except BaseException as e:
            result = errno_of(e)
            if not result:
                _log.exception("target %s failed", self._target.name)
                result = errno.EIO
        for request in requests:
            with contextlib.suppress(RuntimeError):  # it may be answered, by other threads at this very moment
                request.fail(result)

    def close(self) -> None:
        """Nothing is left."""
