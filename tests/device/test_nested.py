"""Targets that are parts of others: their bytes, flushes, failures and lives."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ublkpy.life.recover import recover
from ublkpy.life.resync import resync
from ublkpy.tgt.concat import ConcatTarget
from ublkpy.tgt.error import ErrorTarget
from ublkpy.tgt.fault import FaultTarget
from ublkpy.tgt.loop import LoopTarget
from ublkpy.tgt.mirror import MirrorTarget
from ublkpy.tgt.mirror_label import ROOM
from ublkpy.tgt.pattern import PatternTarget
from ublkpy.tgt.zero import ZeroTarget

from . import disk, kernel, load, program
from .devices import MIB, Device, Devices, until

CHUNK = 16 << 10


def images(scratch: Path, count: int, size: int) -> list[Path]:
    return [disk.image(scratch / f"image{n}", size) for n in range(count)]


def shown(device: Device) -> list[list[str]]:
    known = device.status().known
    assert known
    parts = known.target["parts"]
    assert isinstance(parts, list)
    return [part["legs"] for part in parts]


def test_each_byte_is_where_it_belongs(devices: Devices, scratch: Path, way: str) -> None:
    """A stripe over a file, and over two files one after the other."""
    first, second, third = (disk.image(scratch / name, size * MIB) for name, size in (("a", 4), ("b", 1), ("c", 3)))
    inner = ConcatTarget({"files": (second, third)})
    device = devices.add("stripe", files=(first, inner), chunk=CHUNK, mode=way, depth=4)
    data = disk.pattern(8 * MIB)
    for at in range(0, len(data), 512 << 10):
        disk.write(device.node, at, data[at : at + (512 << 10)])
    for at in range(0, len(data), 384 << 10):
        length = min(384 << 10, len(data) - at)
        assert disk.read(device.node, at, length) == data[at : at + length]
    disk.flush(device.node)
    chunks = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
    assert first.read_bytes() == b"".join(chunks[::2])
    assert second.read_bytes() + third.read_bytes() == b"".join(chunks[1::2])
    disk.discard(device.node, MIB, 4 * MIB)
    disk.zero_unmapped(device.node, 6 * MIB, MIB)
    expected = data[:MIB] + bytes(4 * MIB) + data[5 * MIB : 6 * MIB] + bytes(MIB) + data[7 * MIB :]
    for at in range(0, len(data), MIB):
        assert disk.read(device.node, at, MIB) == expected[at : at + MIB]


@pytest.mark.any_kernel
def test_parts_that_are_no_files(devices: Devices) -> None:
    parts = (ZeroTarget({"size": MIB}), PatternTarget({"size": MIB}), ErrorTarget({"size": MIB, "errno": errno.ENOSPC}))
    device = devices.add("concat", files=parts)
    found = disk.read(device.node, MIB - 4096, 8192)
    assert found[:4096] == bytes(4096)
    assert found[4096:] == b"".join(n.to_bytes(8, "big") for n in range(0, 4096, 8))
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        disk.read(device.node, 2 * MIB - 4096, 8192)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):  # no pattern
        disk.write(device.node, MIB - 4096, bytes(8192))


def test_a_flush_goes_to_all_parts(devices: Devices, scratch: Path) -> None:
    """Each has files of its own to sync, and one that fails fails it."""
    files, switch = images(scratch, 3, 4 * MIB), scratch / "on"
    bad = FaultTarget({"file": files[1], "error_rate": 1.0, "ops": ("flush",), "while_file": switch})
    device = devices.add("stripe", files=(files[0], bad, files[2]))
    disk.write(device.node, 0, disk.pattern(MIB))
    disk.flush(device.node)
    switch.touch()
    disk.write(device.node, 0, disk.pattern(MIB))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        disk.flush(device.node)
    switch.unlink()
    disk.flush(device.node)


def test_faults_of_parts(devices: Devices, scratch: Path, way: str) -> None:
    files = images(scratch, 2, 8 * MIB)
    parts = tuple(FaultTarget({"file": file, "delay": 10**6, "distribution": "uniform"}) for file in files)
    device = devices.add("stripe", files=parts, chunk=CHUNK, mode=way, depth=8)
    load.verify(device.node, "--ioengine=libaio", "--iodepth=8", "--rw=randrw", "--bsrange=4k-128k", "--size=2m")


RAID10 = """\
target:
  type: stripe
  chunk: 16k
  files:
    - {type: mirror, files: [/dev/first, /dev/second], create: true}
    - {type: mirror, files: [leg0, leg1]}
