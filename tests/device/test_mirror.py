"""Mirrors: legs that fail and come back, and crashes, under load."""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ublkpy.daemon.channel import ask
from ublkpy.errors import ExitCode, UblkError
from ublkpy.life.recover import recover
from ublkpy.life.resync import resync
from ublkpy.life.upgrade import upgrade
from ublkpy.tgt import mirror_label
from ublkpy.uring.uapi import Feature

from . import disk, kernel, load, program
from .devices import MIB, Device, Devices, until

ROOM = mirror_label.ROOM


def legs(scratch: Path, count: int = 2, size: int = 16 * MIB) -> tuple[Path, ...]:
    return tuple(disk.image(scratch / f"leg{n}", size + ROOM) for n in range(count))


def data_of(leg: Path, size: int = 16 * MIB) -> bytes:
    with leg.open("rb") as file:
        return file.read(size)


def label_of(leg: Path) -> mirror_label.Label:
    with leg.open("rb") as file:
        found = mirror_label.read(file.fileno(), leg.stat().st_size)
    assert found
    return found


def dirty(leg: Path) -> list[int]:
    return [n for n, flag in enumerate(label_of(leg).dirty) if flag]


def shown(device: Device) -> list[str]:
    known = device.status().known
    assert known
    found = known.target["legs"]
    assert isinstance(found, list)
    return found


def wait_in_sync(device: Device) -> None:
    resync(device.id)
    assert set(shown(device)) == {"in sync"}


def test_all_legs_have_what_is_written(devices: Devices, scratch: Path, mode: str) -> None:
    files = legs(scratch, 3)
    device = devices.add("mirror", files=files, mode=mode, queues=2)
    data = disk.pattern(6 * MIB)
    for at in range(0, len(data), 512 * 1024):
        disk.write(device.node, at, data[at : at + 512 * 1024])
    for at in range(0, len(data), 384 * 1024):
        assert disk.read(device.node, at, 384 * 1024) == data[at : at + 384 * 1024]
    disk.zero_unmapped(device.node, MIB, MIB)
    disk.discard(device.node, 3 * MIB, MIB)
    expected = data[:MIB] + bytes(MIB) + data[2 * MIB : 3 * MIB] + bytes(MIB) + data[4 * MIB :] + bytes(10 * MIB)
    assert [data_of(file) == expected for file in files] == [True] * 3
    devices.remove(device)
    assert [dirty(file) for file in files] == [[]] * 3


def test_reads_are_spread(devices: Devices, scratch: Path) -> None:
    files = legs(scratch)
    device = devices.add("mirror", files=files)
    disk.write(device.node, 0, disk.pattern(MIB))
    for n, leg in enumerate(files):  # behind the mirror's back
        disk.write(leg, 0, bytes([n]) * MIB)
    found = disk.read(device.node, 0, 256 * 1024)
    assert [found[at] for at in range(0, 256 * 1024, 64 * 1024)] == [0, 1, 0, 1]


def test_a_region_is_marked_before_it_is_written_and_cleaned_when_it_is_not(devices: Devices, scratch: Path) -> None:
    files = legs(scratch)
    device = devices.add("mirror", files=files)
    disk.write(device.node, 5 * MIB, bytes(4096))
    assert [dirty(file) for file in files] == [[5], [5]]
    disk.write(device.node, 7 * MIB - 4096, bytes(8192))
    assert [dirty(file) for file in files] == [[5, 6, 7]] * 2
    until(lambda: not dirty(files[0]) and not dirty(files[1]), "they are clean again", 40)
    disk.write(device.node, 5 * MIB, bytes(4096))
    assert [dirty(file) for file in files] == [[5], [5]]


@pytest.fixture
def drives(scratch: Path) -> Iterator[list[Path]]:
    """Two block devices; the second one fails in its second MiB."""
    with (
        kernel.null_block(scratch, "good", memory_backed="1", size="16", blocksize="4096") as good,
        kernel.null_block(
            scratch, "bad", memory_backed="1", size="16", blocksize="4096", badblocks="+2048-4095"
        ) as bad,
    ):
        yield [good, bad]


