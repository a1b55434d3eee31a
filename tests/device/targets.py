"""Targets of plain, async and blocking methods, as people write them, for the tests of those."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from ublkpy import Geometry, Map, Request, Size, Target, option


class Ram(Target):
    """A disk in memory."""

    size: Size = option("8M", help="size of the disk")

    def open(self) -> Geometry:
        self.data = memoryview(bytearray(self.size))
        return Geometry(self.size)

    def read(self, offset: int, buf: memoryview) -> None:
        buf[:] = self.data[offset : offset + len(buf)]

    def write(self, offset: int, buf: memoryview) -> None:
        self.data[offset : offset + len(buf)] = buf

    def flush(self) -> None:
        pass

    def discard(self, offset: int, length: int) -> None:
        self.write_zeroes(offset, length)

    def write_zeroes(self, offset: int, length: int) -> None:
        self.data[offset : offset + length] = bytes(length)


class AsyncRam(Ram):
    """The same on an event loop, and as far away as that."""

    async def read(self, offset: int, buf: memoryview) -> None:  # type: ignore[override]
        await asyncio.sleep(0.001)
        super().read(offset, buf)

    async def write(self, offset: int, buf: memoryview) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        super().write(offset, buf)


class BlockingRam(Ram):
    """The same in threads that may sleep."""

    blocking = True

    def read(self, offset: int, buf: memoryview) -> None:
        time.sleep(0.001)
        super().read(offset, buf)


class Where(Ram):
    """Tells the CPUs that the thread which calls its methods may use."""

    def read(self, offset: int, buf: memoryview) -> None:
        buf[:] = str(len(os.sched_getaffinity(0))).encode().ljust(len(buf), b"\0")


class AsyncWhere(Where):
    """The same in a thread that an event loop starts."""

    async def read(self, offset: int, buf: memoryview) -> None:  # type: ignore[override]
        await asyncio.to_thread(super().read, offset, buf)


class BlockingWhere(Where):
    """The same in threads."""

    blocking = True


class ReadOnly(Target):
    """Each 512 bytes begin with their number."""

    def open(self) -> Geometry:
        return Geometry(1 << 20)

    def read(self, offset: int, buf: memoryview) -> None:
        for place in range(0, len(buf), 512):
            buf[place : place + 512] = ((offset + place) // 512).to_bytes(8, "little").ljust(512, b"\0")


class Mapped(Target):
    """A device whose map a test makes."""

    name = "mapped"
    size = 8 << 20

    def __init__(self, make: Callable[[Map], None], answer: Callable[[Sequence[Request]], None] | None = None) -> None:
        super().__init__({})
        self._make = make
        self._answer = answer

    def open(self) -> Geometry:
        return Geometry(
            self.size,
            physical_block=512,
            io_min=512,
            io_opt=512,
            discard_granularity=4096,
            max_discard_bytes=self.size,
            max_write_zeroes_bytes=self.size,
        )

    def map(self, target_map: Map) -> None:
        self._make(target_map)

    def upcall(self, requests: Sequence[Request]) -> None:
        if self._answer is None:
            super().upcall(requests)
        else:
            self._answer(requests)


class Failing(Ram):
    """Fails in many ways, by place: see ``read``."""

    def read(self, offset: int, buf: memoryview) -> None:
        match offset // 4096:
            case 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            case 1:
                raise KeyError("a bug")
            case 2:
                self.kept = buf
        super().read(offset, buf)

    def write(self, offset: int, buf: memoryview) -> None:
        self.kept[0] = 1


class AsyncFailing(Failing):
    """The same on an event loop."""

    async def read(self, offset: int, buf: memoryview) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        super().read(offset, buf)


class BlockingFailing(Failing):
    """The same in threads."""

    blocking = True


class Sloppy(Ram):
    """Its methods do what they must not, by place: see ``read``."""

    def read(self, offset: int, buf: memoryview) -> Any:
        super().read(offset, buf)
        match offset // 4096:
            case 0:
                return len(buf)
            case 1:
                raise SystemExit("a library ends the program")
            case 2:
                return self.later(offset, buf)
        return None

    async def later(self, offset: int, buf: memoryview) -> None:
        buf[:] = bytes(len(buf))


class AsyncSloppy(Sloppy):
    """The same on an event loop, whose tasks it cancels."""

    async def read(self, offset: int, buf: memoryview) -> Any:  # type: ignore[override]
        for task in asyncio.all_tasks() - {asyncio.current_task()} if offset < 3 * 4096 else ():
            if "_work" in repr(task):
                task.cancel()
        await asyncio.sleep(0)
        return super().read(offset, buf)


class BlockingSloppy(Sloppy):
    """The same in threads."""

    blocking = True


class Counting(Ram):
    """Tells with each read what was called so far."""

    def open(self) -> Geometry:
        self.calls: list[str] = []
        return super().open()

    def read(self, offset: int, buf: memoryview) -> None:
        buf[:] = "\n".join(self.calls).encode().ljust(len(buf), b"\0")

    def write(self, offset: int, buf: memoryview) -> None:
        self.calls.append(f"write {offset} {len(buf)}")

    def flush(self) -> None:
        self.calls.append("flush")

    def discard(self, offset: int, length: int) -> None:
        self.calls.append(f"discard {offset} {length}")

    def write_zeroes(self, offset: int, length: int) -> None:
        self.calls.append(f"write_zeroes {offset} {length}")


class AsyncCounting(Counting):
    """The same on an event loop."""

    async def flush(self) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        super().flush()


class BlockingCounting(Counting):
    """The same in threads."""

    blocking = True


class Flagged(Counting):
    """Has methods for what requests ask for besides, and for the life of its queues' threads."""

    def start_thread(self) -> None:
        self.thread = threading.get_ident()
        self.calls.append("start_thread")

    def write_fua(self, offset: int, buf: memoryview) -> None:
        self.calls.append(f"write_fua {offset} {len(buf)}")

    def punch_hole(self, offset: int, length: int) -> None:
        assert self.blocking or threading.get_ident() == self.thread
        self.calls.append(f"punch_hole {offset} {length}")

    def stop_thread(self) -> None:
        assert threading.get_ident() == self.thread
        logging.getLogger(__name__).error("the thread ends")


class AsyncFlagged(Flagged):
    """The same on an event loop."""

    async def write_fua(self, offset: int, buf: memoryview) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        super().write_fua(offset, buf)


class BlockingFlagged(Flagged):
    """The same in threads."""

    blocking = True


class Boxes(Ram):
    """Takes the data of writes in boxes of its own."""

    def open(self) -> Geometry:
        self.boxes: list[bytearray] = []
        return super().open()

    def write_buffer(self, offset: int, length: int) -> bytearray:
        self.boxes.append(bytearray(length))
        return self.boxes[-1]

    def write(self, offset: int, buf: memoryview) -> None:
        assert any(box is buf.obj for box in self.boxes), "the data is where it was asked for"
        super().write(offset, buf)


class Starting(Ram):
    """Fails as its size says, and has its life in its first block."""

    def start(self) -> None:
        self.begun = str(os.getpid()).encode()
        if self.size == 1 << 20:
            raise OSError(errno.ECONNREFUSED, "no server")

    def read(self, offset: int, buf: memoryview) -> None:
        buf[:] = self.begun.ljust(len(buf), b"\0")


class AsyncStarting(Starting):
    """The same on an event loop."""

    async def start(self) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        super().start()

    async def flush(self) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
