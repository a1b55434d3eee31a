"""``ublk recover``: a new daemon for a device whose daemon died."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from ublkpy.config import DeviceConfig, from_dump
from ublkpy.daemon import run
from ublkpy.daemon.channel import ask
from ublkpy.daemon.plan import Plan
from ublkpy.daemon.run import Start
from ublkpy.daemon.server import Server
from ublkpy.driver import halfway, inspect, state
from ublkpy.driver.ctrl import Control
from ublkpy.errors import BusyError, UblkError, no_device
from ublkpy.system.spawn import wait_end
from ublkpy.tgt.base import Geometry
from ublkpy.tgt.options import exact_size
from ublkpy.uring.mode import MODES
from ublkpy.uring.uapi import Attr, DevInfo, Feature, State

log = logging.getLogger(__name__)

T = TypeVar("T")

# Linux 6.12 may notice the death of a loaded daemon only by its 30 s request timeout.
_QUIESCE_DEADLINE = 60.0
_RELEASE_DEADLINE = 30.0
_DYING = 1.0
_ANSWER = 5.0
_LOOK = 0.005


def recover(dev_id: int) -> DeviceConfig:
    """Serve the device again from a new daemon, with the target that its state file describes; returns that.

    The device must have been added with recovery. Raises UblkError; the device then waits on.
    """
    start = prepare(dev_id)
    config = start.plan.config
    try:
        run.start(lambda: start, new=False, log_file=config.device.log)
    finally:
        config.target.close()
    return config


def prepare(dev_id: int) -> Start:
    """How the next daemon begins; its target is open. Waits until the old daemon is gone. Raises UblkError."""
    device = inspect.status(dev_id)
    known = _recoverable(device)
    wait_noticed(dev_id)
    try:
        config, mode = from_dump(known.config), MODES[known.mode]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise state.damaged(dev_id, e) from e
    geometry = _when_released(dev_id, lambda: reopen(dev_id, config))
    try:
        size = _check_same(device, geometry)
    except UblkError:
        config.target.close()
        raise
    plan = Plan(config, replace(geometry, size=size), known.cookie, known.shmem)

    def take_over(server: Server) -> DevInfo:
        _when_released(dev_id, lambda: halfway.complete(device.info))
        # In that process: it waits for a mutex where no signal reaches it.
        _when_released(dev_id, lambda: _start_recovery(dev_id))
        server.take_over(device.info, mode)
        return device.info

    return Start(plan, take_over)


def reopen(dev_id: int, config: DeviceConfig) -> Geometry:
    """Open the target of a device that there is. Raises UblkError; what helps a new device would be wrong for it."""
    try:
        return config.open()
    except BusyError:
        raise
    except UblkError as e:
        raise UblkError(
            f"device {dev_id} cannot be served: {e.message}",
            "bring back what it had, or mount what that is on; a new one would not have its data",
        ) from e


def _recoverable(device: inspect.DeviceStatus) -> state.DeviceState:
    dev_id = device.info.dev_id
    if device.known is None:
        state.read(dev_id)  # says what is wrong with it, if anything
        raise UblkError(
            f"device {dev_id} was not added by ublkpy, or its state file {state.run_dir()}/{dev_id}.json is gone",
            f"use the tool that added it, or delete it: ublk del -n {dev_id}",
        )
    device.require_daemon("recovered")
    if device.pid is not None and not _wait_gone(dev_id, device.pid):
        raise BusyError(
            f"device {dev_id} needs no recovery: process {device.pid} serves it", "ublk list shows its state"
        )
    if Feature.USER_RECOVERY not in device.info.flags:
        raise UblkError(
            f"device {dev_id} was added without recovery",
            f"serve it anew: ublk start -n {dev_id}; with --recovery queue or reissue it could be recovered",
        )
    if device.info.state == State.DEAD:
        raise UblkError(f"device {dev_id} is stopped", f"start it: ublk start -n {dev_id}")
    return device.known


def _wait_gone(dev_id: int, pid: int) -> bool:
    """False for a daemon that serves. One that was killed may be on its way out yet: then it answers nobody."""
    deadline = time.monotonic() + _RELEASE_DEADLINE
    while not wait_end(pid, _DYING):
        try:
            ask(dev_id, "service", _ANSWER)
        except UblkError:
            if time.monotonic() < deadline:
                continue
        return False
    return True


def _check_same(device: inspect.DeviceStatus, now: Geometry) -> int:
    """A block device that is there keeps its properties: on a backing that lost one, requests would fail.

    Its size in bytes; the backing may have more.
    """
    dev_id, disk = device.info.dev_id, device.disk
    if disk is None:  # being deleted
        raise no_device(dev_id)
    if now.size < disk.size:
        raise UblkError(
            f"device {dev_id} has {exact_size(disk.size)}, but its backing now has {exact_size(now.size)}",
            "give the backing its old size again, or delete the device",
        )
    if now.logical_block > disk.logical_block:
        raise UblkError(
            f"device {dev_id} has blocks of {disk.logical_block} bytes, but its backing now takes"
            f" only {now.logical_block}",
            "bring back the backing that it had, or delete the device",
        )
    if now.integrity and now.logical_block != disk.logical_block:
        raise UblkError(
            f"device {dev_id} has metadata for blocks of {disk.logical_block} bytes, but those of its backing"
            f" now have {now.logical_block}",
            "bring back the backing that it had, or delete the device",
        )
    if now.read_only and Attr.READ_ONLY not in disk.attrs:
        raise UblkError(
            f"device {dev_id} can be written, but its backing no longer can",
            "make the backing writable again, or delete the device",
        )
    return disk.size


def wait_noticed(dev_id: int) -> None:
    """Wait until the driver has noticed that the old daemon is dead. Raises UblkError."""
    started = time.monotonic()
    told = False
    with Control() as control:
        while control.info(dev_id).state is State.LIVE:
            waited = time.monotonic() - started
            if waited > _QUIESCE_DEADLINE:
                raise UblkError(
                    f"the driver still takes the daemon of device {dev_id} for alive",
                    "its requests may still be on their way to the backing, or a forked child of it may hold the"
                    f" device: fuser -v /dev/ublkc{dev_id}",
                )
            if waited > 1 and not told:
                log.info("waiting for the driver to notice that the old daemon is dead (up to 30 s on 6.12)")
                told = True
            time.sleep(_LOOK)


def _start_recovery(dev_id: int) -> None:
    with Control() as control:
        control.start_recovery(dev_id)


def _when_released(dev_id: int, action: Callable[[], T]) -> T:
    """Do what fails with BusyError as long as the old daemon's rings hold on: some time after its end.

    Unless another recovery was faster: then at once the BusyError that says so.
    """
    deadline = time.monotonic() + _RELEASE_DEADLINE
    while True:
        try:
            return action()
        except BusyError as e:
            if time.monotonic() > deadline:
                raise UblkError(
                    f"the old daemon of device {dev_id} is dead, but what it had is not free after"
                    f" {_RELEASE_DEADLINE:g} s: {e.message}",
                    "its requests may still be on their way to the backing; try again when that answers",
                ) from e
        _recoverable(inspect.status(dev_id))
        time.sleep(_LOOK)
