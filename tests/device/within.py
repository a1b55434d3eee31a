"""What the tests of devices have in common that this process serves itself."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ublkpy import Device
from ublkpy.driver import inspect
from ublkpy.uring.uapi import State

from . import disk
from .devices import until

DATA = disk.pattern(64 << 10)


def fds() -> dict[str, str]:
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found[entry.name] = str(entry.readlink())
    return found


@pytest.fixture(autouse=True)
def nothing_of_it_stays() -> Iterator[None]:
    """Neither a thread nor a file of ours in this process."""
    before = fds()
    yield
    until(lambda: threading.active_count() == 1, f"only one thread is left of {threading.enumerate()}")
    assert {fd: link for fd, link in fds().items() if fd not in before} == {}


def write(device: Device, offset: int, data: bytes) -> None:
    disk.write(Path(device.node), offset, data)


def read(device: Device, offset: int, length: int) -> bytes:
    return disk.read(Path(device.node), offset, length)


def until_dead(dev_id: int) -> None:
    until(lambda: inspect.status(dev_id).info.state is State.DEAD, "the driver has noticed", 60)
