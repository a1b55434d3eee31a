"""Targets that answer requests themselves, one by one, when they like."""

from __future__ import annotations

import contextlib
import errno
import logging

from ublkpy.tgt.base import Target
from ublkpy.upcall.failure import errno_of
from ublkpy.uring.queue import Queue

_log = logging.getLogger(__name__)


class Raw:
    """Hands requests to ``Target.upcall``; what that raises is the answer to those that it left."""

    def __init__(self, queue: Queue, target: Target) -> None:
        self._queue = queue
        self._target = target

    def answer(self) -> None:
        requests = self._queue.requests()
        try:
            self._target.upcall(requests)
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
