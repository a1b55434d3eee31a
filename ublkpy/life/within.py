"""A device that a program serves itself, beside its other work: ``with ublkpy.Device(target) as dev``.

::

    the caller's thread                        threads of ours
    ───────────────────                        ───────────────
    serve   opens the target, ADD_DEV,
            queues, START_DEV ───────────────▶ a queue's: its requests
            node can be opened                 the device's: orders, and the end
      ...
    delete  another process: STOP_DEV ───────▶ the driver takes all tags back
            waits for it and for them          closed: device, rings, target
                                    DEL_DEV ◀─ the id is free

The process is not ours: no signal, log, lock or limit of it is touched. It may end without a word to us, fork, or have
the disk open itself, and each has its place below.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ublkpy.config import DeviceConfig, DeviceOptions, parse_options
from ublkpy.daemon.ending import DEADLINE, Ending
from ublkpy.daemon.host import Program
from ublkpy.daemon.pulse import PERIOD
from ublkpy.daemon.run import wait_node
from ublkpy.daemon.server import Server
from ublkpy.driver.disk import completed
from ublkpy.errors import BusyError, ConfigError, NoDeviceError, UblkError
from ublkpy.life.add import check_name, make_plan, tell_clamped
from ublkpy.system.process import flush_io
from ublkpy.tgt.base import Target
from ublkpy.uring.uapi import DevInfo

_log = logging.getLogger(__name__)

_THREADS_END = 20.0
_SILENCE = 60.0 - PERIOD  # without an answer, as pulse.py sees it: up to a PERIOD late
_IDLE = 2.0
_LOOK = 0.5

# Those that are served, or about to be, in the order in which they began.
_sessions: list[Session] = []
_lock = threading.Lock()


class Session:
    """One target's device, each time anew between ``serve`` and ``delete``. Any thread."""

    def __init__(self, target: Target, said: Mapping[str, Any]) -> None:
        """``said`` are options of the device, as YAML has them or parsed. Raises ConfigError."""
        if not isinstance(target, Target):
            raise ConfigError(
                f"{target!r} is not a target",
                "Device() takes the id of a device, or a target to serve, as in Device(Ram()); a YAML file is for"
                " Device.add()",
            )
        options = parse_options(said)
        _check(options)
        self.target = target
        self._config = DeviceConfig(options, target)
        self._server: Server | None = None
        self._thread: threading.Thread | None = None
        self._info: DevInfo | None = None
        self._pid = 0
        self._cookie = 0
        self._failure: BaseException | None = None
        self._ending = threading.Lock()
        self._is_left = False  # the device has gone, and a method of the target runs yet

    @property
    def dev_id(self) -> int:
        """Its id. Raises NoDeviceError before it is served, and when it is gone."""
        if self._info is None:
            raise NoDeviceError(
                f"no device of target {self.target.name} is served yet",
                "have one for the length of a block: with device: ...; or call device.serve()",
            )
        if not self.is_serving and self._pid == os.getpid():
            raise NoDeviceError(f"/dev/ublkb{self._info.dev_id} is gone", "device.serve() makes another one")
        return self._info.dev_id

    @property
    def is_serving(self) -> bool:
        """Whether threads of this process serve it."""
        return self in _sessions and self._thread is not None and self._thread.is_alive()

    def serve(self) -> None:
        """Bring it up; returns when its node can be opened. Raises UblkError, and leaves nothing then."""
        with _lock:
            for other in _sessions.copy():
                if other.target is not self.target:
                    continue
                if other._is_left:
                    other._take_leave()
                else:
                    where = f": /dev/ublkb{other.dev_id}" if other.is_serving else ""
                    raise BusyError(
                        f"this target is served already{where}", "make another one, or delete its device first"
                    )
            self._thread, self._is_left = None, False
            _sessions.append(self)
        try:
            self._begin()
        except BaseException:
            if not self._is_left:
                _forget(self)
            raise

    def _take_leave(self) -> None:
        """Close the target, if that can be by now. Raises BusyError if not."""
        assert self._server
        if not self._server.close():
            raise BusyError(
                f"a method of target {self.target.name} has not returned since its device was given up",
                "make another target",
            )
        _sessions.remove(self)

    def _begin(self) -> None:
        check_name(self._config)
        plan = make_plan(self._config)
        try:
            server = Server(plan, host=Program())
        except BaseException:
            self._config.target.close()
            raise
        self._failure, self._cookie, self._server = None, plan.cookie, server
        try:
            info = server.create()
            thread = threading.Thread(target=self._live, args=(info,), name=f"ublkb{info.dev_id}", daemon=True)
            try:
                thread.start()
            except BaseException:
                server.abandon(info.dev_id)
                raise
        except BaseException:
            self._is_left = not server.close()
            raise
        self._info, self._thread, self._pid = info, thread, os.getpid()
        tell_clamped(self._config, info.nr_hw_queues)
        try:
            wait_node(info.dev_id)
        except BaseException:
            self.delete(force=True)
            raise

    def _live(self, info: DevInfo) -> None:
        """The device's thread."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        flush_io()
        assert self._server
        try:
            self._server.serve(info)
            if failure := self._server.failure:
                self._failure = failure
                self._end_by_process(info.dev_id, force=True)
        except UblkError as e:
            _log.error("%s", e.message)
        except Exception as e:
            _log.exception("a bug in ublkpy")
            self._failure = e
        finally:
            if self._server.close():
                _forget(self)
            else:
                self._is_left = True
                _log.error("a method of target %s has not returned: the target is not closed", self.target.name)

    def delete(self, *, force: bool) -> None:
        """Stop and delete it, and wait for that; nothing if it is gone already. The target can be served again then.

        Raises BusyError if it is in use, unless ``force``; and UblkError, also for why it went by itself. With
        ``force``, requests that are not answered for a minute fail.
        """
        node = f"/dev/ublkb{self._info.dev_id}" if self._info else ""
        with self._ending:
            if self.is_serving:
                self._delete(node, force=force)
            failure, self._failure = self._failure, None
        if failure:
            raise UblkError(
                f"{node} was given up, because a queue failed: {type(failure).__name__}: {failure}",
                "the log has the traceback",
            ) from failure

    def _delete(self, node: str, *, force: bool) -> None:
        assert self._thread
        assert self._server
        assert self._info
        dev_id = self._info.dev_id
        while True:
            try:
                self._end_by_process(dev_id, force=force)
                break
            except BusyError:
                raise
            except UblkError as e:
                if not force or not self._thread.is_alive():
                    raise
                if self._is_answering(dev_id):
                    _log.warning("%s; its requests are being answered: waiting on", e.message)
                    continue
                _log.warning("%s; its requests fail now", e.message)
            self._server.cut()
            self._thread.join(_THREADS_END)
            if not self._thread.is_alive():
                self._end_by_process(dev_id, force=True)
            break
        self._thread.join(_THREADS_END)
        if self._thread.is_alive():
            raise UblkError(
                f"{node} does not go: a method of target {self.target.name} has not returned",
                "it goes with this program; what may wait belongs into an async def, or a class with blocking = True",
            )

    def _is_answering(self, dev_id: int) -> bool:
        """Whether the requests that wait are answered, or the device has ended: True as soon as one was; False when
        none was for a minute, or there are none.
        """
        assert self._thread
        assert self._server
        done, since = completed(dev_id), time.monotonic()
        while self._thread.is_alive() and completed(dev_id) == done:
            silent = max(time.monotonic() - since, self._server.silence())
            if silent >= (_SILENCE if self._server.is_waiting() else _IDLE):
                return False
            self._thread.join(_LOOK)
        return True

    def _end_by_process(self, dev_id: int, *, force: bool) -> None:
        """Not by this one: see server.py."""
        try:
            ending = Ending(dev_id, self._cookie, force=force, report=True)
        except OSError as e:
            raise UblkError(f"cannot start the process that deletes the device: {e.strerror or e}") from e
        try:
            ending.wait(DEADLINE)
        except TimeoutError as e:
            raise UblkError(
                f"deleting /dev/ublkb{dev_id} takes more than {DEADLINE:g} s", "the kernel log (dmesg) may say why"
            ) from e

    def forked(self, child: Callable[[int], None]) -> None:
        """Have ``child`` close what this process, a new one, must not hold."""
        for fd in self._server.files() if self._server else []:
            child(fd)
        self._ending = threading.Lock()


def find(dev_id: int) -> Session | None:
    """Who serves the device here."""
    with _lock:
        return next((session for session in _sessions if session.is_serving and session.dev_id == dev_id), None)


def _check(options: DeviceOptions) -> None:
    """ConfigError for what makes no sense without a daemon."""
    if options.recovery != "none":
        raise ConfigError(
            f"recovery {options.recovery}: this device goes with the program that serves it, and nobody could go on",
            "leave recovery out; or give it a daemon, which can be replaced: Device.add()",
            ["recovery"],
        )
    if options.supervise:
        raise ConfigError(
            "supervise: there is no daemon to look after, this program serves the device itself",
            "leave supervise out; or give it a daemon: Device.add()",
            ["supervise"],
        )
    if options.log is not None:
        raise ConfigError(
            "log: what there is to say goes to this program's own logging",
            'leave log out; the loggers are those below logging.getLogger("ublkpy")',
            ["log"],
        )


def _forget(session: Session) -> None:
    with _lock, contextlib.suppress(ValueError):
        _sessions.remove(session)


def _delete_all() -> None:
    """The program ends: the latest first, which may stand on the others."""
    for session in reversed(_sessions.copy()):
        try:
            session.delete(force=True)
        except Exception as e:  # each has its turn
            _log.error("%s", e)


def _after_fork() -> None:
    """In a forked child: its parent serves. What pins the device is closed, nothing else is touched: threads that are
    not here may have held any lock."""
    global _lock
    _lock = threading.Lock()
    forked, _sessions[:] = _sessions.copy(), []
    for session in forked:
        session.forked(_close_ours)


def _close_ours(fd: int) -> None:
    """Unless its number is another file's by now: the parent may have just closed ours."""
    with contextlib.suppress(OSError):
        link = str(Path(f"/proc/self/fd/{fd}").readlink())
        if link.startswith(("/dev/ublkc", "anon_inode:[io_uring]", "socket:")):
            os.close(fd)


os.register_at_fork(after_in_child=_after_fork)
# Before the threads of pools are told to end, which happens before atexit: they may yet have requests to answer.
getattr(threading, "_register_atexit", atexit.register)(_delete_all)
