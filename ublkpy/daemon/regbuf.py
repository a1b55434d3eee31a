"""Has the driver know shared memory, or forget it: ``python -m ublkpy.daemon.regbuf ID COOKIE ...``.

::

    add FD LENGTH READ_ONLY     the first bytes of an inherited file
    remove INDEX...

REG_BUF and UNREG_BUF wait for all requests in flight. So they are not for the daemon's process: if that is killed
meanwhile, the command would hold its files open, and the driver would not take back the requests that the command
waits for. What is registered are pages, whoever maps them.

Without a daemon, nobody answers those requests. With recovery they then wait for the next one, which cannot come,
because the command has the mutex of the device. So this process goes with the daemon, as far as it can.

Prints one JSON object: ``index`` of what was added, or ``errno`` and ``error``.
"""

from __future__ import annotations

import errno
import json
import os
import sys

from ublkpy.driver.ctrl import Control
from ublkpy.errors import UblkError, no_device
from ublkpy.uring import libc
from ublkpy.uring.shmem import Mapping

_A_DAY = 86400.0  # the process that waits for this one has the deadline


def main() -> None:
    dev_id, cookie, action, *numbers = sys.argv[1:]
    try:
        print(json.dumps({"index": _execute(int(dev_id), int(cookie), action, [*map(int, numbers)])}))
    except OSError as e:
        print(json.dumps({"errno": e.errno, "error": UblkError(f"cannot map it: {e.strerror}").to_dict()}))
    except UblkError as e:
        cause = e.__cause__
        number = cause.errno if isinstance(cause, OSError) else errno.ENODEV
        print(json.dumps({"errno": number, "error": e.to_dict()}))


def _execute(dev_id: int, cookie: int, action: str, numbers: list[int]) -> int:
    libc.die_with_parent()
    with Control() as control:
        info = control.info(dev_id)
        if info.ublksrv_flags != cookie or info.ublksrv_pid != os.getppid():
            raise no_device(dev_id)
        if action == "add":
            fd, length, read_only = numbers
            memory = Mapping(fd, length, read_only=bool(read_only))
            return control.register_buffer(dev_id, memory.address, length, read_only=bool(read_only), timeout=_A_DAY)
        for index in numbers:
            control.unregister_buffer(dev_id, index, _A_DAY)
        return 0


if __name__ == "__main__":
    main()
