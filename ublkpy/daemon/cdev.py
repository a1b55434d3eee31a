"""The character device, through which requests come."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from ublkpy.daemon.forks import taking
from ublkpy.errors import UblkError

DEADLINE = 10.0


def open_cdev(dev_id: int, taken: Callable[[int], None]) -> None:
    """Open /dev/ublkcN, and have it ``taken`` before a fork can come in between. UblkError.

    It may not be there yet, not ours yet (udev), or not yet free of its last owner.
    """
    path = f"/dev/ublkc{dev_id}"
    deadline = time.monotonic() + DEADLINE
    while True:
        try:
            with taking:
                taken(os.open(path, os.O_RDWR | os.O_CLOEXEC))
            return
        except OSError as e:
            if time.monotonic() > deadline:
                raise UblkError(
                    f"cannot open {path}: {os.strerror(e.errno or 0)}",
                    "is udev or devtmpfs running, and does nothing else hold it open?",
                ) from e
        time.sleep(0.01)
