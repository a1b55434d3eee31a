"""What a daemon leaves that dies in the middle of a recovery, in drivers before Linux 6.16.

Only there has START_USER_RECOVERY to put away what is left of the last daemon, and it counts on that having fetched all
its queues. With none it refuses (EINVAL), and the descriptors can be mapped only by a process that is gone; with some
of several it follows a null pointer (ublk_drv.c, ublk_ctrl_start_recovery and ublk_queue_reinit, Linux 6.12).
"""

from __future__ import annotations

import errno
import os

from ublkpy.driver import ctrl, inspect
from ublkpy.errors import BusyError, DriverError, UblkError
from ublkpy.system.spawn import isolated
from ublkpy.uring.ffi import check, ffi, lib
from ublkpy.uring.uapi import DevInfo, Feature

_DEADLINE = 30.0
_NO_BUFFER = 4096
"""An address that the driver takes. It is for data of requests, and a device that waits gives out none."""


def complete(info: DevInfo) -> None:
    """Have a process fetch the queues of a device that waits, as far as nobody has, and die; then START_USER_RECOVERY
    may be sent, which is BusyError until the process is gone.

    Raises BusyError where the old daemon, or another new one, holds the device; UblkError.
    """
    if Feature.QUIESCE in inspect.features():  # it came with Linux 6.16
        return
    try:
        isolated(f"device {info.dev_id} to be freed", lambda: _fetch(info), _DEADLINE)
    except TimeoutError as e:
        raise UblkError(
            f"device {info.dev_id} is not free of its last daemon after {_DEADLINE:g} s",
            "another command may hold it: ublk list shows its state",
        ) from e


def _fetch(info: DevInfo) -> None:
    """Files and rings stay open until the process ends, which is how the driver knows that it is dead."""
    path = ctrl.char_path(info.dev_id)
    addr = 0 if Feature.USER_COPY in info.flags else _NO_BUFFER
    try:
        cdev = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        for q_id in range(info.nr_hw_queues):
            ring, depth = ffi.new("struct ur_ring *"), info.queue_depth
            check(lib.ur_ring_init(ring, depth, 2 * depth, 0), "io_uring_setup")
            # A queue that was fetched refuses each of them.
            check(lib.uq_fetch_unserved(ring, cdev, q_id, depth, addr), f"FETCH of queue {q_id}")
    except OSError as e:
        if e.errno == errno.EBUSY:
            raise BusyError(f"{path} is held by another process") from e
        raise DriverError(f"cannot use {path}: {e.strerror}", "the kernel log (dmesg) may say why") from e
