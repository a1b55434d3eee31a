"""``ublk stop`` and ``ublk start``: a device without its block device, and with it again."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace

from ublkpy.config import DeviceConfig, DeviceOptions, from_dump
from ublkpy.daemon.channel import KEEP, SilentError, held
from ublkpy.driver import delete, inspect, state
from ublkpy.errors import BusyError, NoDeviceError, UblkError
from ublkpy.life.add import add
from ublkpy.life.recover import wait_noticed
from ublkpy.uring.uapi import State

log = logging.getLogger(__name__)

_ANSWER = 5.0


def stop(dev_id: int, *, safe: bool = False, force: bool = False) -> None:
    """Take the block device away and end the daemon; the id and what the device was stay, for ``start``.

    ``safe``: BusyError if anybody has it open at all (UBLK_F_SAFE_STOP_DEV), ``force``: also one that is in use.
    Raises UblkError.
    """
    device = inspect.status(dev_id)
    device.require_daemon("stopped to be started again")
    served = device.known is not None and device.pid is not None
    with contextlib.ExitStack() as stack:
        try:
            if served:
                stack.enter_context(held(dev_id, KEEP, _ANSWER))
        except SilentError:
            if not force:
                raise
            # It will be killed, and cannot remove its file.
        delete.stop(dev_id, safe=safe, force=force)


def start(dev_id: int) -> DeviceConfig:
    """Serve a device again that was stopped, or whose daemon died, as it was added; returns that. Raises UblkError.

    It is deleted and added anew: only since Linux 7.3 could the old one be used again. What fails leaves the state
    file behind, so that it can be tried once more.
    """
    known = state.read(dev_id)
    if known is None:
        inspect.status(dev_id)  # perhaps there is none
        raise UblkError(f"device {dev_id} was not added by ublkpy", "use the tool that added it")
    if known.within:
        inspect.status(dev_id).require_daemon("started")
    try:
        config = from_dump(known.config)
        config = DeviceConfig(DeviceOptions(vars(config.device) | {"id": dev_id}), config.target)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise state.damaged(dev_id, e) from e

    def clear() -> None:
        """The old one makes place: only now, when all that can go wrong with the target has not."""
        state.write(replace(known, segments=[]))  # they are not to go with it
        if _find_stopped(dev_id):
            delete.delete(dev_id, known.cookie, force=True)

    _find_stopped(dev_id)
    try:
        add(config, before=clear, again=True)
    except BaseException:
        left = state.read(dev_id)
        if left is None or left.cookie == known.cookie:
            state.write(known)
        raise
    return config


def _find_stopped(dev_id: int) -> bool:
    """Whether the device is there; BusyError if it is not stopped."""
    try:
        device = inspect.status(dev_id)
    except NoDeviceError:
        return False
    if device.known is None:
        raise BusyError(f"another device has the id {dev_id} now", "ublk list shows it")
    if (pid := device.pid) is not None:
        raise BusyError(
            f"device {dev_id} is not stopped: it is {device.info.state.name}, and process {pid} serves it",
            "ublk list shows it",
        )
    wait_noticed(dev_id)
    device = inspect.status(dev_id)
    if device.info.state != State.DEAD:
        raise BusyError(
            f"device {dev_id} is not stopped: it is {device.info.state.name}", device.advice or "ublk list shows it"
        )
    return True
