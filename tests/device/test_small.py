"""The targets without anything behind them: zero, full, pattern and error."""

from __future__ import annotations

import errno
import os
import struct
import subprocess

import pytest

from . import disk
from .devices import MIB, Devices

ENOSPC = os.strerror(errno.ENOSPC)


def offsets(start: int, length: int) -> bytes:
    """What a pattern is there, from its description."""
    return b"".join(struct.pack(">Q", place) for place in range(start, start + length, 8))


def test_zeroes_whatever_was_written(devices: Devices, mode: str) -> None:
    device = devices.add("zero", size=64 * MIB, mode=mode)
    for at in (0, 64 * MIB - 128 * 1024):
        disk.write(device.node, at, disk.pattern(128 * 1024))
        assert disk.read(device.node, at, 128 * 1024) == bytes(128 * 1024)
    disk.discard(device.node, MIB, MIB)
    disk.zero_allocated(device.node, MIB, MIB)
    disk.flush(device.node)


def test_no_space(devices: Devices, mode: str) -> None:
    device = devices.add("full", size=64 * MIB, mode=mode)
    with pytest.raises(OSError, match=ENOSPC):
        disk.write(device.node, 0, bytes(4096))
    with pytest.raises(OSError, match=ENOSPC):
        disk.zero_allocated(device.node, 0, MIB)
    assert disk.read(device.node, 0, 64 * 1024) == bytes(64 * 1024)
    disk.discard(device.node, 0, MIB)
    disk.flush(device.node)


@pytest.mark.any_kernel
def test_a_file_system_does_not_fit(devices: Devices) -> None:
    device = devices.add("full", size=64 * MIB)
    done = subprocess.run(["mkfs.ext4", "-q", "-F", device.node], capture_output=True, text=True)
    assert done.returncode != 0
    assert "while writing out" in done.stderr


def test_each_place_is_its_own_number(devices: Devices, mode: str) -> None:
    device = devices.add("pattern", size=1 << 40, mode=mode)
    for at, length in ((0, 4096), (MIB - 512, 1024), ((1 << 40) - 256 * 1024, 256 * 1024)):
        assert disk.read(device.node, at, length) == offsets(at, length)
        disk.write(device.node, at, offsets(at, length))
    for wrong in (offsets(8, 4096), offsets(0, 4088) + bytes(8), bytes(8) + offsets(0, 4088)):
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            disk.write(device.node, 0, wrong)
    assert disk.read(device.node, 0, 4096) == offsets(0, 4096)


@pytest.mark.any_kernel
@pytest.mark.parametrize("target", ["zero", "full", "pattern", "error"])
def test_they_grow_and_shrink(devices: Devices, target: str) -> None:
    from ublkpy.life.resize import resize

    device = devices.add(target, size=64 * MIB)
    for size in (128 * MIB, 32 * MIB):
        resize(device.id, size)
        assert int(device.queue("../size")) * 512 == size
    if target != "error":
        assert len(disk.read(device.node, 32 * MIB - 4096, 4096)) == 4096


@pytest.mark.parametrize("number", [errno.EIO, errno.ENODATA])
def test_each_request_fails(devices: Devices, mode: str, number: int) -> None:
    device = devices.add("error", size=64 * MIB, errno=number, mode=mode)
    why = os.strerror(number)
    with pytest.raises(OSError, match=why):
        disk.read(device.node, 0, 4096)
    with pytest.raises(OSError, match=why):
        disk.write(device.node, MIB, bytes(4096))
    with pytest.raises(OSError, match=why):
        disk.discard(device.node, 0, MIB)
