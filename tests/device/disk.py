"""Bytes of block devices and files: always past the page cache, unless a test says otherwise."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import random
import struct
from pathlib import Path

from .devices import held_open

_BLKDISCARD = 0x1277
_BLKZEROOUT = 0x127F
_PUNCH_HOLE = 0x01 | 0x02  # and FALLOC_FL_KEEP_SIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def pattern(length: int, seed: int = 0) -> bytes:
    """Bytes that nothing else would produce."""
    return random.Random(seed).randbytes(length)


def image(path: Path, size: int, fill: bytes = b"") -> Path:
    """A sparse file, its beginning filled."""
    path.write_bytes(fill)
    os.truncate(path, size)
    return path


def read(path: Path, offset: int, length: int) -> bytes:
    """One O_DIRECT read; a short one fails the test."""
    with held_open(path, os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, length) as buffer:
        with memoryview(buffer) as view:
            assert os.preadv(fd, [view], offset) == length
        return buffer[:]


def write(path: Path, offset: int, data: bytes, flags: int = 0) -> None:
    """One O_DIRECT write; a short one fails the test."""
    with held_open(path, os.O_WRONLY | os.O_DIRECT | flags) as fd, mmap.mmap(-1, len(data)) as buffer:
        buffer[:] = data
        with memoryview(buffer) as view:
            assert os.pwritev(fd, [view], offset) == len(data)


def flush(path: Path) -> None:
    with held_open(path, os.O_WRONLY) as fd:
        os.fsync(fd)


def discard(path: Path, offset: int, length: int) -> None:
    """BLKDISCARD, what blkdiscard(8) does."""
    _on_range(path, _BLKDISCARD, offset, length)


def zero_allocated(path: Path, offset: int, length: int) -> None:
    """BLKZEROOUT, what blkdiscard -z does: zeroes that stay allocated (NOUNMAP)."""
    _on_range(path, _BLKZEROOUT, offset, length)


def zero_unmapped(path: Path, offset: int, length: int) -> None:
    """fallocate(PUNCH_HOLE) of the device: zeroes that need no space."""
    with held_open(path, os.O_RDWR) as fd:
        if _libc.fallocate(fd, _PUNCH_HOLE, offset, length):
            err = ctypes.get_errno()
            raise OSError(err, os.strerror(err))


def _on_range(path: Path, request: int, offset: int, length: int) -> None:
    with held_open(path, os.O_RDWR) as fd:
        fcntl.ioctl(fd, request, struct.pack("QQ", offset, length))


def allocated(path: Path) -> int:
    """The bytes that the file takes on its disk."""
    return path.stat().st_blocks * 512
