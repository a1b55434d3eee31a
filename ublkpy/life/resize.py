"""``ublk resize``: another size for a device that is in use.

::

    command                                     daemon
    ───────                                     ──────
    resize, done: no   ───────────────────────▶ grow the backing, then the map
    UPDATE_SIZE                                 (or see that it can be cut)
    resize, done: yes  ───────────────────────▶ cut the map, wait for requests behind it, cut the backing

Wherever that ends early, the backing is at least as long as the device, and the same command goes on with it.
"""

from __future__ import annotations

import os

from ublkpy.daemon.channel import RESIZE, ask, held
from ublkpy.driver import inspect
from ublkpy.driver.ctrl import QUICK, Control
from ublkpy.driver.users import check_unused
from ublkpy.errors import BusyError, ConfigError, UblkError
from ublkpy.system.spawn import isolated
from ublkpy.tgt.options import exact_size
from ublkpy.uring.mode import names
from ublkpy.uring.uapi import Feature, State

_ANSWER = 30.0
# The command itself gives up before, and is cancelled: a late one could undo the resize that comes next.
_UPDATE = QUICK + 5.0


def resize(dev_id: int, size: int, *, force: bool = False) -> None:
    """Give the device ``size`` bytes, and its backing as much where the target can do that. Raises UblkError.

    BusyError for one that is in use and would lose its end, unless ``force``.
    """
    device = inspect.status(dev_id)
    _check(device, size)
    assert device.disk is not None
    if size < device.disk.size and not force:
        _check_unused(dev_id, size)
    with held(dev_id, RESIZE, _ANSWER):
        ask(dev_id, "resize", _ANSWER, size=size, done=False)
        try:
            isolated(f"device {dev_id} to change its size", lambda: _update(dev_id, size), _UPDATE)
        except TimeoutError as e:
            raise UblkError(
                f"device {dev_id} did not change its size within {_UPDATE:g} s", "is it being stopped? see: ublk list"
            ) from e
        ask(dev_id, "resize", _ANSWER, size=size, done=True)


def _check(device: inspect.DeviceStatus, size: int) -> None:
    dev_id = device.info.dev_id
    if not device.known:
        raise UblkError(f"device {dev_id} is served by another program", "use the tool that added it")
    if device.info.state != State.LIVE or device.disk is None or device.pid is None:
        raise UblkError(f"device {dev_id} is {device.info.state.name}, and nobody serves it", device.advice)
    if Feature.UPDATE_SIZE not in inspect.features():
        raise UblkError(
            f"this kernel's ublk driver lacks {names(Feature.UPDATE_SIZE)}, which a new size needs",
            f"delete the device and add it again, or use Linux 6.16 or newer (this is {os.uname().release})",
        )
    block = device.disk.logical_block
    if size <= 0 or size % block:
        raise ConfigError(
            f"{size} bytes are not a multiple of the device's blocks of {block} bytes",
            f"the next multiple is {max(1, -(-size // block)) * block}",
        )


def _check_unused(dev_id: int, size: int) -> None:
    try:
        isolated(f"device {dev_id} to be opened", lambda: check_unused(dev_id), _ANSWER)
    except TimeoutError as e:
        raise UblkError(f"/dev/ublkb{dev_id} cannot be opened within {_ANSWER:g} s", "ublk list may say why") from e
    except BusyError as e:
        raise BusyError(
            f"{e.message}: what is behind the first {exact_size(size)} would be lost",
            "shrink what is on it and unmount it first, or use --force",
        ) from e


def _update(dev_id: int, size: int) -> None:
    with Control() as control:
        if control.info(dev_id).state != State.LIVE:
            raise UblkError(f"device {dev_id} is being stopped")
        control.update_size(dev_id, size)
