"""Deletes a device for its daemon: ``python -m ublkpy.daemon.end STYLE ID COOKIE [--force]``.

In another process than the daemon's, which must not wait for its own device
(see server.py); started anew, because the daemon has threads. It writes to
the daemon's log, and its exit code says how it went.
"""

from __future__ import annotations

import logging
import sys

from ublkpy.driver.delete import delete
from ublkpy.errors import ExitCode, NoDeviceError, UblkError
from ublkpy.system import log

_log = logging.getLogger(__name__)


def main() -> int:
    """The process; the exit code is that of ``ublk del``."""
    style, dev_id, cookie, *options = sys.argv[1:]
    log.join(style, int(dev_id))
    try:
        delete(int(dev_id), int(cookie), force="--force" in options)
    except NoDeviceError:
        return ExitCode.OK  # somebody was faster
    except UblkError as e:
        _log.error("%s", e.message)
        return e.exit_code
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
