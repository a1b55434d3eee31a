"""What crashes leave: devices that nobody serves and nobody can recover, and files of devices that are gone."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from pathlib import Path

from ublkpy.driver import inspect, state
from ublkpy.driver.delete import delete
from ublkpy.driver.udev import OWNED_DEADLINE
from ublkpy.driver.users import openers
from ublkpy.errors import DriverError, NoDeviceError, UblkError
from ublkpy.uring.uapi import Feature, State

log = logging.getLogger(__name__)

_SETTLE = 1.0  # seconds in which a server opens the device that it has just made


def dead_devices() -> list[int]:
    """Devices, of every server, that are DEAD: neither served, nor stopped to be started again.

    Those that nobody has opened yet look the same, and may be about to be.
    """
    found = _unserved()
    if found:
        # That of a user may be waiting for udev.
        unprivileged = any(_is_unprivileged(dev_id) for dev_id in found)
        time.sleep(OWNED_DEADLINE if unprivileged else _SETTLE)
    again = _unserved()
    return [dev_id for dev_id, incarnation in found.items() if again.get(dev_id) == incarnation]


def stale_files() -> list[Path]:
    """State files and sockets of devices that are gone."""
    found = []
    for path in sorted(state.run_dir().glob("*")):
        match = re.fullmatch(r"(\d+)\.(json|json\.new|sock|watch)", path.name)
        if match and not _belongs(int(match[1])):
            found.append(path)
    return found


def clear() -> list[UblkError]:
    """Remove all of it; returns what failed."""
    errors = []
    for dev_id in dead_devices():
        try:
            delete(dev_id, force=True)
            log.info("deleted device %d", dev_id)
        except NoDeviceError:
            pass  # somebody was faster
        except UblkError as e:
            errors.append(e)
    for path in stale_files():
        if not _belongs(int(path.name.partition(".")[0])):  # that of an add which has just begun
            path.unlink(missing_ok=True)
            log.info("removed %s", path)
    return errors


def _unserved() -> dict[int, int | None]:
    """The devices without a server, with their incarnations."""
    found = {}
    for device in inspect.list_devices():
        dev_id = device.info.dev_id
        stopped = device.known is not None and device.known.kept
        if device.info.state == State.DEAD and device.pid is None and not stopped and not openers(dev_id):
            found[dev_id] = inspect.incarnation(dev_id)
    return found


def _is_unprivileged(dev_id: int) -> bool:
    try:
        return Feature.UNPRIVILEGED_DEV in inspect.status(dev_id).info.flags
    except (NoDeviceError, DriverError):
        return False


def _belongs(dev_id: int) -> bool:
    """Whether a file of this id is that of a device that exists, or of a daemon that lives."""
    known = None
    with contextlib.suppress(UblkError):
        known = state.read(dev_id)
    if known and known.alive():
        return True
    try:
        cookie = inspect.status(dev_id).info.ublksrv_flags
    except (NoDeviceError, DriverError):  # gone, or another user's by now
        return False
    return known is None or known.cookie == cookie
