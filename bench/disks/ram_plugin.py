"""A RAM disk as a plugin for nbdkit, written as examples/ram.py is: nbdkit serves it, and so does ublkpy."""

from __future__ import annotations

API_VERSION = 2

_size = 64 << 20


def config(key: str, value: str) -> None:
    global _size
    if key != "size":
        raise ValueError(f"unknown parameter {key}")
    _size = int(value)


def open(readonly: bool) -> memoryview:
    return memoryview(bytearray(_size))


def get_size(h: memoryview) -> int:
    return len(h)


def pread(h: memoryview, buf: memoryview, offset: int, flags: int) -> None:
    buf[:] = h[offset : offset + len(buf)]


def pwrite(h: memoryview, buf: memoryview, offset: int, flags: int) -> None:
    h[offset : offset + len(buf)] = buf