recovery: queue
queues: 2
"""


def test_a_leg_of_a_striped_mirror_fails_under_load(devices: Devices, scratch: Path) -> None:
    """The device goes on, names it, and brings it back; then the legs of each mirror are alike."""
    legs = [disk.image(scratch / f"leg{n}", 16 * MIB) for n in range(2)]
    with (
        kernel.null_block(scratch, "first", memory_backed="1", size="16", blocksize="4096") as first,
        kernel.null_block(scratch, "second", memory_backed="1", size="16", blocksize="4096") as second,
    ):
        bad = scratch / "second.config" / "nullb" / "second" / "badblocks"
        config = scratch / "raid10.yaml"
        config.write_text(RAID10.replace("/dev/first", str(first)).replace("/dev/second", str(second)))
        done = program.ublk("add", "-c", str(config))
        assert (done.status, done.out) == (0, "/dev/ublkb0\n"), done.err
        device = devices.adopt(0)
        resync(device.id)
        assert shown(device) == [["in sync", "in sync"]] * 2
        options = ("--rw=randrw", "--bs=4k-64k", "--iodepth=8", "--time_based", "--runtime=6", "--verify=crc32c")
        with load.running(device, *options) as fio:
            bad.write_text("+0-32767")
            until(lambda: shown(device)[0] == ["in sync", "out of sync"], "the leg is dropped")
            assert shown(device)[1] == ["in sync", "in sync"]
            bad.write_text("-0-32767")
            done = program.ublk("resync", "-n", "0")
            assert (done.status, done.out) == (0, ""), done.err
            assert shown(device) == [["in sync", "in sync"]] * 2
            status, output = load.result(fio)
        assert status == 0, output
        assert f"mirror({first}, {second}), mirror({legs[0]}, {legs[1]})" in program.ublk("list").out
        device.kill_daemon()
        recover(device.id)
        disk.write(device.node, 0, disk.pattern(MIB))
        assert disk.read(device.node, 0, MIB) == disk.pattern(MIB)
        resync(device.id)
        devices.remove(device)
        size = 16 * MIB - ROOM
        assert disk.read(first, 0, size) == disk.read(second, 0, size)
        assert legs[0].read_bytes()[:size] == legs[1].read_bytes()[:size]


@pytest.mark.any_kernel
def test_resync_where_nothing_can_be_brought_back(devices: Devices, scratch: Path) -> None:
    files = images(scratch, 2, 4 * MIB)
    device = devices.add("stripe", files=tuple(LoopTarget({"file": file}) for file in files))
    done = program.ublk("resync", "-n", str(device.id))
    assert done.status == 1
    assert "has no legs to bring back" in done.err


def test_mirrors_end_clean(devices: Devices, scratch: Path) -> None:
    """The end of the device is that of its parts."""
    files = images(scratch, 4, 4 * MIB)
    parts = (MirrorTarget({"files": tuple(files[:2])}), MirrorTarget({"files": tuple(files[2:])}))
    device = devices.add("stripe", files=parts, chunk=CHUNK)
    disk.write(device.node, 0, disk.pattern(MIB))
    devices.remove(device)
    for leg, other in (files[:2], files[2:]):
        assert leg.read_bytes()[: 4 * MIB - ROOM] == other.read_bytes()[: 4 * MIB - ROOM]
    parts = (MirrorTarget({"files": tuple(files[:2])}), MirrorTarget({"files": tuple(files[2:])}))
    device = devices.add("stripe", files=parts, chunk=CHUNK, read_only=True)
    assert disk.read(device.node, 0, MIB) == disk.pattern(MIB)
    assert shown(device) == [["in sync", "in sync"]] * 2
