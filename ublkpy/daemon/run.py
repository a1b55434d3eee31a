"""A daemon's own process: how a command starts one, and what it hears of it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ublkpy import folders
from ublkpy.daemon.host import heed_signals
from ublkpy.daemon.notify import Manager
from ublkpy.daemon.plan import Plan
from ublkpy.daemon.server import BRING_UP_DEADLINE, Server
from ublkpy.driver import inspect, udev
from ublkpy.errors import UblkError
from ublkpy.system import log, spawn
from ublkpy.system.process import close_inherited_files, harden, leave_mounts
from ublkpy.uring.uapi import DevInfo

_log = logging.getLogger(__name__)

_NODE_DEADLINE = 30.0
READY_DEADLINE = BRING_UP_DEADLINE + _NODE_DEADLINE


@dataclass(frozen=True)
class Start:
    """How a daemon begins: what it serves, and what brings the device up; ``since`` when somebody waits for that."""

    plan: Plan
    bring_up: Callable[[Server], DevInfo]
    manager: Manager = field(default_factory=Manager)
    since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Started:
    """What a command hears of a daemon that serves; ``seconds`` after the ``since`` of its start."""

    dev_id: int
    queues: int
    seconds: float


def start(make: Callable[[], Start], *, new: bool, log_file: Path | None = None) -> Started:
    """Start a daemon, which begins with ``make`` in its own process. Raises the UblkError that ended it, too.

    After Ctrl-C a ``new`` device is taken back; what was to become of one that was there goes on.
    """
    return hear(process(make, log_file), new=new, timeout=READY_DEADLINE)


def process(make: Callable[[], Start], log_file: Path | None) -> spawn.Child:
    """A daemon in a process that nobody has heard yet."""
    return spawn.daemon(lambda ready: _live(make, ready, log_file))


def hear(child: spawn.Child, *, new: bool, timeout: float, leave: bool = False) -> Started:
    """What a daemon says once it serves. Ends one that says nothing in time; or, to ``leave`` it, TimeoutError."""
    try:
        child.attend()
        return Started(**child.wait(timeout))
    except EOFError as e:
        raise UblkError(
            "the daemon died while it set the device up",
            f"its log may say why: journalctl -t ublkpy, or {folders.log_file()}; out of memory shows in dmesg",
        ) from e
    except TimeoutError as e:
        if leave:
            raise
        child.end(kill=not new)  # in good order, it would delete its device
        raise UblkError(f"the daemon was not ready within {timeout:g} s", "the kernel log (dmesg) may say why") from e
    except BaseException:
        if new:
            child.end()
        raise
    finally:
        child.close()


def _live(make: Callable[[], Start], ready: spawn.Ready, log_file: Path | None) -> int:
    """The daemon's whole life; returns the exit status."""
    try:
        log.detach(log_file)
    except UblkError as e:
        ready.failed(e)
        return 1
    try:
        close_inherited_files()
        harden()
        begin = make()
        target = begin.plan.config.target
        log.hear(type(target).__module__)
        leave_mounts(target.paths())
        server = Server(begin.plan, begin.manager)
        heed_signals(server)
        info = begin.bring_up(server)
        log.name_device(info.dev_id)
        seconds = time.monotonic() - begin.since
        wait_node(info.dev_id)
    except UblkError as e:
        _log.error("%s", e.message)
        error = e
    except Exception as e:
        _log.exception("a bug in ublkpy")
        error = UblkError(f"the daemon failed: {type(e).__name__}: {e}", "its log has the traceback")
    else:
        announce(begin.manager, info.dev_id)
        if not ready.done(vars(Started(info.dev_id, info.nr_hw_queues, seconds))):
            server.unheard()
        return server.serve(info)
    # The command may send a signal yet, and the socket that it would write to goes with the server.
    signal.set_wakeup_fd(-1)
    ready.failed(error)
    return 1


def announce(manager: Manager, dev_id: int) -> None:
    """The service is ready. To tell what it is must not be what ends it."""
    if manager:
        with contextlib.suppress(UblkError):
            manager.ready(inspect.status(dev_id).summary)


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
