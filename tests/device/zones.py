"""What the kernel says of the zones of a device, and does with them."""

from __future__ import annotations

import fcntl
import os
import re
import struct

from . import kernel
from .devices import Device, held_open

_BLKOPENZONE = 0x40101286  # linux/blkzoned.h


def report(device: Device) -> list[tuple[int, int, str]]:
    """Of each zone: its start and write pointer in bytes, and its condition as blkzone shows it."""
    lines = kernel.run("blkzone", "report", device.node).splitlines()
    pattern = r"start: 0x(\w+), len 0x\w+, cap 0x\w+, wptr 0x(\w+) .*zcond:\s*\d+\((..)\)"
    found = [re.search(pattern, line) for line in lines]
    return [(int(m[1], 16) * 512, int(m[2], 16) * 512, m[3]) for m in found if m]


def blkzone(device: Device, command: str, zone: int, count: int = 1) -> None:
    size = int(device.queue("chunk_sectors"))
    kernel.run("blkzone", command, "-o", str(zone * size), "-l", str(count * size), device.node)


def open_zone(device: Device, zone: int) -> None:
    """The same as ``blkzone open``; OSError with the errno of the kernel."""
    size = int(device.queue("chunk_sectors"))
    with held_open(device.node, os.O_RDWR) as fd:
        fcntl.ioctl(fd, _BLKOPENZONE, struct.pack("QQ", zone * size, size))
