"""A target's disk for a test: its methods called as a daemon calls them, or a real block device."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import inspect
import mmap
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from ublkpy.tgt import handlers, limits
from ublkpy.tgt.base import Geometry, Target
from ublkpy.tgt.handlers import Way
from ublkpy.upcall.steps import serve, serve_later
from ublkpy.uring.queue import IS_EARLY, IS_FUA, Call
from ublkpy.uring.uapi import Op

_BLKDISCARD, _BLKZEROOUT = 0x1277, 0x127F  # linux/fs.h


class Disk(ABC):
    """Its bytes, and what is done with them, from the test's thread, one call after the other.

    Offsets and lengths are in bytes, multiples of ``block``. OSError with the errno that the target answers, as from a
    disk, and for what is not within the disk, or a write to one that is read-only.
    """

    size: int
    """Bytes."""
    block: int
    """Bytes of a logical block."""
    read_only: bool
    """Whether writes are refused."""
    can_discard: bool
    """Whether ``discard`` may be called; else it is an OSError."""
    can_zero: bool
    """Whether the target writes zeroes by itself; else they are written as bytes."""

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """The ``length`` bytes from ``offset`` on."""

    @abstractmethod
    def write(self, offset: int, data: bytes, *, durable: bool = False) -> None:
        """Put the bytes of ``data`` there, from ``offset`` on; ``durable``: as a write with FUA."""

    @abstractmethod
    def flush(self) -> None:
        """Have all that was written durable. Nothing for a target without ``flush``."""

    @abstractmethod
    def discard(self, offset: int, length: int) -> None:
        """Have ``length`` bytes forgotten: what is there afterwards is the target's choice."""

    @abstractmethod
    def write_zeroes(self, offset: int, length: int) -> None:
        """Have ``length`` zero bytes from ``offset`` on."""

    @abstractmethod
    def together(self, calls: Sequence[tuple[Any, ...]]) -> list[bytes | OSError | None]:
        """Several of these at the same time, as far as the target lets that happen, each as ``("write", 0, data)``.

        What they return, in their order; an OSError is there in its place, other exceptions are raised.
        """


@contextlib.contextmanager
def open_disk(target: Target) -> Iterator[Disk]:
    """The disk of a target of methods, in this process and without a kernel: a context manager.

    It is opened and started before, and stopped and closed after. The methods run in this thread, an ``async def`` on a
    loop of its own, those of a target with ``blocking`` in other threads. Raises UblkError as ``ublk add``, ValueError
    for a target that has no methods: what its map says is done by a daemon, see ``open_device``.
    """
    if handlers.way(target) is Way.RAW or type(target).map is not Target.map:
        raise ValueError(f"target {target.name} has a map or upcall(), which need a device: open_device() makes one")
    found = handlers.open_target(target)
    try:
        geometry = limits.settle(target.disk, handlers.fit(target, found))
        with asyncio.Runner() as runner, _alive(target, runner):
            yield _Methods(target, geometry, runner)
    finally:
        target.close()


@contextlib.contextmanager
def _alive(target: Target, runner: asyncio.Runner) -> Iterator[None]:
    """Begun and ended as in the daemon: what did not begin is not ended."""
    is_async = {method: inspect.iscoroutinefunction(method) for method in (target.start, target.stop)}
    with contextlib.ExitStack() as ends:
        if not is_async[target.start]:
            with handlers.told(target, "start"):
                target.start()
        if not is_async[target.stop]:
            ends.callback(target.stop)
        handlers.start_thread(target)
        ends.callback(target.stop_thread)
        if is_async[target.start]:
            with handlers.told(target, "start"):
                runner.run(cast("Coroutine[None, None, None]", target.start()))
        if is_async[target.stop]:
            ends.callback(lambda: runner.run(cast("Coroutine[None, None, None]", target.stop())))
        yield


@contextlib.contextmanager
def open_device(target: Target, **options: Any) -> Iterator[Disk]:
    """The same with the driver: a real block device, served by threads of this process, deleted afterwards. As root.

    ``options`` are those of every device (docs/yaml.md), such as ``queues=2``, but for what a program cannot do itself.
    Raises UblkError; DriverError where there is no driver.
    """
    from ublkpy.device import Device

    with Device(target, **options) as device:
        yield _Node(Path(device.node))


class _Desk:
    """What a queue is to ``steps``: where the data of one call is."""

    def __init__(self, data: Any) -> None:
        self.place = data

    def data(self, _place: int, _length: int, _what: int) -> memoryview:
        return memoryview(self.place)

    def receive(self, _piece: int, buffer: Any, length: int) -> None:
        """The data is to be there, as the driver would put it."""
        place = memoryview(buffer).cast("B")[:length]
        place[:] = self.place
        self.place = place

    def appended(self, _piece: int, offset: int) -> None:
        """Where an append went."""
        self.place = offset

    def let_go(self, _piece: int) -> None:
        """Of the buffer that it received."""


