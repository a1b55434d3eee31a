"""``ublk add``: from a configuration to a block device that can be opened."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import time
from collections.abc import Callable

from ublkpy import folders
from ublkpy.config import DeviceConfig
from ublkpy.daemon import ctrl, inspect, log, named, process, spawn, state, udev
from ublkpy.daemon.delete import delete
from ublkpy.daemon.server import BRING_UP_DEADLINE, Plan, Server
from ublkpy.errors import BusyError, DriverError, UblkError
from ublkpy.uring.uapi import DevInfo

_log = logging.getLogger(__name__)

_NODE_DEADLINE = 30.0
READY_DEADLINE = BRING_UP_DEADLINE + _NODE_DEADLINE
# In the driver's ublksrv_flags: "ublk" in ASCII, then 32 random bits.
_COOKIE_MARK = 0x75626C6B << 32


def add(
    config: DeviceConfig,
    on_ready: Callable[[int], None] = lambda dev_id: None,
    before: Callable[[], None] = lambda: None,
) -> int:
    """Serve a device from a daemon of its own; returns its id once its node can be opened.

    ``on_ready`` is called with the id just before, ``before`` when the target is open and nothing else done.
    Raises UblkError, also for what the daemon found wrong, KeyboardInterrupt, and what these raise; then nothing is
    left.
    """
    if left := named.waiting(config.device.name):
        raise BusyError(
            f"{left.node} has the name {config.device.name} already, and waits for a daemon",
            f"give it one: ublk recover -n {left.info.dev_id}",
        )
    plan = make_plan(config)

    def body(ready: spawn.Ready) -> int:
        return run_daemon(plan, ready, Server.create)

    try:
        before()
        done = start_daemon(body, new=True)
        dev_id: int = done["dev_id"]
        tell_clamped(config, done["queues"])
        on_ready(dev_id)
    except BaseException:
        _sweep(plan.cookie)
        raise
    finally:
        config.target.close()
    return dev_id


def start_daemon(body: Callable[[spawn.Ready], int], *, new: bool) -> dict[str, int]:
    """Start a daemon and hear from it: what it serves, or the UblkError that ended it.

    After Ctrl-C a ``new`` device is taken back; the recovery of one that was there goes on.
    """
    child = spawn.daemon(body)
    try:
        return child.wait(READY_DEADLINE)
    except EOFError as e:
        raise UblkError(
            "the daemon died while it set the device up",
            f"its log may say why: journalctl -t ublkpy, or {folders.log_file()}; out of memory shows in dmesg",
        ) from e
    except TimeoutError as e:
        child.end(kill=not new)  # in good order, it would delete its device
        raise UblkError(
            f"the daemon was not ready within {READY_DEADLINE:g} s", "the kernel log (dmesg) may say why"
        ) from e
    except BaseException:
        if new:
            child.end()
        raise
    finally:
        child.close()


def run_daemon(plan: Plan, ready: spawn.Ready, begin: Callable[[Server], DevInfo]) -> int:
    """The daemon's whole life, in its own process; ``begin`` brings the device up."""
    try:
        log.detach(plan.config.device.log)
    except UblkError as e:
        ready.failed(e)
        return 1
    try:
        process.close_inherited_files()
        process.harden()
        server = Server(plan)
        info = begin(server)
        log.name_device(info.dev_id)
        wait_node(info.dev_id)
    except UblkError as e:
        _log.error("%s", e.message)
        error = e
    except Exception as e:
        _log.exception("a bug in ublkpy")
        error = UblkError(f"the daemon failed: {type(e).__name__}: {e}", "its log has the traceback")
    else:
        if not ready.done({"dev_id": info.dev_id, "queues": info.nr_hw_queues}):
            server.unheard()
        return server.serve(info)
    # The command may send a signal yet, and the socket that it would write to goes with the server.
    signal.set_wakeup_fd(-1)
    ready.failed(error)
    return 1


def make_plan(config: DeviceConfig) -> Plan:
    """What is to be served, for a new device; opens the target. UblkError for what is wrong with it already."""
    ctrl.require_right_to_add(unprivileged=config.device.unprivileged)
    if config.device.unprivileged:
        udev.check_set_up()
    state.check_folder()
    return Plan(config, config.open(), _COOKIE_MARK | secrets.randbits(32))


def _sweep(cookie: int) -> None:
    """Delete what a daemon that is dead now may have left in the driver; it bears the cookie."""
    try:
        with spawn.uninterrupted():
            left = inspect.find_by_cookie(cookie)
            if left is not None:
                delete(left, cookie, force=True)
    except DriverError:
        pass  # closed to the daemon as well as to us
    except UblkError as e:
        _log.error("the device could not be taken back: %s", e.message)


def tell_clamped(config: DeviceConfig, queues: int) -> None:
    """Say that the driver gave fewer queues than were asked for."""
    wanted = config.device.queues
    if queues < wanted:
        _log.warning("the driver gave %d of %d queues: it makes no more than there are CPUs", queues, wanted)


def wait_node(dev_id: int) -> None:
    """Wait until the block device can be opened: udev may still be at work on it."""
    node = f"/dev/ublkb{dev_id}"
    deadline = time.monotonic() + _NODE_DEADLINE
    while True:
        try:
            os.close(os.open(node, os.O_RDONLY | os.O_CLOEXEC))
            return
        except OSError as e:
            if time.monotonic() > deadline:
                hint = "is udev or devtmpfs running?" if os.geteuid() == 0 else udev.why_closed(e.errno or 0)
                raise UblkError(f"{node} cannot be opened: {os.strerror(e.errno or 0)}", hint) from e
        time.sleep(0.01)
