"""Disks in memory: what they survive, and that nothing of them is left."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ublkpy.driver import state
from ublkpy.errors import ExitCode, UblkError
from ublkpy.life.recover import recover
from ublkpy.life.stop import start, stop
from ublkpy.life.upgrade import upgrade
from ublkpy.uring.uapi import Feature

from . import disk, program
from .devices import MIB, Device, Devices


def segments() -> dict[int, int]:
    """Those that this machine has, and how many bytes of each are in memory."""
    lines = Path("/proc/sysvipc/shm").read_text().splitlines()
    columns = lines[0].split()
    rows = [dict(zip(columns, map(int, line.split()), strict=True)) for line in lines[1:]]
    return {row["shmid"]: row["rss"] for row in rows}


@pytest.fixture(autouse=True)
def no_segment_is_left() -> Iterator[None]:
    yield
    assert segments() == {}


@pytest.fixture
def devices() -> Iterator[Devices]:
    """Of this module: they are gone before we look what is left."""
    found = Devices()
    yield found
    found.close()


def filled(devices: Devices, **options: object) -> tuple[Device, bytes]:
    device = devices.add("ram", size=16 * MIB, **options)
    data = disk.pattern(MIB)
    disk.write(device.node, 3 * MIB, data)
    return device, data


def test_what_is_discarded_gives_its_memory_back(devices: Devices, way: str) -> None:
    device = devices.add("ram", size=32 * MIB, mode=way)
    data = disk.pattern(16 * MIB)
    for at in range(0, len(data), MIB):
        disk.write(device.node, at, data[at : at + MIB])
    (used,) = segments().values()
    assert used >= 16 * MIB
    disk.discard(device.node, 4 * MIB, 8 * MIB)
    disk.zero_unmapped(device.node, 12 * MIB, 2 * MIB)
    (left,) = segments().values()
    assert left <= used - 10 * MIB
    expected = data[: 4 * MIB] + bytes(10 * MIB) + data[14 * MIB :]
    for at in range(0, len(data), MIB):
        assert disk.read(device.node, at, MIB) == expected[at : at + MIB]
    disk.zero_allocated(device.node, 0, MIB)
    assert disk.read(device.node, 0, 2 * MIB) == bytes(MIB) + data[MIB : 2 * MIB]
    devices.remove(device)


@pytest.mark.any_kernel
def test_kill_9_and_recover(devices: Devices) -> None:
    device, data = filled(devices, recovery="queue")
    for _ in range(2):
        device.kill_daemon()
        recover(device.id)
        assert disk.read(device.node, 3 * MIB, MIB) == data
    assert len(segments()) == 1
    devices.remove(device)


@pytest.mark.any_kernel
def test_upgrade(devices: Devices) -> None:
    device, data = filled(devices, recovery="reissue")
    if not device.status().info.flags & Feature.QUIESCE:
        pytest.skip("this driver has no UBLK_F_QUIESCE (Linux 6.16)")
    before = device.pid
    upgrade(device.id)
    assert device.pid != before
    assert disk.read(device.node, 3 * MIB, MIB) == data
    devices.remove(device)


@pytest.mark.any_kernel
def test_stop_and_start(devices: Devices) -> None:
    device, data = filled(devices, recovery="queue")
    stop(device.id)
    assert len(segments()) == 1
    start(device.id)
    assert disk.read(device.node, 3 * MIB, MIB) == data
    device.kill_daemon()
    recover(device.id)
    assert disk.read(device.node, 3 * MIB, MIB) == data
    devices.remove(device)


def test_a_start_that_fails_loses_nothing(devices: Devices, scratch: Path) -> None:
    device, data = filled(devices, recovery="queue")
    stop(device.id)
    known = state.read(device.id)
    assert known
    broken = known.config | {"device": known.config["device"] | {"htlb": str(scratch / "none"), "shmem_zc": True}}
    state.write(type(known)(**{**vars(known), "config": broken}))
    with pytest.raises(UblkError):
        start(device.id)
    assert len(segments()) == 1
    state.write(known)
    start(device.id)
    assert disk.read(device.node, 3 * MIB, MIB) == data
    devices.remove(device)


@pytest.mark.any_kernel
def test_without_recovery_it_goes_with_the_daemon(devices: Devices) -> None:
    device, _ = filled(devices)
    device.kill_daemon()
    assert segments() == {}
    devices.remove(device)


def test_a_dead_device_is_deleted_with_its_memory(devices: Devices) -> None:
    device, _ = filled(devices, recovery="queue")
    device.kill_daemon()
    assert len(segments()) == 1
    assert program.ublk("del", "-n", str(device.id)).status == 0


def test_an_add_that_fails_leaves_nothing(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the state file cannot be written, the memory is there already."""

    def full(_: object) -> None:
        raise UblkError("there is no room for the state file")

    monkeypatch.setattr(state, "write", full)
    with pytest.raises(UblkError, match="no room for the state file"):
        devices.add("ram", size=MIB, recovery="queue")


def test_memory_that_somebody_removed(devices: Devices) -> None:
    device, _ = filled(devices, recovery="queue")
    device.kill_daemon()
    (segment,) = segments()
    os.system(f"ipcrm -m {segment}")
    done = program.ublk("recover", "-n", str(device.id))
    assert done.status == ExitCode.FAILED
    assert f"the memory that the disk was in, shared memory segment {segment}, is gone" in done.err
    devices.remove(device)


@pytest.fixture
def huge_pages() -> Iterator[int]:
    """Bytes of one; 16 of them are set aside."""
    found = re.search(r"Hugepagesize:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    if not found:
        pytest.skip("this kernel has no huge pages")
    pool = Path("/proc/sys/vm/nr_hugepages")
    pool.write_text("16")
    yield int(found[1]) << 10
    pool.write_text("0")


@pytest.mark.any_kernel
def test_huge_pages(devices: Devices, huge_pages: int) -> None:
    size = 8 * huge_pages
    device = devices.add("ram", size=size, huge_pages=True, recovery="queue")
    data = disk.pattern(2 * MIB)
    disk.write(device.node, size - 2 * MIB, data)
    assert device.queue("discard_max_bytes") == "0"
    device.kill_daemon()
    recover(device.id)
    assert disk.read(device.node, size - 2 * MIB, 2 * MIB) == data
    done = program.ublk("add", "-t", "ram", "--size", str(9 * huge_pages), "--huge-pages")
    assert done.status == ExitCode.FAILED
    assert "that is 9 of" in done.err
    assert "sysctl vm.nr_hugepages=9" in done.err
    devices.remove(device)
    free = re.search(r"HugePages_Free:\s+(\d+)", Path("/proc/meminfo").read_text())
    assert free
    assert free[1] == "16"
