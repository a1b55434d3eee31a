"""Parameters of a device: what was asked for is what the kernel has."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ublkpy.driver import inspect
from ublkpy.driver.ctrl import AUTO_ID, Control
from ublkpy.errors import ExitCode, NoDeviceError, UblkError
from ublkpy.life.recover import recover
from ublkpy.uring.uapi import Attr, DevInfo, Feature, Params

from . import disk, kernel, load, program
from .devices import MIB, Device, Devices, until

KIB = 1024
SHAPE: dict[str, Any] = {
    "logical_block_size": 4 * KIB,
    "physical_block_size": 8 * KIB,
    "io_min": 16 * KIB,
    "io_opt": 64 * KIB,
    "max_sectors": 256,
    "rotational": True,
    "discard_granularity": 32 * KIB,
    "max_discard_bytes": MIB,
    "max_write_zeroes_bytes": 2 * MIB,
}
QUEUE = {
    "logical_block_size": 4 * KIB,
    "physical_block_size": 8 * KIB,
    "minimum_io_size": 16 * KIB,
    "optimal_io_size": 64 * KIB,
    "max_hw_sectors_kb": 128,
    "rotational": 1,
    "discard_granularity": 32 * KIB,
    "discard_max_bytes": MIB,
    "write_zeroes_max_bytes": 2 * MIB,
    "fua": 1,
}
_BLKRRPART = 0x125F


def queue(device: Device) -> dict[str, int]:
    return {name: int(device.queue(name)) for name in QUEUE}


def params(device: Device) -> dict[str, dict[str, int]]:
    """What the command prints for programs."""
    done = program.ublk("params", "-n", str(device.id), "--json")
    assert (done.status, done.err) == (0, "")
    shown = json.loads(done.out)
    assert (shown["version"], shown["id"]) == (1, device.id)
    found: dict[str, dict[str, int]] = shown["params"]
    return found


@pytest.fixture
def no_part_scan() -> None:
    if Feature.NO_AUTO_PART_SCAN not in inspect.features():
        pytest.skip("this driver has no UBLK_F_NO_AUTO_PART_SCAN (Linux 7.0)")


# -- what was asked for ----------------------------------------------------------------------


def test_the_disk_is_as_it_was_asked_for(devices: Devices, scratch: Path) -> None:
    """In sysfs and in the driver; before a recovery and after; and it holds data."""
    file = disk.image(scratch / "image", 8 * MIB)
    device = devices.loop(file, recovery="queue", **SHAPE)
    assert queue(device) == QUEUE
    before = params(device)
    number = device.node.stat().st_rdev
    assert before["basic"] == {
        "attrs": Attr.ROTATIONAL | Attr.VOLATILE_CACHE | Attr.FUA,
        "logical_bs_shift": 12,
        "physical_bs_shift": 13,
        "io_min_shift": 14,
        "io_opt_shift": 16,
        "max_sectors": 256,
        "chunk_sectors": 0,
        "dev_sectors": 8 * MIB // 512,
        "virt_boundary_mask": 0,
    }
    assert before["discard"] == {
        "discard_alignment": 0,
        "discard_granularity": 32 * KIB,
        "max_discard_sectors": MIB // 512,
        "max_write_zeroes_sectors": 2 * MIB // 512,
        "max_discard_segments": 1,
    }
    assert (before["devt"]["disk_major"], before["devt"]["disk_minor"]) == (os.major(number), os.minor(number))
    assert set(before) <= {"basic", "discard", "devt", "dma"}
    device.kill_daemon()
    recover(device.id)
    assert (queue(device), params(device)) == (QUEUE, before)
    data = disk.pattern(4 * MIB)
    disk.write(device.node, 4 * KIB, data)
    assert disk.read(device.node, 4 * KIB, 4 * MIB) == data == file.read_bytes()[4 * KIB :][: 4 * MIB]
    disk.discard(device.node, 0, 8 * MIB)
    assert (disk.allocated(file), device.settled("discards")) == (0, 8)
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        disk.read(device.node, 512, 512)


def test_the_command_line(devices: Devices) -> None:
    """And the table that the command prints."""
    options = "--logical-block-size 1k --io_opt 128k --no-write-cache --max_discard_bytes 0 --max-sectors 64"
    added = program.ublk("add", "-t", "null", *options.split())
    assert (added.status, added.err) == (0, "")
    device = devices.adopt(0)
    assert (device.queue("write_cache"), device.queue("fua")) == ("write through", "0")
    assert (device.queue("discard_max_bytes"), device.queue("discard_granularity")) == ("0", "0")
    assert int(device.queue("write_zeroes_max_bytes")) == 4 * 1024**3 - 1024
    shown = program.ublk("params", "-n", "0")
    assert (shown.status, shown.err) == (0, "")
    lines = [line.split() for line in shown.out.splitlines()]
    assert lines[0] == ["PARAMETER", "VALUE", "MEANING"]
    for line in (
        ["basic.attrs", "0"],
        ["basic.logical_bs_shift", "10", "1K"],
        ["basic.io_opt_shift", "17", "128K"],
        ["basic.max_sectors", "64", "32K"],
        ["basic.dev_sectors", "524288000", "250G"],
        ["discard.max_discard_sectors", "0", "0B"],
    ):
        assert line in lines


# -- refusals --------------------------------------------------------------------------------


@pytest.mark.any_kernel
def test_what_the_backing_cannot(devices: Devices, scratch: Path) -> None:
    lower = devices.null(logical_block_size=4 * KIB)
    for options, status, message in (
        ("--logical_block_size 512", ExitCode.FAILED, "logical_block_size 512 is less than the 4096 bytes"),
        ("--discard_granularity 4k --physical_block_size 16k", ExitCode.USAGE, "not a multiple of 16384"),
        ("--size 8M --logical_block_size 4k --max_discard_bytes 512", ExitCode.USAGE, "not a multiple of the logical"),
        ("--max_sectors 4096", ExitCode.USAGE, "max_sectors 4096 is more than the 1024"),
    ):
        done = program.ublk("add", "-t", "loop", "-f", str(lower.node), *options.split())
        assert (done.status, done.out) == (status, "")
        assert message in done.err
        assert "hint: " in done.err
    assert inspect.device_ids() == [lower.id]


# -- read-only -------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["loop", "null"])
def test_a_read_only_disk(devices: Devices, scratch: Path, target: str) -> None:
    data = disk.pattern(MIB)
    file = disk.image(scratch / "image", MIB, data)
    file.chmod(0o400)
    device = devices.loop(file, read_only=True) if target == "loop" else devices.null(read_only=True)
    assert params(device)["basic"]["attrs"] == Attr.READ_ONLY
    assert "discard" not in params(device)
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        disk.write(device.node, 0, bytes(4 * KIB))
    assert caught.value.errno in (errno.EPERM, errno.EROFS, errno.EACCES)
    if target == "loop":
        assert disk.read(device.node, 0, MIB) == data == file.read_bytes()


# -- without a write cache -------------------------------------------------------------------


def test_without_a_write_cache_each_write_is_durable_when_it_is_done(devices: Devices, scratch: Path) -> None:
    """The disk below gets it with FUA, or a flush behind it, though nobody asks the one above."""
    file = disk.image(scratch / "image", 4 * MIB)
    lower = devices.loop(file)
    zero_copy = "zero-copy" if Feature.SUPPORT_ZERO_COPY in inspect.features() else "user-copy"
    for options, durable in (
        ({"write_cache": True}, False),
        ({"write_cache": False, "mode": "copy"}, True),
        ({"write_cache": False, "mode": "copy", "direct": False}, True),
        ({"write_cache": False, "mode": zero_copy}, True),
    ):
        upper = devices.loop(lower.node, **options)
        flushes = lower.completed("flushes")
        data = disk.pattern(64 * KIB)
        with kernel.traced("block/block_rq_issue") as lines:
            disk.write(upper.node, MIB, data)
        below = writes_to(lower, lines)
        assert below
        arrived = all("F" in flags.partition("W")[2] for flags in below) or lower.completed("flushes") > flushes
        assert arrived is durable, (options, below)
        assert upper.settled("flushes") == 0
        assert file.read_bytes()[MIB : MIB + len(data)] == data
        if durable:
            assert (upper.queue("write_cache"), upper.queue("write_zeroes_max_bytes")) == ("write through", "0")
            disk.zero_allocated(upper.node, MIB, 64 * KIB)
            assert file.read_bytes() == bytes(4 * MIB)
        devices.remove(upper)


def writes_to(device: Device, lines: list[str]) -> list[str]:
    """The flags of the writes that a trace shows: "W" and, behind it, "F" for FUA and "S" for a synchronous one.

    259,0 WFS 4096 () 0 + 8 ...
    """
    number = device.node.stat().st_rdev
    issued = [line.partition("block_rq_issue: ")[2].split() for line in lines]
    mine = [words[1] for words in issued if words and words[0] == f"{os.major(number)},{os.minor(number)}"]
    return [flags for flags in mine if "W" in flags]


# -- partitions ------------------------------------------------------------------------------


def partitioned(path: Path) -> Path:
    """An image of 8 MiB with an MBR that has one partition, from 1 MiB to 3 MiB."""
    entry = struct.pack("<8B2I", 0, 0, 2, 0, 0x83, 0, 0, 0, MIB // 512, 2 * MIB // 512)
    return disk.image(path, 8 * MIB, bytes(446) + entry + bytes(48) + b"\x55\xaa")


def partition(device: Device) -> Path:
    return device.sysfs / f"{device.node.name}p1"


def scan(device: Device) -> None:
    """Look for partitions now, as blockdev --rereadpt does."""
    fd = os.open(device.node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _BLKRRPART)
    finally:
        os.close(fd)


def test_partitions_are_looked_for(devices: Devices, scratch: Path) -> None:
    device = devices.loop(partitioned(scratch / "image"))
    until(lambda: partition(device).exists(), "the partition appears")
    assert (partition(device) / "start").read_text().strip() == str(MIB // 512)


def test_partitions_are_not_looked_for(devices: Devices, scratch: Path, no_part_scan: None) -> None:
    done = program.ublk("add", "-t", "loop", "-f", str(partitioned(scratch / "image")), "--no-part-scan", "-r", "1")
    assert (done.status, done.err) == (0, "")
    device = devices.adopt(0)
    assert Feature.NO_AUTO_PART_SCAN in device.status().info.flags
    assert device.settled("reads") == 0, "who scans reads"
    assert not partition(device).exists()
    device.kill_daemon()
    recover(device.id)
    assert not partition(device).exists()
    scan(device)
    until(lambda: partition(device).exists(), "the partition appears when it is looked for")


def test_partitions_of_a_target_without_data(devices: Devices, no_part_scan: None) -> None:
    for said, flag in (({}, True), ({"part_scan": True}, False)):
        assert (Feature.NO_AUTO_PART_SCAN in devices.null(**said).status().info.flags) is flag


def test_a_driver_that_always_looks_for_partitions() -> None:
    if Feature.NO_AUTO_PART_SCAN in inspect.features():
        pytest.skip("this driver need not")
    done = program.ublk("add", "-t", "null", "--no-part-scan")
    assert (done.status, done.out, inspect.device_ids()) == (ExitCode.FAILED, "", [])
    assert "lacks UBLK_F_NO_AUTO_PART_SCAN, which --no-part-scan needs" in done.err


# -- metadata --------------------------------------------------------------------------------


def test_metadata_belongs_to_larger_blocks(devices: Devices, scratch: Path) -> None:
    if Feature.INTEGRITY not in inspect.features():
        pytest.skip("this driver has no metadata")
    metadata = scratch / "metadata"
    metadata.write_bytes(b"\xff" * (4 * MIB // 4096 * 8))
    file = disk.image(scratch / "image", 4 * MIB)
    device = devices.loop(
        file, metadata=metadata, metadata_size=8, csum_type="t10dif", logical_block_size=4096, recovery="queue"
    )
    assert (device.sysfs / "integrity" / "protection_interval_bytes").read_text().strip() == "4096"
    found = params(device)["integrity"]
    assert (found["interval_exp"], found["metadata_size"], found["csum_type"]) == (12, 8, 2)
    data = disk.pattern(MIB)
    disk.write(device.node, MIB, data)
    device.kill_daemon()
    recover(device.id)
    assert disk.read(device.node, MIB, MIB) == data
    assert params(device)["integrity"] == found


# -- the command -----------------------------------------------------------------------------


@contextmanager
def foreign() -> Iterator[int]:
    """A device of another server, not yet started."""
    with Control() as control:
        info = control.add(DevInfo(AUTO_ID, 1, 4, 65536, Feature(0)))
        try:
            control.set_params(info.dev_id, Params(MIB, 65536, Attr.ROTATIONAL, discard_granularity=512))
            yield info.dev_id
        finally:
            control.delete(info.dev_id, 15.0)


def test_parameters_of_another_server() -> None:
    with foreign() as dev_id:
        found = params(Device(dev_id))
        assert (found["basic"]["attrs"], found["basic"]["dev_sectors"]) == (Attr.ROTATIONAL, MIB // 512)
        assert found["discard"]["discard_granularity"] == 512
        assert (found["devt"]["disk_major"], found["devt"]["disk_minor"]) == (0, 0)
        assert set(found) == {"basic", "discard", "devt"}


@pytest.mark.any_kernel
def test_parameters_of_no_device() -> None:
    done = program.ublk("params", "-n", "5")
    assert (done.status, done.out) == (ExitCode.NO_DEVICE, "")
    with pytest.raises(NoDeviceError):
        inspect.params(5)


@pytest.mark.logs
def test_parameters_of_a_device_that_is_being_stopped(
    devices: Devices, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If its daemon does not answer, the driver tells nothing, and the command says so in time."""
    monkeypatch.setattr(inspect, "_PARAMS_DEADLINE", 1.5)
    device = devices.loop(disk.image(scratch / "image", 8 * MIB))
    pid = device.pid
    with load.running(device, "--rw=randread", "--bs=4k", "--iodepth=16", "--time_based", "--runtime=60") as fio:
        os.kill(pid, signal.SIGSTOP)
        assert params(device), "nothing holds it yet"
        with program.running("del", "-n", str(device.id), "--force") as deletion:
            try:
                until(lambda: told(device) is None, "the stop holds the device", 40)
                done = program.ublk("params", "-n", str(device.id))
                assert (done.status, done.out) == (ExitCode.FAILED, "")
                assert "another command holds it" in done.err
            finally:
                os.kill(pid, signal.SIGCONT)
            fio.kill()  # as long as it has the disk open, the id is not free
            assert deletion.result(25).status == 0


def told(device: Device) -> object:
    try:
        return inspect.params(device.id)
    except UblkError:
        return None