def test_a_leg_that_fails_is_dropped_and_named(devices: Devices, drives: list[Path], scratch: Path, way: str) -> None:
    log = scratch / "log"
    device = devices.add("mirror", files=tuple(drives), create=True, mode=way, log=log)
    wait_or_fail = pytest.raises(UblkError, match="not in sync")
    with wait_or_fail:
        resync(device.id)  # the first copy meets the bad blocks
    assert shown(device) == ["in sync", "out of sync"]
    data = disk.pattern(4 * MIB)
    for at in range(0, len(data), 256 * 1024):
        disk.write(device.node, at, data[at : at + 256 * 1024])
    disk.flush(device.node)
    for at in range(0, len(data), 256 * 1024):
        assert disk.read(device.node, at, 256 * 1024) == data[at : at + 256 * 1024]
    assert f"{drives[1]} failed while it was brought back: Input/output error" in log.read_text()
    known = device.status().known
    assert known
    assert known.backing == f"{drives[0]}, {drives[1]} (out of sync)"
    devices.remove(device)


def test_a_leg_that_fails_under_load(devices: Devices, scratch: Path, way: str) -> None:
    """No request fails; what it missed is copied when it is back, while the load goes on; then both are alike."""
    with (
        kernel.null_block(scratch, "first", memory_backed="1", size="16", blocksize="4096") as first,
        kernel.null_block(scratch, "second", memory_backed="1", size="16", blocksize="4096") as second,
    ):
        bad = scratch / "second.config" / "nullb" / "second" / "badblocks"
        device = devices.add("mirror", files=(first, second), create=True, mode=way, queues=2)
        wait_in_sync(device)
        with load.running(
            device, "--rw=randrw", "--bs=4k-64k", "--iodepth=8", "--time_based", "--runtime=6", "--verify=crc32c"
        ) as fio:
            bad.write_text("+0-32767")
            until(lambda: shown(device) == ["in sync", "out of sync"], "the leg is dropped")
            bad.write_text("-0-32767")
            wait_in_sync(device)
            status, output = load.result(fio)
        assert status == 0, output
        devices.remove(device)
        size = 16 * MIB - ROOM
        assert disk.read(first, 0, size) == disk.read(second, 0, size)


def test_both_legs_fail(devices: Devices, scratch: Path) -> None:
    with (
        kernel.null_block(scratch, "first", memory_backed="1", size="8", blocksize="4096") as first,
        kernel.null_block(scratch, "second", memory_backed="1", size="8", blocksize="4096") as second,
    ):
        device = devices.add("mirror", files=(first, second), create=True)
        wait_in_sync(device)
        disk.write(device.node, 0, disk.pattern(4096))
        for name in ("first", "second"):
            (scratch / f"{name}.config" / "nullb" / name / "badblocks").write_text("+8-15")
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            disk.write(device.node, 4096, bytes(4096))
        assert disk.read(device.node, 0, 4096) == disk.pattern(4096)
        devices.remove(device)


