"""Whether a daemon that runs does its work: it answers, and so do its queues.

A queue is stuck when it has requests and completed none for a while. Mostly that is its backing: a disk that is gone, a
server that does not answer. The driver waits for as long as it takes, so nobody else would say so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ublkpy.daemon.channel import SilentError, ask
from ublkpy.driver.disk import completed
from ublkpy.driver.inspect import DeviceStatus
from ublkpy.errors import UblkError
from ublkpy.uring.uapi import Feature, State

_log = logging.getLogger(__name__)

PERIOD = 5.0
"""Seconds between two looks."""
_PATIENCE = 10.0
_ANSWER = 2.0
_AT_ONCE = 16


class Pulse:
    """What the daemon's main thread knows of its queues; ``is_waiting`` says whether they have unanswered requests.

    ``seconds`` is what it saw at its last look.
    """

    def __init__(self, dev_id: int, is_waiting: Callable[[], bool]) -> None:
        self._dev_id = dev_id
        self._is_waiting = is_waiting
        self._done: tuple[int, ...] | None = None
        self._since: float | None = None
        self._told = False
        self.seconds = 0.0

    def look(self) -> float:
        """For how many seconds at least there are requests and none was answered. To be called every PERIOD."""
        done, now = completed(self._dev_id), time.monotonic()
        is_waiting = self._is_waiting()
        if not is_waiting or self._since is None or done != self._done:
            if self._told:
                _log.warning("requests are answered again")
            self._done, self._since, self._told = done, now if is_waiting else None, False
            self.seconds = 0.0
            return 0.0
        seconds = self.seconds = now - self._since
        if seconds >= _PATIENCE and not self._told:
            _log.warning("requests wait, and none was answered for %.0f s", seconds)
            self._told = True
        return seconds

    def to_dict(self) -> dict[str, Any]:
        """The answer to who asks over the channel."""
        return {"seconds": self.look()}


def troubles(devices: Sequence[DeviceStatus]) -> dict[int, str]:
    """What is wrong with devices whose daemons run, and what to do about it, by id."""
    served = [device for device in devices if device.known and device.pid and device.info.state == State.LIVE]
    if not served:
        return {}
    with ThreadPoolExecutor(min(len(served), _AT_ONCE)) as pool:
        found = zip(served, pool.map(_trouble, served), strict=True)
        return {device.info.dev_id: trouble for device, trouble in found if trouble}


def _trouble(device: DeviceStatus) -> str:
    dev_id, pid = device.info.dev_id, device.pid
    within = device.known is not None and device.known.within
    try:
        pulse = ask(dev_id, "pulse", _ANSWER)
    except SilentError:
        if within:
            return f"process {pid}, the program that serves it itself, does not answer; if that lasts, end it"
        recover = Feature.USER_RECOVERY in device.info.flags
        cure = f"kill -9 {pid}; ublk recover -n {dev_id}" if recover else f"ublk del --force -n {dev_id}"
        return f"its daemon does not answer; if that lasts, run: {cure}"
    except UblkError:
        return ""  # on its way, one way or the other
    if pulse["seconds"] < _PATIENCE:
        return ""
    cause = device.known.backing if device.known and device.known.backing else "its target"
    cure = f"end process {pid}, which serves it" if within else f"run: ublk del --force -n {dev_id}"
    return f"requests wait, and none was answered for {pulse['seconds']:.0f} s; look after {cause}, or {cure}"
