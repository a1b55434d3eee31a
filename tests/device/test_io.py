"""``ublkpy.io``: files that async methods read and write on the ring of their queue."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ublkpy import File, Geometry, Map, Null, Routing, Target, Upcall, Zero, io, option
from ublkpy.config import DeviceConfig, DeviceOptions
from ublkpy.life.add import add
from ublkpy.testing import Disk, TargetContract, open_device
from ublkpy.upcall import files

from . import disk as blocks
from . import load
from .devices import MIB, Device, Devices, until


class InFile(Target):
    """A disk in a file."""

    file: Path = option(..., help="where")

    def open(self) -> Geometry:
        self.fd = os.open(self.file, os.O_RDWR | os.O_CLOEXEC)
        return Geometry(os.fstat(self.fd).st_size)

    async def read(self, offset: int, buf: memoryview) -> None:
        assert files.current(), "the loop is a queue's"
        await io.read(self.fd, buf, offset)

    async def write(self, offset: int, buf: memoryview) -> None:
        await io.write(self.fd, buf, offset)

    async def flush(self) -> None:
        await io.fsync(self.fd)

    async def discard(self, offset: int, length: int) -> None:
        await io.punch_hole(self.fd, offset, length)

    async def write_zeroes(self, offset: int, length: int) -> None:
        await io.punch_hole(self.fd, offset, length)  # tmpfs has no zero_range

    def close(self) -> None:
        os.close(self.fd)


class InParts(InFile):
    """Many operations for each request, more than there is room for."""

    async def read(self, offset: int, buf: memoryview) -> None:
        parts = [buf[at : at + 512] for at in range(0, len(buf), 512)]
        await asyncio.gather(*(io.read(self.fd, part, offset + 512 * n) for n, part in enumerate(parts)))
        for part in parts:
            part.release()


class ReadByMap(InFile):
    """Only its writes are Python's."""

    def map(self, target_map: Map) -> None:
        file = File(target_map.add_file(self.fd))
        target_map.fill(Routing(file, Upcall(), Null(), Zero()), Upcall())


class Wrong(InFile):
    """Asks for what cannot be, more often than there is room for."""

    async def flush(self) -> None:
        for _ in range(100):
            with pytest.raises((OverflowError, OSError)):
                await io.read(self.fd, bytearray(512), -1)


class Hasty(InFile):
    """Gives up on every read while it is on its way; the second half of the disk fails at once."""

    async def read(self, offset: int, buf: memoryview) -> None:
        if offset >= MIB:
            with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
                await io.read(9999, buf, offset)
            raise OSError(errno.ENOSPC, "as it has to be")
        reading = asyncio.create_task(io.read(self.fd, buf, offset))
        await asyncio.sleep(0)
        reading.cancel()
        try:
            await reading
        except asyncio.CancelledError:
            assert bytes(buf) == blocks.pattern(2 * MIB)[offset : offset + len(buf)], "all of it is there"
            raise OSError(errno.ETIMEDOUT, "given up") from None


class Busy(InFile):
    """Reads its file all the time, from its first moment to its last."""

    async def start(self) -> None:
        buf = bytearray(512)
        await io.read(self.fd, buf, 0)
        assert bytes(buf) == blocks.pattern(512)
        self.task = asyncio.create_task(self.read_on())

    async def read_on(self) -> None:
        buf = bytearray(4096)
        while True:
            await io.read(self.fd, buf, 0)
            await asyncio.sleep(0.001)

    async def stop(self) -> None:
        await io.write(self.fd, b"the end".ljust(512), 0)


def serve(devices: Devices, target: Target, **options: object) -> Device:
    return devices.adopt(add(DeviceConfig(DeviceOptions(options), target)))


@pytest.mark.any_kernel
class TestContract(TargetContract):
    @pytest.fixture
    def disk(self, scratch: Path) -> Iterator[Disk]:
        with open_device(InFile({"file": blocks.image(scratch / "image", 8 * MIB)}), queues=2) as disk:
            yield disk


@pytest.mark.parametrize("target", [InFile, InParts])
def test_what_fio_writes_is_there(devices: Devices, target: type[InFile], scratch: Path) -> None:
    device = serve(devices, target({"file": blocks.image(scratch / "image", 8 * MIB)}), depth=16)
    load.verify(device.node, "--ioengine=libaio", "--iodepth=32", "--rw=randrw", "--bsrange=4k-64k", "--size=4m")


@pytest.mark.any_kernel
@pytest.mark.parametrize("mode", ["auto", "copy", "user-copy"])
@pytest.mark.parametrize("depth", [1, 16])
def test_beside_a_map_that_answers_reads(devices: Devices, scratch: Path, depth: int, mode: str) -> None:
    """One read at a time, which the loop hears nothing of until the file has answered."""
    image = scratch / "image"
    image.write_bytes(blocks.pattern(2 * MIB))
    device = serve(devices, ReadByMap({"file": image}), depth=depth, mode=mode)
    for offset in range(0, MIB, 65536):
        assert blocks.read(device.node, offset, 65536) == blocks.pattern(2 * MIB)[offset : offset + 65536]
    blocks.write(device.node, MIB, bytes(65536))
    assert blocks.read(device.node, MIB, 65536) == bytes(65536)


def test_what_cannot_be_takes_no_room(devices: Devices, scratch: Path) -> None:
    device = serve(devices, Wrong({"file": blocks.image(scratch / "image", MIB)}), depth=4)
    blocks.flush(device.node)
    assert blocks.read(device.node, 0, 65536) == bytes(65536)


@pytest.mark.parametrize("depth", [1, 16])
def test_what_is_given_up_ends_before_its_buffer(devices: Devices, scratch: Path, depth: int) -> None:
    image = scratch / "image"
    image.write_bytes(blocks.pattern(2 * MIB))
    device = serve(devices, Hasty({"file": image}), depth=depth)
    for offset, reason in ((0, errno.ETIMEDOUT), (65536, errno.ETIMEDOUT), (MIB, errno.ENOSPC)):
        with pytest.raises(OSError, match=os.strerror(reason)):
            blocks.read(device.node, offset, 65536)
    blocks.write(device.node, 0, bytes(65536))
    assert image.read_bytes() == bytes(65536) + blocks.pattern(2 * MIB)[65536:]


def test_files_from_start_to_stop(devices: Devices, scratch: Path) -> None:
    """Also for tasks of their own, which do not keep a device from its end."""
    image = scratch / "image"
    image.write_bytes(blocks.pattern(MIB))
    device = serve(devices, Busy({"file": image}), queues=1)
    assert blocks.read(device.node, 4096, MIB // 2) == blocks.pattern(MIB)[4096 : 4096 + MIB // 2]
    devices.remove(device)
    until(lambda: image.read_bytes().startswith(b"the end"), "stop() has written")
