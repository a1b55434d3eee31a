"""Files for ``async def`` methods of a target, on the io_uring of the queue that they run on.

::

    from ublkpy import io


    async def read(self, offset, buf):
        await io.read(self.fd, buf, offset)

For files and block devices, by descriptor; offsets and lengths are in bytes. OSError as from the system call. A
method that is cancelled meanwhile goes on when the kernel is done with its buffer. On a loop that is no queue's, as in
a test, threads do the same.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from typing import Any

from ublkpy.upcall import files
from ublkpy.uring import libc
from ublkpy.uring.ffi import ffi, lib
from ublkpy.uring.queue import FileOp

__all__ = ["fsync", "punch_hole", "read", "write", "zero_range"]

_MAX_BYTES = 1 << 30  # of one operation: what is longer takes several (read(2): at most 0x7ffff000)


async def read(fd: int, buf: Any, offset: int) -> int:
    """Fill ``buf`` from there on; returns how many bytes it got: fewer only where the file ends."""

    async def some(part: memoryview, offset: int) -> int:
        return await _once(
            (lib.IORING_OP_READ, fd, _address(part, writable=True), len(part), offset, 0),
            lambda: os.preadv(fd, [part], offset),
            memoryview(part),
        )

    return await _all(some, buf, offset)


async def write(fd: int, buf: Any, offset: int) -> None:
    """Put all of ``buf`` there."""

    async def some(part: memoryview, offset: int) -> int:
        return await _once(
            (lib.IORING_OP_WRITE, fd, _address(part), len(part), offset, 0),
            lambda: os.pwritev(fd, [part], offset),
            memoryview(part),
        )

    if await _all(some, buf, offset) < memoryview(buf).nbytes:
        raise OSError(errno.EIO, "the file takes no more")


async def fsync(fd: int) -> None:
    """Make durable what was written before, as fdatasync(2)."""
    await _once((lib.IORING_OP_FSYNC, fd, 0, 0, 0, lib.IORING_FSYNC_DATASYNC), lambda: os.fdatasync(fd))


async def punch_hole(fd: int, offset: int, length: int) -> None:
    """Zeroes that need no space; EOPNOTSUPP where the file system cannot."""
    await _fallocate(fd, lib.FALLOC_FL_PUNCH_HOLE | lib.FALLOC_FL_KEEP_SIZE, offset, length)


async def zero_range(fd: int, offset: int, length: int) -> None:
    """Zeroes that keep their space; likewise."""
    await _fallocate(fd, lib.FALLOC_FL_ZERO_RANGE | lib.FALLOC_FL_KEEP_SIZE, offset, length)


async def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    # The SQE has the length where a read has its address (io_uring/sync.c: io_fallocate_prep).
    op = lib.IORING_OP_FALLOCATE, fd, length, mode, offset, 0
    await _once(op, lambda: libc.fallocate(fd, mode, offset, length))


async def _all(some: Callable[[memoryview, int], Any], buf: Any, offset: int) -> int:
    done = 0
    with memoryview(buf).cast("B") as view:
        while done < len(view):
            with view[done : done + _MAX_BYTES] as part:
                moved = await some(part, offset + done)
            if not moved:
                break
            done += moved
    return done


def _address(part: memoryview, *, writable: bool = False) -> int:
    """Of memory that its caller keeps."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(part, require_writable=writable)))


async def _once(op: FileOp, otherwise: Callable[[], int | None], memory: object = None) -> int:
    """One operation, on the ring or in a thread; ``memory`` is what it reads or writes, until this returns."""
    ring = files.current()
    if ring is None:
        return await _in_thread(otherwise) or 0
    while (result := await ring.run(op, memory)) == -errno.EINTR:
        pass
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


async def _in_thread(what: Callable[[], int | None]) -> int | None:
    future = asyncio.get_running_loop().run_in_executor(None, what)
    cancelled = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as e:
            cancelled = e
    if cancelled:
        raise cancelled
    return future.result()
