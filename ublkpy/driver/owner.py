"""Tells udev whose a device is: ``python -m ublkpy.driver.owner ublkb0``.

Prints user and group id of an unprivileged device; exits with 1 for all others. udev waits for it (udev.rules), so it
imports little.
"""

from __future__ import annotations

import re
import sys

from ublkpy.driver.ctrl import Control
from ublkpy.errors import UblkError
from ublkpy.uring.uapi import Feature

_NODE = re.compile(r"ublk(?:c|b)(\d+)(?:p\d+)?")


def main() -> int:
    node = _NODE.fullmatch(sys.argv[1])
    if not node:
        return 1
    try:
        with Control() as control:
            info = control.info(int(node[1]))
    except UblkError as e:
        print(e.message, file=sys.stderr)
        return 1
    if Feature.UNPRIVILEGED_DEV not in info.flags:
        return 1
    print(info.owner_uid, info.owner_gid)
    return 0


if __name__ == "__main__":
    sys.exit(main())
