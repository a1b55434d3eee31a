"""``ublk quiesce`` and ``ublk upgrade``: a device whose requests wait while it has no daemon, or another one.

::

    old daemon                     driver                       new daemon (of the installed version)
    ──────────                     ──────                       ─────────────────────────────────────
    answers what it has  ◀──────── QUIESCE_DEV: new requests wait
    keeps the state file, tells
    the service manager, ends
                                   QUIESCED
                                   START_USER_RECOVERY  ◀────── opens the target, starts its queues
                                   END_USER_RECOVERY ─────────▶ serves what has waited

No request fails, and none is sent twice: the old daemon has answered all that it was given. The new one is a process
before anything is done, so that requests wait no longer than they must, and it goes on when the command is killed.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import signal
import time
from dataclasses import replace
from functools import partial

from ublkpy.config import DeviceConfig, from_dump
from ublkpy.daemon import run, unit
from ublkpy.daemon.channel import KEEP, UPGRADE, ask, held
from ublkpy.daemon.notify import Manager
from ublkpy.daemon.run import Start
from ublkpy.daemon.server import Server
from ublkpy.driver import inspect, state
from ublkpy.driver.ctrl import Control
from ublkpy.errors import BusyError, UblkError
from ublkpy.life.recover import prepare, reopen
from ublkpy.system.spawn import isolated, wait_end
from ublkpy.uring.mode import names
from ublkpy.uring.uapi import DevInfo, Feature, State

log = logging.getLogger(__name__)

_ANSWER = 5.0
_DEADLINE = 60.0
_ROUND = 1.0
_SOON = 0.001
_LATER = 0.05
_EXIT = 30.0


def quiesce(dev_id: int) -> None:
    """Hold new requests up, have the daemon answer those that it has, and end. Raises UblkError.

    ``recover`` goes on from there. Once begun, there is no way back: it is done when the daemon has answered.
    """
    device = inspect.status(dev_id)
    _check(device)
    deadline = time.monotonic() + _DEADLINE
    late = _unanswered(device, f"it can be recovered when it has, or when process {device.pid} is killed")

    def hold_up() -> None:
        if not _hold_up(dev_id, deadline):
            raise late

    try:
        with held(dev_id, KEEP, _ANSWER):  # one that does not answer would not end either
            isolated(f"device {dev_id} to be quiesced", hold_up, _DEADLINE + _ANSWER)
            if device.pid is not None:
                wait_end(device.pid, _EXIT)
    except TimeoutError as e:
        raise late from e


def upgrade(dev_id: int) -> float | None:
    """Have a new daemon of the installed version serve the device; for how many seconds requests waited.

    No request fails. The daemon of a systemd unit is replaced by that unit's reload, which tells no time. Raises
    UblkError, BusyError while another upgrade is under way. After a minute nobody waits any longer for requests that
    the old daemon does not answer, but the new one does.
    """
    device = inspect.status(dev_id)
    _check(device)
    if Feature.USER_RECOVERY_FAIL_IO in device.info.flags:
        raise UblkError(
            f"device {dev_id} was added with recovery fail: without a daemon its requests would fail",
            "end what uses it, and then: ublk quiesce and ublk recover; recovery queue or reissue can be upgraded",
        )
    config, pid = _rehearse(device), device.pid
    manager = Manager(**ask(dev_id, "service", _ANSWER))
    if manager and pid and (name := unit.of_another(pid)):
        unit.reload(name, pid, _DEADLINE + run.READY_DEADLINE)
        return None
    begun = mmap.mmap(-1, 1)  # shared: that requests may be held up already
    child = run.process(partial(_take_over, device, manager, begun), config.device.log)
    try:
        return run.hear(child, new=False, timeout=_DEADLINE, leave=True).seconds
    except TimeoutError as e:
        raise _unanswered(device, f"when it has, process {child.pid} takes over") from e
    except UblkError:
        left = _after_the_old_one(dev_id, pid) if begun[0] else inspect.status(dev_id)
        if left.known and left.is_waiting:
            state.write(replace(left.known, kept=False))  # nobody goes on with it: a supervisor may
            log.warning("requests of device %d wait now for: ublk recover -n %d", dev_id, dev_id)
        raise


def _after_the_old_one(dev_id: int, old: int | None) -> inspect.DeviceStatus:
    """What becomes of a device whose new daemon failed: the old one ends, unless it has requests for a long time."""
    deadline = time.monotonic() + _EXIT
    while True:
        device = inspect.status(dev_id)
        if device.is_waiting or device.pid not in (None, old) or time.monotonic() > deadline:
            return device
        time.sleep(_LATER)


def _take_over(device: inspect.DeviceStatus, manager: Manager, begun: mmap.mmap) -> Start:
    """How the new daemon begins: in its process the old one is ended, once ``begun``.

    From QUIESCE_DEV on there is no way back, so it waits as long as it takes. SIGTERM, which a service manager may send
    meanwhile, is for the daemon that it then is.
    """
    dev_id, old = device.info.dev_id, device.pid
    assert old
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    with held(dev_id, UPGRADE, _ANSWER):
        since = time.monotonic()
        begun[0] = 1
        _hold_up(dev_id, math.inf)
        if not wait_end(old, _EXIT):
            log.warning("the old daemon has no requests left, but does not end: killing process %d", old)
            manager.main_process(os.getpid())  # what it would have said as its last word
            wait_end(old, _EXIT, kill=True)
    start = prepare(dev_id)

    def bring_up(server: Server) -> DevInfo:
        info = start.bring_up(server)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return info

    return Start(start.plan, bring_up, manager, since)


def _hold_up(dev_id: int, deadline: float) -> bool:
    """Again and again: with all tags busy the driver takes none back, and does not look again (uapi, QUIESCE_DEV).

    False at the deadline; what the driver took stays taken.
    """
    began = time.monotonic()
    with Control() as control:
        while control.info(dev_id).state == State.LIVE:
            if (now := time.monotonic()) > deadline:
                return False
            control.quiesce(dev_id, _ROUND)
            time.sleep(_SOON if now < began + _ROUND else _LATER)
    return True


def _unanswered(device: inspect.DeviceStatus, then: str) -> UblkError:
    backing = device.known.backing if device.known and device.known.backing else "its target"
    return UblkError(
        f"device {device.info.dev_id} is not quiesced after {_DEADLINE:g} s: its daemon has requests that are not"
        f" answered; new ones wait, and {then}",
        f"look after {backing}",
    )


def candidates() -> list[int]:
    """The devices of ours that are served and can be upgraded as they were added; of the others the log tells."""
    found = []
    for device in inspect.list_devices():
        flags = device.info.flags
        if not device.known or device.pid is None:
            continue
        if Feature.USER_RECOVERY not in flags or flags & (Feature.USER_RECOVERY_FAIL_IO | Feature.BATCH_IO):
            log.info("%s stays as it is: ublk upgrade -n %d says why", device.node, device.info.dev_id)
        else:
            found.append(device.info.dev_id)
    return found


def _check(device: inspect.DeviceStatus) -> None:
    dev_id = device.info.dev_id
    if not device.known:
        raise UblkError(f"device {dev_id} is served by another program", "use the tool that added it")
    device.require_daemon("quiesced or upgraded")
    if device.info.state != State.LIVE or device.pid is None:
        raise UblkError(f"device {dev_id} is {device.info.state.name}, and nobody serves it", device.advice)
    if Feature.USER_RECOVERY not in device.info.flags:
        raise UblkError(
            f"device {dev_id} was added without recovery: it cannot be without a daemon",
            "add it anew with --recovery reissue or queue (in its YAML file, recovery: reissue)",
        )
    if Feature.QUIESCE not in inspect.features():
        raise UblkError(
            f"this kernel's ublk driver lacks {names(Feature.QUIESCE)}: it cannot hold requests up",
            f"with recovery reissue, kill process {device.pid} and: ublk recover -n {dev_id}; requests that it has"
            " are then sent again; Linux 6.16 or newer has it",
        )
    if Feature.BATCH_IO in device.info.flags:
        raise UblkError(
            f"device {dev_id} is in mode {device.known.mode}: the driver fails what comes while such a device is"
            " quiesced",
            f"end what uses it, and add it again without --mode; or kill process {device.pid} and: ublk recover",
        )
    if Feature.QUIESCE not in device.info.flags:
        raise UblkError(f"device {dev_id} was added without {names(Feature.QUIESCE)}", "add it again with ublkpy")


def _rehearse(device: inspect.DeviceStatus) -> DeviceConfig:
    """See that this version understands the device and can open its target, before anything is done to it."""
    assert device.known
    try:
        config = from_dump(device.known.config)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise state.damaged(device.info.dev_id, e) from e
    try:
        reopen(device.info.dev_id, config)
    except BusyError:  # by the daemon that there is
        return config
    config.target.close()
    return config
