"""Whose process it is that serves a device, and what follows from that.

::

                          a daemon's own            a program's (life/within.py)
    signals               end the device            are none of our business
    a queue that failed   ends the process          ends the device
    del --force, stuck    kills the process         says what to do
"""

from __future__ import annotations

import logging
import os
import signal
from typing import Protocol


class Host(Protocol):
    """What a server has to know of its process."""

    @property
    def within(self) -> bool:
        """Whether it is a program's."""

    def give_up(self, server: Served) -> None:
        """The device cannot be served any more: have the driver notice."""


class Served(Protocol):
    """What is needed of a server."""

    def wake_fd(self) -> int: ...

    def cut(self) -> None: ...


class Daemon:
    """A process of its own: with it goes all that it has of the device."""

    within = False

    def give_up(self, server: Served) -> None:
        """At once: the driver then fails or keeps the requests as the recovery options say. Closing a queue first would
        leave a device that looks alive."""
        logging.shutdown()
        os._exit(1)


class Program:
    """One that has other things to do, and lives on: it lets go of all that it has."""

    within = True

    def give_up(self, server: Served) -> None:
        server.cut()


def heed_signals(server: Served) -> None:
    """SIGTERM and SIGINT end the device, from now on. For the main thread."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _only_wake)
    signal.set_wakeup_fd(server.wake_fd(), warn_on_full_buffer=False)


def _only_wake(_number: int, _frame: object) -> None:
    """Handles a signal whose byte in the wake socket is all that is wanted."""
