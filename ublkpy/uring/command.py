"""Control commands over io_uring, each with a deadline."""

from __future__ import annotations

import errno
import os
import select
import time
from types import TracebackType
from typing import Any

from ublkpy.uring.ffi import check, ffi, lib

# How long a cancelled command may take to come back. Those that cannot be
# cancelled do not; they are why the long ones run in a process of their own.
_CANCEL_GRACE = 5.0


# After so many seconds without an answer, and then each time after twice as long, see _nudge().
_NUDGE = 0.25

# What the kernel may still write to, whenever a command that missed its deadline is done: never freed.
_overdue: list[tuple[Any, ...]] = []


class CommandRing:
    """A small io_uring for one uring_cmd at a time on one file.

    Belongs to the thread that made it. ``call`` returns the result, raises
    OSError(errno) for a negative one, and TimeoutError when the deadline
    passed.
    """

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._ring = ffi.new("struct ur_ring *")
        try:
            check(lib.ur_ring_init(self._ring, 4, 8, lib.IORING_SETUP_SQE128), "io_uring_setup")
        except OSError:
            os.close(self._fd)
            raise
        self._serial = 0
        self._in_flight: set[int] = set()
        # What the commands in flight point to.
        self._kept: dict[int, tuple[Any, ...]] = {}

    def __enter__(self) -> CommandRing:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        lib.ur_ring_exit(self._ring)
        os.close(self._fd)

    def call(self, cmd_op: int, cmd: Any, timeout: float, *, keep: tuple[Any, ...] = (), abort_fd: int = -1) -> int:
        """Send ``cmd`` (a cffi struct pointer) as ``cmd_op`` and wait for its result.

        ``keep`` are buffers that the command points to. When ``abort_fd`` becomes readable, or a signal
        handler raises, the command is cancelled; the former raises InterruptedError.
        """
        ident = self._next_id()
        self._kept[ident] = (cmd, *keep)
        check(lib.ur_submit_cmd(self._ring, self._fd, cmd_op, cmd, ffi.sizeof(cmd[0]), ident), "io_uring_enter")
        try:
            return check(self._wait(ident, timeout, abort_fd), "uring_cmd")
        except BaseException:
            self._cancel(ident)
            raise

    def _next_id(self) -> int:
        self._serial += 1
        self._in_flight.add(self._serial)
        return self._serial

    def _cancel(self, victim: int) -> None:
        if victim not in self._in_flight:
            return
        check(lib.ur_submit_cancel(self._ring, victim, self._next_id()), "io_uring_enter")
        try:
            self._wait(victim, _CANCEL_GRACE, -1)
        except TimeoutError:
            _overdue.append(self._kept[victim])

    def _nudge(self) -> None:
        """Have the kernel start a worker thread for a command that it may have forgotten.

        In kernels of 2026 (6.18.15, for one) the threads that execute commands exit when a process closes its last
        ring (io-wq.c, IO_WQ_BIT_EXIT_ON_IDLE). A command on a new ring, sent at that moment, can be left to a
        thread that has just decided to go. It then waits until there is more to do: that is this no-op.
        """
        check(lib.ur_submit_async_nop(self._ring, self._next_id()), "io_uring_enter")

    def _wait(self, wanted: int, timeout: float, abort_fd: int) -> int:
        deadline = time.monotonic() + timeout
        poller = select.poll()
        poller.register(self._ring.fd, select.POLLIN)
        if abort_fd >= 0:
            poller.register(abort_fd, select.POLLIN)
        ident, res = ffi.new("uint64_t *"), ffi.new("int32_t *")
        nudge = _NUDGE
        while True:
            while lib.ur_next_cqe(self._ring, ident, res) == 0:
                self._in_flight.discard(ident[0])
                self._kept.pop(ident[0], None)
                if ident[0] == wanted:
                    return int(res[0])
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(errno.ETIMEDOUT, f"no answer from the driver within {timeout:g} s")
            ready = {fd for fd, _ in poller.poll(min(left, nudge) * 1000)}
            if not ready and nudge < left:
                self._nudge()
                nudge *= 2
            if abort_fd in ready and self._ring.fd not in ready:
                raise InterruptedError(errno.EINTR, "interrupted")
