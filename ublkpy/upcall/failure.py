"""What becomes of an exception in a target."""

from __future__ import annotations

import errno
import logging
import os

_log = logging.getLogger(__name__)

_MAX_ERRNO = 4096


def errno_of(error: BaseException) -> int:
    """The errno that this stands for, or 0: those of getaddrinfo() are negative, and some have none."""
    number = error.errno if isinstance(error, OSError) else None
    return number if isinstance(number, int) and 0 < number < _MAX_ERRNO else 0


class Failures:
    """Turns exceptions into results. Of those that are no answer, and of those with a text of their own, the 1st, 2nd,
    4th, 8th ... is logged.

    Any thread: that the counts are exact does not matter.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._count = 0
        self._answers = 0

    def result(self, error: BaseException) -> int:
        """The negative errno for the driver."""
        if number := errno_of(error):
            self._tell(error, number)
            return -number
        if isinstance(error, BufferError):
            error.add_note("parts of buf, such as slices and arrays over it, must not be kept after the call")
        self._count += 1
        if not self._count & (self._count - 1):
            _log.error("target %s failed (%d times so far)", self._name, self._count, exc_info=error)
        return -errno.EIO

    def _tell(self, error: BaseException, number: int) -> None:
        """The driver takes the number alone."""
        if not isinstance(error, OSError) or error.strerror in (None, "", os.strerror(number)):
            return
        self._answers += 1
        if not self._answers & (self._answers - 1):
            _log.error("target %s: %s (%d such errors so far)", self._name, error, self._answers)
