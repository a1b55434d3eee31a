"""Devices by name: how people find them, and how whoever starts a daemon again finds what the one before it left."""

from __future__ import annotations

import logging

from ublkpy.driver import inspect
from ublkpy.driver.delete import delete
from ublkpy.errors import BusyError, NoDeviceError
from ublkpy.system.spawn import wait_end
from ublkpy.uring.uapi import Feature, State

log = logging.getLogger(__name__)

# A daemon that was killed just now may still be on its way out.
_DYING = 5.0


def find(name: str) -> inspect.DeviceStatus:
    """The device of this name. NoDeviceError if there is none."""
    for device in _all(name):
        return device
    raise NoDeviceError(f"no device has the name {name}", "ublk list shows what there is; --name gives one a name")


def waiting(name: str | None, *, spare_stopped: bool = False) -> inspect.DeviceStatus | None:
    """The device of this name that can be recovered; None if there is none, and a new one can have the name.

    One that is dead without recovery is deleted; with ``spare_stopped``, not one that can be started again. Raises
    BusyError for that, and for one that is served, and UblkError.
    """
    for device in _all(name) if name else []:
        dev_id = device.info.dev_id
        if (pid := device.pid) is not None and not wait_end(pid, _DYING):
            raise BusyError(
                f"{device.node} has the name {name} already, and process {pid} serves it",
                f"choose another name, or delete it: ublk del -n {dev_id}",
            )
        # Without a disk there is nothing to recover: its daemon died before it was started, or after it was stopped.
        if Feature.USER_RECOVERY in device.info.flags and device.disk and device.info.state != State.DEAD:
            return device
        if spare_stopped and device.known and device.known.kept:
            raise BusyError(
                f"{device.node} has the name {name} already, and is stopped",
                f"start it: ublk start -n {dev_id}; or delete it: ublk del -n {dev_id}",
            )
        log.info("deleting /dev/ublkb%d, which the daemon of %s left behind", dev_id, name)
        delete(dev_id, device.info.ublksrv_flags)
    return None


def _all(name: str) -> list[inspect.DeviceStatus]:
    return [device for device in inspect.list_devices() if device.name == name]
