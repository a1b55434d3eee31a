"""Zoned disks: what the kernel says of them, and what it asks of the methods of a target."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ublkpy.config import DeviceConfig, DeviceOptions
from ublkpy.life.add import add
from ublkpy.tgt.base import Target

from . import disk, kernel, zoned
from .devices import MIB, Device, Devices
from .zones import blkzone, report

ZONE = 4 * MIB


def serve(devices: Devices, target: Target, **options: object) -> Device:
    return devices.adopt(add(DeviceConfig(DeviceOptions(options), target)))


@pytest.fixture(params=["", "Async", "Blocking"], ids=["plain", "async", "blocking"])
def device(request: pytest.FixtureRequest, devices: Devices) -> Device:
    return serve(devices, getattr(zoned, request.param + "ZonedRam")())


def test_the_kernel_sees_its_zones(device: Device) -> None:
    assert device.queue("zoned") == "host-managed"
    assert device.queue("nr_zones") == "64"
    assert device.queue("chunk_sectors") == str(ZONE // 512)
    assert device.queue("max_open_zones") == "8"
    zones = report(device)
    assert len(zones) == 64
    assert zones[0][2] == "nw"
    assert zones[1:] == [(n * ZONE, 0, "em") for n in range(1, 64)]


def test_writes_go_to_the_write_pointer(device: Device) -> None:
    data = disk.pattern(MIB)
    disk.write(device.node, ZONE, data)
    disk.write(device.node, ZONE + MIB, data)
    assert report(device)[1] == (ZONE, 2 * MIB, "oi")
    assert disk.read(device.node, ZONE, 2 * MIB) == data * 2
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        disk.write(device.node, ZONE + 3 * MIB, data)
    disk.write(device.node, 0, data)
    disk.write(device.node, MIB * 2, data)  # a conventional zone takes them anywhere


def test_what_is_done_with_zones(device: Device) -> None:
    def state(zone: int) -> str:
        return report(device)[zone][2]

    blkzone(device, "open", 2)
    assert state(2) == "oe"
    blkzone(device, "close", 2)
    assert state(2) == "em"
    disk.write(device.node, 3 * ZONE, bytes(4096))
    blkzone(device, "open", 3)
    blkzone(device, "close", 3)
    assert state(3) == "cl"
    blkzone(device, "finish", 3)
    assert state(3) == "fu"
    blkzone(device, "reset", 3)
    assert state(3) == "em"
    for zone in (5, 6, 7):
        disk.write(device.node, zone * ZONE, bytes(4096))
    blkzone(device, "reset", 1, 63)
    assert {state(zone) for zone in range(1, 64)} == {"em"}
    blkzone(device, "open", 10, 8)
    with pytest.raises(AssertionError, match="BLKOPENZONE"):
        blkzone(device, "open", 20)


def test_btrfs_appends(device: Device, scratch: Path) -> None:
    """Its data goes to zones by ZONE_APPEND, and is where the target said that it went."""
    kernel.load_module("btrfs")
    kernel.run("mkfs.btrfs", "-q", "-f", "-O", "zoned", "-d", "single", "-m", "single", device.node)
    with kernel.mounted(device.node, scratch / "mnt") as point:
        for n in range(8):
            (point / f"file{n}").write_bytes(disk.pattern(MIB, n))
        os.sync()
    with kernel.mounted(device.node, scratch / "mnt") as point:
        for n in range(8):
            assert (point / f"file{n}").read_bytes() == disk.pattern(MIB, n)
        kernel.run("btrfs", "scrub", "start", "-B", point)
