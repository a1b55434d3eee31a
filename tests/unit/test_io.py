"""``ublkpy.io`` on a loop that is no queue's: the same results, from threads. tests/device/test_io.py has the ring."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest

from ublkpy import io


def test_read_and_write_move_all(tmp_path: Path) -> None:
    async def copy(fd: int) -> bytes:
        await io.write(fd, b"0123456789", 5)
        await io.fsync(fd)
        buf = bytearray(6)
        assert await io.read(fd, memoryview(buf), 7) == 6
        return bytes(buf)

    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        assert asyncio.run(copy(fd)) == b"234567"
    finally:
        os.close(fd)


def test_read_is_short_at_the_end_of_the_file_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    buf = bytearray(b"....")
    with (tmp_path / "file").open("rb") as file:
        assert asyncio.run(io.read(file.fileno(), buf, 1)) == 2
        assert asyncio.run(io.read(file.fileno(), buf, 100)) == 0
    assert buf == b"bc.."


def test_holes_are_zeroes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 16384)
    with (tmp_path / "file").open("r+b") as file:
        asyncio.run(io.punch_hole(file.fileno(), 4096, 4096))
        assert os.fstat(file.fileno()).st_blocks * 512 == 12288
        assert file.read() == b"x" * 4096 + bytes(4096) + b"x" * 8192


def test_errors_are_those_of_the_system_call(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        with pytest.raises(OSError, match="Bad file descriptor") as e:
            asyncio.run(io.read(file.fileno(), bytearray(1), 0))
        assert e.value.errno == errno.EBADF
        with pytest.raises(BufferError):
            asyncio.run(io.read(file.fileno(), b"read-only", 0))


def test_a_cancelled_read_ends_when_its_buffer_is_free() -> None:
    async def cancelled() -> bytearray:
        buf = bytearray(4)
        ours, theirs = os.pipe()
        reading = asyncio.create_task(io._in_thread(lambda: os.readv(ours, [buf])))
        await asyncio.sleep(0.05)
        reading.cancel()
        await asyncio.sleep(0.05)
        assert not reading.done()
        os.write(theirs, b"late")
        with pytest.raises(asyncio.CancelledError):
            await reading
        return buf

    assert asyncio.run(cancelled()) == b"late"