def test_only_what_was_dirty_is_copied_after_a_crash(devices: Devices, scratch: Path) -> None:
    files = legs(scratch)
    device = devices.add("mirror", files=files, recovery="queue")
    disk.write(device.node, 0, disk.pattern(8 * MIB // 16))
    disk.write(device.node, 9 * MIB, disk.pattern(4096))
    device.kill_daemon()
    marked = dirty(files[0])
    assert marked == [0, 9]
    for n, leg in enumerate(files):  # as if the crash had come between the two
        disk.write(leg, 9 * MIB, disk.pattern(4096, 10 + n))
        disk.write(leg, 12 * MIB, disk.pattern(4096, 20 + n))
    recover(device.id)
    assert disk.read(device.node, 9 * MIB, 4096) == disk.pattern(4096, 10)
    wait_in_sync(device)
    assert [disk.read(leg, 9 * MIB, 4096) for leg in files] == [disk.pattern(4096, 10)] * 2
    assert [disk.read(leg, 12 * MIB, 4096) for leg in files] == [disk.pattern(4096, 20), disk.pattern(4096, 21)]


def test_a_leg_that_missed_writes_is_never_read(devices: Devices, scratch: Path) -> None:
    """Whatever happens to daemons in between, until it is brought back."""
    files = legs(scratch)
    device = devices.add("mirror", files=files)
    disk.write(device.node, 0, disk.pattern(MIB, 1))
    devices.remove(device)
    gone = files[1].rename(scratch / "gone")
    with pytest.raises(UblkError, match="a leg of the mirror is missing"):
        devices.add("mirror", files=files)
    device = devices.add("mirror", files=files, degraded=True, recovery="queue")
    disk.write(device.node, 0, disk.pattern(MIB, 2))
    gone.rename(files[1])
    device.kill_daemon()
    recover(device.id)
    assert shown(device) == ["in sync", "out of sync"]
    assert disk.read(device.node, 0, MIB) == disk.pattern(MIB, 2)
    devices.remove(device)
    device = devices.add("mirror", files=tuple(reversed(files)))
    assert shown(device) == ["out of sync", "in sync"]
    assert disk.read(device.node, 0, MIB) == disk.pattern(MIB, 2)
    wait_in_sync(device)
    disk.write(files[0], 0, bytes(4096))  # it may be read now, and so is the other
    assert disk.read(device.node, 0, 128 * 1024)[64 * 1024 :] == disk.pattern(MIB, 2)[64 * 1024 : 128 * 1024]
    devices.remove(device)


def test_a_new_leg_in_the_place_of_one_that_is_gone(devices: Devices, scratch: Path) -> None:
    files = legs(scratch)
    device = devices.add("mirror", files=files)
    data = disk.pattern(4 * MIB)
    for at in range(0, len(data), MIB):
        disk.write(device.node, 2 * MIB + at, data[at : at + MIB])
    devices.remove(device)
    files[0].unlink()
    disk.image(files[0], 20 * MIB)
    device = devices.add("mirror", files=files, degraded=True)
    assert shown(device) == ["out of sync", "in sync"]
    wait_in_sync(device)
    devices.remove(device)
    assert data_of(files[0]) == data_of(files[1])
    device = devices.add("mirror", files=files)
    assert disk.read(device.node, 2 * MIB, MIB) == data[:MIB]


def test_the_command_brings_a_leg_back(devices: Devices, scratch: Path) -> None:
    files = legs(scratch)
    device = devices.add("mirror", files=files)
    devices.remove(device)
    files[1].unlink()
    disk.image(files[1], 16 * MIB + ROOM, b"something else")
    device = devices.add("mirror", files=files, degraded=True, create=True)
    done = program.ublk("resync", "-n", str(device.id))
    assert (done.status, done.out) == (0, ""), done.err
    assert shown(device) == ["in sync", "in sync"]
    assert "out of sync" not in program.ublk("list").out


def test_a_file_with_something_else_is_overwritten_by_force_alone(devices: Devices, scratch: Path) -> None:
    files = legs(scratch)
    device = devices.add("mirror", files=files)
    devices.remove(device)
    files[1].unlink()
    device = devices.add("mirror", files=files, degraded=True)
    disk.image(files[1], 16 * MIB + ROOM, b"something else")
    done = program.ublk("resync", "-n", str(device.id))
    assert (done.status, done.out) == (ExitCode.FAILED, "")
    assert f"{files[1]} is not blank, and no leg of this mirror" in done.err
    assert "out of sync" in program.ublk("list").out
    assert program.ublk("resync", "--force", "-n", str(device.id)).status == 0
    assert shown(device) == ["in sync", "in sync"]


@pytest.mark.any_kernel
def test_what_has_no_legs(devices: Devices) -> None:
    device = devices.null()
    done = program.ublk("resync", "-n", str(device.id))
    assert done.status == ExitCode.FAILED
    assert "a device of target null has no legs to bring back" in done.err


def test_a_copy_that_was_interrupted_is_not_taken_for_whole(devices: Devices, scratch: Path) -> None:
    """A new leg has no label of its own until it has everything."""
    files = legs(scratch, size=32 * MIB)
    device = devices.add("mirror", files=files)
    for at in range(0, 32 * MIB, MIB):
        disk.write(device.node, at, disk.pattern(MIB, at))
    devices.remove(device)
    files[1].unlink()
    disk.image(files[1], 32 * MIB + ROOM)
    device = devices.add("mirror", files=files, degraded=True, recovery="queue")
    ask(device.id, "resync", 20, force=False)
    until(lambda: ask(device.id, "progress", 20)["done"], "it has begun")
    device.kill_daemon()
    recover(device.id)  # which goes on with it
    until(lambda: shown(device) == ["in sync", "in sync"], "it is copied", 60)
    devices.remove(device)
    assert data_of(files[0], 32 * MIB) == data_of(files[1], 32 * MIB)


def test_an_upgrade_under_load(devices: Devices, scratch: Path) -> None:
    """The next daemon goes on where the last one was: nothing fails, and nothing is taken for more than it is."""
    files = legs(scratch)
    device = devices.add("mirror", files=files, recovery="reissue", queues=2)
    if not device.status().info.flags & Feature.QUIESCE:
        pytest.skip("this driver has no UBLK_F_QUIESCE (Linux 6.16)")
    fio = ("--rw=randrw", "--bs=4k-32k", "--iodepth=8", "--size=8M", "--verify=crc32c", "--time_based", "--runtime=8")
    with load.running(device, *fio) as job:
        for _ in range(2):
            before = device.pid
            upgrade(device.id)
            assert device.pid != before
        status, output = load.result(job)
    assert status == 0, output
    assert shown(device) == ["in sync", "in sync"]
    devices.remove(device)
    assert data_of(files[0]) == data_of(files[1])


@pytest.mark.any_kernel
def test_a_mirror_keeps_its_size(devices: Devices, scratch: Path) -> None:
    device = devices.add("mirror", files=legs(scratch))
    done = program.ublk("resize", "-n", str(device.id), "8M")
    assert done.status == ExitCode.FAILED
    assert "a device of target mirror keeps its size" in done.err


def faulty(devices: Devices, leg: Path, switch: Path, *ops: str) -> Path:
    """A drive over a leg that fails in these while the switch is there."""
    return devices.add("fault", file=leg, error_rate=1.0, ops=ops, while_file=switch).node


def test_a_leg_that_does_not_flush_is_dropped(devices: Devices, scratch: Path) -> None:
    files, switch = legs(scratch), scratch / "on"
    bad = faulty(devices, files[1], switch, "flush")
    device = devices.add("mirror", files=(files[0], bad), create=True)
    wait_in_sync(device)
    disk.write(device.node, 0, disk.pattern(4096))
    switch.touch()
    disk.flush(device.node)
    until(lambda: shown(device) == ["in sync", "out of sync"], "the leg is dropped")
    switch.unlink()
    wait_in_sync(device)


def test_one_of_two_legs_that_come_back_fails(devices: Devices, scratch: Path) -> None:
    """The other one is not taken for in sync either, before it has everything."""
    files, switch = legs(scratch, 3), scratch / "on"
    bad = faulty(devices, files[2], switch, "write", "flush")
    device = devices.add("mirror", files=(files[0], files[1], bad), create=True)
    wait_in_sync(device)
    devices.remove(device)
    files[1].rename(scratch / "gone")
    device = devices.add("mirror", files=(files[0], files[1], bad), degraded=True)
    switch.touch()
    data = disk.pattern(8 * MIB)
    for at in range(0, len(data), MIB):
        disk.write(device.node, at, data[at : at + MIB])
    until(lambda: shown(device) == ["in sync", "out of sync", "out of sync"], "the second one is dropped, too")
    (scratch / "gone").rename(files[1])
    with pytest.raises(UblkError, match=str(bad)):
        resync(device.id)
    assert shown(device)[0] == "in sync"
    assert shown(device)[2] == "out of sync"
    for at in range(0, len(data), MIB):
        assert disk.read(device.node, at, MIB) == data[at : at + MIB]
    switch.unlink()
    wait_in_sync(device)
    devices.remove(device)
    assert data_of(files[0]) == data_of(files[1]) == data_of(files[2])


@pytest.mark.timeout(400)
def test_fifty_crashes_under_load(devices: Devices, scratch: Path) -> None:
    """What was acknowledged is there after each; and after a resync both legs are alike."""
    files = legs(scratch)
    device = devices.add("mirror", files=files, recovery="reissue", queues=2)
    chance = random.Random(1)
    fio = [
        *("--rw=randwrite", "--bs=4k-32k", "--iodepth=8", "--size=12M", "--verify=crc32c", "--verify_fatal=1"),
        *("--time_based", "--runtime=400", "--verify_backlog=64"),
    ]
    with load.running(device, *fio) as job:
        for _ in range(50):
            time.sleep(chance.random() / 2)
            device.kill_daemon()
            recover(device.id)
            assert job.poll() is None, load.result(job)
    wait_in_sync(device)
    devices.remove(device)
    assert data_of(files[0]) == data_of(files[1])
    assert [dirty(file) for file in files] == [[], []]
