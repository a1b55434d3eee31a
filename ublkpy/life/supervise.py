"""``supervise``: a process beside the daemon that brings the device back when the daemon dies.

One for each device, as long as the device exists; whoever ends it ends the supervision. It tells a crash from what is
meant by the state file: a daemon in good order removes it, or marks it as kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ublkpy.driver import inspect, state
from ublkpy.errors import BusyError, NoDeviceError, UblkError
from ublkpy.life.recover import recover
from ublkpy.system import log, process, spawn
from ublkpy.uring.uapi import State

_log = logging.getLogger(__name__)

WINDOW = 600.0
"""Seconds in which ``BACK_OFF`` has room."""
BACK_OFF = (0.0, 1.0, 4.0, 15.0, 60.0)
"""Seconds before each try; after the last it gives up."""

_READY = 15.0
_A_DAY = 86400.0
_LOOK = 0.5


def supervise(dev_id: int) -> None:
    """Have a process watch over the device, unless one does already. Raises UblkError."""
    known = state.read(dev_id)
    if known is None:
        return  # deleted meanwhile
    file = known.config["device"].get("log")
    child = spawn.daemon(lambda ready: _run(ready, dev_id, known.cookie, Path(file) if file else None))
    try:
        child.wait(_READY)
    except (EOFError, TimeoutError) as e:
        raise UblkError(f"device {dev_id} is served, but not supervised: the process for that did not start") from e
    finally:
        child.close()


def renew(dev_id: int) -> None:
    """Have the process that watches over the device, if there is one, replaced by one of this version."""
    try:
        with state.watch_path(dev_id).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return
    except BlockingIOError:
        pid = state.watch_path(dev_id).read_text()
    else:
        return
    if pid:  # else it is just beginning
        spawn.wait_end(int(pid), _READY, kill=True)
        supervise(dev_id)


def _run(ready: spawn.Ready, dev_id: int, cookie: int, file: Path | None) -> int:
    try:
        log.detach(file)
    except UblkError as e:
        ready.failed(e)
        return 1
    process.close_inherited_files()
    process.harden()
    process.leave_mounts()
    log.name_device(dev_id)
    with _lock(dev_id) as is_first:
        ready.done({})
        if is_first:
            _Watch(dev_id, cookie).run()
    return 0


@contextlib.contextmanager
def _lock(dev_id: int) -> Iterator[bool]:
    """Whether we are the only one for this device. The file goes with the device, and its lock with this process."""
    fd = os.open(state.watch_path(dev_id), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.write(fd, str(os.getpid()).encode())
        os.register_at_fork(after_in_child=partial(_forget, fd))  # else the daemons that we start would hold it, too
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(fd)


def _forget(fd: int) -> None:
    with contextlib.suppress(OSError):  # a child of a child has forgotten it
        os.close(fd)


class _Watch:
    """Watches over one device until it is gone, or cannot be brought back."""

    def __init__(self, dev_id: int, cookie: int) -> None:
        self._dev_id = dev_id
        self._cookie = cookie
        self._tries: list[float] = []

    def run(self) -> None:
        while device := self._look():
            assert device.known
            if (pid := device.pid) is not None:  # asked once: it may die now
                spawn.wait_end(pid, _A_DAY)
            elif device.known.kept:
                time.sleep(_LOOK)
            elif device.info.state == State.DEAD:
                return
            elif not self._may_try():
                _log.critical("given up after %d tries; ublk recover -n %d tries again", len(BACK_OFF), self._dev_id)
                return
            else:
                self._recover()

    def _look(self) -> inspect.DeviceStatus | None:
        """The device; None when it is gone, or is another's."""
        while True:
            try:
                device = inspect.status(self._dev_id)
                break
            except NoDeviceError:
                return None
            except UblkError as e:  # the next look may tell
                _log.warning("%s", e.message)
                time.sleep(_LOOK)
        return device if device.known and device.known.cookie == self._cookie else None

    def _may_try(self) -> bool:
        """Wait as long as the tries before this one ask for; False if there were too many."""
        now = time.monotonic()
        self._tries = [when for when in self._tries if now - when < WINDOW]
        if len(self._tries) == len(BACK_OFF):
            return False
        time.sleep(BACK_OFF[len(self._tries)])
        self._tries.append(time.monotonic())
        return True

    def _recover(self) -> None:
        _log.warning("the daemon died: starting another")
        try:
            recover(self._dev_id)
        except BusyError as e:
            _log.info("%s", e.message)  # somebody was faster
        except UblkError as e:
            _log.error("%s", e.message)
