"""Deletes a device for its daemon: ``python -m ublkpy.daemon.end STYLE ID COOKIE [--force]``.

In another process than the daemon's, which must not wait for its own device
(see server.py); started anew, because the daemon has threads. It writes to
the daemon's log, and its exit code says how it went. With REPORT for a style,
it says all that on stdout, as ``spawn.Word`` hears it, for a program that serves
the device itself.
"""

from __future__ import annotations

import logging
import os
import sys

from ublkpy.driver.delete import delete
from ublkpy.driver.users import openers
from ublkpy.errors import ExitCode, NoDeviceError, UblkError
from ublkpy.system import log, spawn

_log = logging.getLogger(__name__)

REPORT = "report"


def main() -> int:
    """The process; the exit code is that of ``ublk del``."""
    style, number, mark, *options = sys.argv[1:]
    dev_id, cookie, force = int(number), int(mark), "--force" in options
    if style == REPORT:
        return spawn.report(lambda: _delete_for_program(dev_id, cookie, force), spawn.Ready(os.dup(1)))
    log.join(style, dev_id)
    try:
        delete(dev_id, cookie, force=force)
    except NoDeviceError:
        return ExitCode.OK  # somebody was faster
    except UblkError as e:
        _log.error("%s", e.message)
        return e.exit_code
    return ExitCode.OK


def _delete_for_program(dev_id: int, cookie: int, force: bool) -> None:
    """Not until nobody has the disk open any more: that may be the program itself, which waits for us."""
    disk_users = openers(dev_id, server=False)
    try:
        delete(dev_id, cookie, force=force, wait=not disk_users)
    except NoDeviceError:
        return  # somebody was faster
    if disk_users:
        _log.warning("/dev/ublkb%d is gone, but still open in %s", dev_id, ", ".join(disk_users))


if __name__ == "__main__":
    sys.exit(main())