class _Methods(Disk):
    """Calls a target's methods."""

    def __init__(self, target: Target, geometry: Geometry, runner: asyncio.Runner) -> None:
        self.size = geometry.size
        self.block = geometry.logical_block
        self.read_only = geometry.read_only
        self.can_discard = bool(geometry.max_discard_bytes)
        self.can_zero = bool(geometry.max_write_zeroes_bytes)
        self._target = target
        self._way = handlers.way(target)
        self._runner = runner
        self._others = 0

    def read(self, offset: int, length: int) -> bytes:
        return self._runner.run(self._read(offset, length))

    def write(self, offset: int, data: bytes, *, durable: bool = False) -> None:
        self._runner.run(self._write(offset, data, durable=durable))

    def flush(self) -> None:
        self._runner.run(self._flush())

    def discard(self, offset: int, length: int) -> None:
        self._runner.run(self._discard(offset, length))

    def write_zeroes(self, offset: int, length: int) -> None:
        self._runner.run(self._write_zeroes(offset, length))

    def together(self, calls: Sequence[tuple[Any, ...]]) -> list[bytes | OSError | None]:
        async def all_of_them() -> list[Any]:
            made = [getattr(self, f"_{name}")(*args) for name, *args in calls]
            return await asyncio.gather(*made, return_exceptions=True)

        return _results(self._runner.run(all_of_them()))

    async def _read(self, offset: int, length: int) -> bytes:
        buf = self._of_others(length)
        await self._call(int(Op.READ), offset, length, buf)
        data = bytes(buf)
        buf[:] = self._of_others(length)
        return data

    async def _write(self, offset: int, data: bytes, *, durable: bool = False) -> None:
        buf = bytearray(data)
        try:
            await self._call(int(Op.WRITE) | (IS_FUA if durable else 0), offset, len(data), buf)
        finally:
            buf[:] = self._of_others(len(data))

    def _of_others(self, length: int) -> bytearray:
        """What is in a buffer before and after its request: data of other ones, each time another."""
        self._others = self._others % 255 + 1
        return bytearray([self._others]) * length

    async def _flush(self) -> None:
        if "flush" in self._target.methods():
            await self._call(int(Op.FLUSH), 0, 0)

    async def _discard(self, offset: int, length: int) -> None:
        if not self.can_discard:
            raise OSError(errno.EOPNOTSUPP, "the disk cannot discard")
        await self._call(int(Op.DISCARD), offset, length)

    async def _write_zeroes(self, offset: int, length: int) -> None:
        if self.can_zero:
            await self._call(int(Op.WRITE_ZEROES), offset, length)
        else:
            await self._write(offset, bytes(length))

    async def _call(self, what: int, offset: int, length: int, data: Any = b"") -> None:
        if offset < 0 or offset + length > self.size:
            raise OSError(errno.ENXIO, "outside of the disk")
        if self.read_only and what & 0xFF not in (Op.READ, Op.FLUSH):
            raise OSError(errno.EPERM, "the disk is read-only")
        desk = _Desk(data)
        if what & 0xFF == Op.WRITE and "write_buffer" in self._target.methods():
            await self._steps(desk, (offset, length, 0, int(Op.WRITE) | IS_EARLY, 0, 0))
        await self._steps(desk, (offset, length, 0, what, 0, 0))

    async def _steps(self, desk: _Desk, call: Call) -> None:
        match self._way:
            case Way.ASYNC:
                await serve_later(desk, self._target, call)
            case Way.BLOCKING:
                await asyncio.to_thread(serve, desk, self._target, call)
            case _:
                serve(desk, self._target, call)


def _results(found: Sequence[Any]) -> list[bytes | OSError | None]:
    for one in found:
        if isinstance(one, BaseException) and not isinstance(one, OSError):
            raise one
    return list(found)


class _Node(Disk):
    """A block device, without the kernel's cache."""

    def __init__(self, node: Path) -> None:
        self._path = node
        queue = Path("/sys/block", node.name, "queue")
        self.size = int((queue.parent / "size").read_text()) * 512
        self.block = int((queue / "logical_block_size").read_text())
        self.read_only = (queue.parent / "ro").read_text() == "1\n"
        self.can_discard = (queue / "discard_max_bytes").read_text() != "0\n"
        self.can_zero = (queue / "write_zeroes_max_bytes").read_text() != "0\n"

    def read(self, offset: int, length: int) -> bytes:
        with self._opened(os.O_RDONLY | os.O_DIRECT) as fd, _aligned(length) as data:
            if os.preadv(fd, [data], offset) != length:
                raise OSError(errno.ENXIO, "outside of the disk")
            return bytes(data)

    def write(self, offset: int, data: bytes, *, durable: bool = False) -> None:
        flags = os.O_WRONLY | os.O_DIRECT | (os.O_DSYNC if durable else 0)
        with self._opened(flags) as fd, _aligned(len(data)) as aligned:
            aligned[:] = data
            if os.pwritev(fd, [aligned], offset) != len(data):
                raise OSError(errno.ENXIO, "outside of the disk")

    def flush(self) -> None:
        with self._opened(os.O_RDONLY) as fd:
            os.fsync(fd)

    def discard(self, offset: int, length: int) -> None:
        self._on_range(_BLKDISCARD, offset, length)

    def write_zeroes(self, offset: int, length: int) -> None:
        self._on_range(_BLKZEROOUT, offset, length)

    def together(self, calls: Sequence[tuple[Any, ...]]) -> list[bytes | OSError | None]:
        def one(call: tuple[Any, ...]) -> Any:
            try:
                return getattr(self, call[0])(*call[1:])
            except OSError as e:
                return e

        with ThreadPoolExecutor(len(calls)) as pool:
            return list(pool.map(one, calls))

    def _on_range(self, request: int, offset: int, length: int) -> None:
        with self._opened(os.O_WRONLY) as fd:
            fcntl.ioctl(fd, request, struct.pack("QQ", offset, length))

    @contextlib.contextmanager
    def _opened(self, flags: int) -> Iterator[int]:
        fd = os.open(self._path, flags | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)


@contextlib.contextmanager
def _aligned(length: int) -> Iterator[memoryview]:
    """Memory that O_DIRECT takes."""
    with mmap.mmap(-1, length) as pages, memoryview(pages) as view:
        yield view
