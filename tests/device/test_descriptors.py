"""Descriptors that are larger than their fields (UBLK_F_IO_DESC_SIZE)."""

from __future__ import annotations

from pathlib import Path

import pytest

from ublkpy.driver import inspect
from ublkpy.errors import ExitCode
from ublkpy.life.recover import recover
from ublkpy.uring.uapi import Feature

from . import disk, load, program
from .devices import MIB, Devices

MIXED = ["--ioengine=libaio", "--iodepth=32", "--rw=randrw", "--bsrange=4k-128k", "--size=8m"]


@pytest.fixture
def larger() -> None:
    """Only where the driver makes them."""
    if Feature.IO_DESC_SIZE not in inspect.features():
        pytest.skip("this driver knows one size of descriptors")


@pytest.mark.parametrize(("queues", "size"), [(1, 64), (2, 256)])
@pytest.mark.parametrize("mode", ["copy", "auto-buf", "batch+copy"])
def test_the_same_data(larger: None, devices: Devices, scratch: Path, mode: str, queues: int, size: int) -> None:
    """Each queue's descriptors lie elsewhere, and so do those of each tag."""
    file = disk.image(scratch / "image", 16 * MIB)
    device = devices.loop(file, mode=mode, queues=queues, depth=100, io_desc_size=size)
    info = device.status().info
    assert (info.io_desc_size, Feature.IO_DESC_SIZE in info.flags) == (size, size != 24)
    load.verify(device.node, *MIXED, f"--numjobs={queues}", "--offset_increment=8m")
    assert disk.read(device.node, 0, 16 * MIB) == file.read_bytes()


def test_the_next_daemon_reads_them_too(larger: None, devices: Devices, scratch: Path) -> None:
    file = disk.image(scratch / "image", 8 * MIB)
    device = devices.loop(file, io_desc_size=136, queues=2, recovery="queue")
    device.kill_daemon()
    recover(device.id)
    assert device.status().to_dict()["io_desc_size"] == 136
    load.verify(device.node, *MIXED)
    assert disk.read(device.node, 0, 8 * MIB) == file.read_bytes()


def test_a_driver_without_them() -> None:
    if Feature.IO_DESC_SIZE in inspect.features():
        pytest.skip("this driver has them")
    added = program.ublk("add", "-t", "null", "--io_desc_size", "64")
    assert (added.status, added.out, inspect.device_ids()) == (ExitCode.FAILED, "", [])
    assert "lacks UBLK_F_IO_DESC_SIZE, which io_desc_size 64 needs" in added.err


def test_the_smallest_needs_nothing(devices: Devices) -> None:
    assert program.ublk("add", "-t", "null", "--io-desc-size", "24").status == 0
    assert devices.adopt(0).status().to_dict()["io_desc_size"] == 24


@pytest.mark.any_kernel
@pytest.mark.parametrize(
    ("size", "why"),
    [
        ("16", "16 is out of range: 24 to 256"),
        ("264", "264 is out of range: 24 to 256"),
        ("60", "60 is not a multiple of 8"),
        ("64k", "'64k' is not a whole number"),
    ],
)
def test_sizes_that_no_driver_takes(size: str, why: str) -> None:
    added = program.ublk("add", "-t", "null", "--io_desc_size", size)
    assert (added.status, added.out, inspect.device_ids()) == (ExitCode.USAGE, "", [])
    assert why in added.err
