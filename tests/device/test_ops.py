"""Operations besides plain reads and writes, and what the block device says of itself."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from . import disk, kernel
from .devices import MIB, Device, Devices, held_open

KIB = 1024
WHOLE = disk.pattern(4 * MIB)


@pytest.fixture
def file(scratch: Path) -> Path:
    """A fully allocated image."""
    return disk.image(scratch / "image", 4 * MIB, WHOLE)


@pytest.fixture
def loop(devices: Devices, file: Path) -> Device:
    return devices.loop(file)


def with_zeroes(start: int, end: int) -> bytes:
    return WHOLE[:start] + bytes(end - start) + WHOLE[end:]


# -- holes and zeroes in a file --------------------------------------------------------------


def test_discard_makes_a_hole(loop: Device, file: Path) -> None:
    disk.discard(loop.node, MIB, 2 * MIB)
    assert disk.allocated(file) == 2 * MIB
    assert file.read_bytes() == with_zeroes(MIB, 3 * MIB)
    assert disk.read(loop.node, 0, 4 * MIB) == with_zeroes(MIB, 3 * MIB)


def test_discard_leaves_its_neighbours_alone(loop: Device, file: Path) -> None:
    disk.discard(loop.node, MIB + 512, 8 * KIB)
    found = file.read_bytes()
    assert found[: MIB + 512] == WHOLE[: MIB + 512]
    assert found[MIB + 512 + 8 * KIB :] == WHOLE[MIB + 512 + 8 * KIB :]


def test_zeroes_that_may_be_unmapped_make_a_hole(loop: Device, file: Path) -> None:
    disk.zero_unmapped(loop.node, MIB, 2 * MIB)
    assert disk.allocated(file) == 2 * MIB
    assert file.read_bytes() == with_zeroes(MIB, 3 * MIB)


def test_zeroes_that_may_not_be_unmapped_stay_allocated(loop: Device, file: Path) -> None:
    disk.zero_allocated(loop.node, MIB, 2 * MIB)
    assert disk.allocated(file) == 4 * MIB
    assert file.read_bytes() == with_zeroes(MIB, 3 * MIB)


def test_zeroes_without_unmap_allocate_a_hole(devices: Devices, scratch: Path) -> None:
    file = disk.image(scratch / "image", 4 * MIB)
    device = devices.loop(file)
    disk.zero_allocated(device.node, MIB, MIB)
    assert disk.allocated(file) == MIB


def test_zeroes_of_single_sectors(loop: Device, file: Path) -> None:
    disk.zero_allocated(loop.node, MIB + 512, 512)
    disk.zero_unmapped(loop.node, 2 * MIB, 4 * KIB)
    assert (
        file.read_bytes() == with_zeroes(MIB + 512, MIB + 1024)[: 2 * MIB] + bytes(4 * KIB) + WHOLE[2 * MIB + 4 * KIB :]
    )


def test_a_request_without_data_is_not_limited_by_the_buffer(devices: Devices, file: Path) -> None:
    device = devices.loop(file, max_io_buf_bytes=4 * KIB)
    disk.discard(device.node, 0, 2 * MIB)
    assert device.settled("discards") == 1
    assert file.read_bytes() == with_zeroes(0, 2 * MIB)


def test_operations_respect_the_offset(devices: Devices, file: Path) -> None:
    device = devices.loop(file, offset=1 * MIB, size=2 * MIB)
    disk.discard(device.node, 0, MIB)
    assert file.read_bytes() == with_zeroes(MIB, 2 * MIB)
    disk.zero_allocated(device.node, MIB, MIB)
    assert file.read_bytes() == with_zeroes(MIB, 3 * MIB)


def test_zeroes_stay_allocated_on_ext4(devices: Devices, scratch: Path) -> None:
    """ext4, unlike tmpfs, can write zeroes by itself (FALLOC_FL_ZERO_RANGE)."""
    lower = devices.loop(disk.image(scratch / "lower", 32 * MIB))
    kernel.run("mkfs.ext4", "-q", "-F", lower.node)
    with kernel.mounted(lower.node, scratch / "mnt") as point:
        file = disk.image(point / "image", 4 * MIB, WHOLE)
        os.sync()
        device = devices.loop(file)
        before = disk.allocated(file)
        disk.zero_allocated(device.node, MIB, 2 * MIB)
        assert disk.allocated(file) == before
        disk.zero_unmapped(device.node, 0, MIB)
        assert disk.allocated(file) == before - MIB
        assert disk.read(device.node, 0, 4 * MIB) == bytes(3 * MIB) + WHOLE[3 * MIB :]
        devices.remove(device)


def test_a_file_system_without_holes_offers_no_discard(devices: Devices, scratch: Path) -> None:
    with kernel.mounted("none", scratch / "ramfs", "-t", "ramfs") as point:
        device = devices.loop(disk.image(point / "image", MIB, WHOLE[:MIB]))
        assert device.queue("discard_max_bytes") == "0"
        assert device.queue("write_zeroes_max_bytes") == "0"
        with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
            disk.discard(device.node, 0, MIB)
        disk.zero_allocated(device.node, 0, 64 * KIB)  # the kernel writes them itself
        assert disk.read(device.node, 0, MIB) == bytes(64 * KIB) + WHOLE[64 * KIB : MIB]
        devices.remove(device)


# -- flush and FUA ---------------------------------------------------------------------------


def test_fsync_reaches_the_backing(devices: Devices, file: Path) -> None:
    lower = devices.loop(file)
    upper = devices.loop(lower.node)
    before = lower.settled("flushes")
    disk.flush(upper.node)
    assert upper.settled("flushes") == 1
    assert lower.settled("flushes") == before + 1


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC], ids=["O_SYNC", "O_DSYNC"])
def test_a_synchronous_write_arrives(loop: Device, file: Path, flag: int) -> None:
    data = disk.pattern(64 * KIB, seed=1)
    disk.write(loop.node, MIB, data, flag)
    assert file.read_bytes()[MIB : MIB + 64 * KIB] == data


def test_fua_is_passed_to_the_backing(devices: Devices, file: Path) -> None:
    lower = devices.loop(file)
    upper = devices.loop(lower.node)
    with kernel.traced("block/block_rq_issue") as lines:
        disk.write(upper.node, 0, bytes(4 * KIB), os.O_DSYNC)
    number = lower.node.stat().st_rdev
    # 259,0 WFS 4096 () 0 + 8 ...: a write with FUA
    issued = [line.partition("block_rq_issue: ")[2].split() for line in lines]
    below = [words for words in issued if words and words[0] == f"{os.major(number)},{os.minor(number)}"]
    assert any("F" in words[1].partition("W")[2] for words in below if "W" in words[1]), below


# -- what sysfs says -------------------------------------------------------------------------


def limits(device: Device) -> dict[str, str]:
    names = ["write_cache", "fua", "logical_block_size", "physical_block_size", "minimum_io_size", "optimal_io_size"]
    names += ["max_hw_sectors_kb", "discard_granularity", "discard_max_bytes", "write_zeroes_max_bytes", "rotational"]
    found = {name: device.queue(name) for name in names}
    found["ro"] = (device.sysfs / "ro").read_text().strip()
    found["mq"] = " ".join(sorted(path.name for path in (device.sysfs / "mq").iterdir()))
    return found


def test_limits_of_a_loop_device_over_a_file(devices: Devices, file: Path) -> None:
    assert limits(devices.loop(file, queues=2)) == {
        "write_cache": "write back",
        "fua": "1",
        "logical_block_size": "512",
        "physical_block_size": "4096",
        "minimum_io_size": "4096",
        "optimal_io_size": "4096",
        "max_hw_sectors_kb": "512",
        "discard_granularity": "4096",
        "discard_max_bytes": str(4 * 1024**3 - 512),
        "write_zeroes_max_bytes": str(4 * 1024**3 - 512),
        "rotational": "0",
        "ro": "0",
        "mq": "0 1",
    }


def test_limits_of_a_null_device(devices: Devices) -> None:
    found = limits(devices.null(max_io_buf_bytes=64 * KIB))
    assert found["max_hw_sectors_kb"] == "64"
    assert (found["write_cache"], found["fua"]) == ("write back", "1")
    assert (found["discard_granularity"], found["discard_max_bytes"]) == ("4096", str(4 * 1024**3 - 512))
    assert (found["ro"], found["mq"]) == ("0", "0")


def test_limits_of_a_read_only_device(devices: Devices, file: Path) -> None:
    found = limits(devices.loop(file, read_only=True))
    assert (found["ro"], found["write_cache"]) == ("1", "write through")
    assert (found["discard_max_bytes"], found["write_zeroes_max_bytes"]) == ("0", "0")


# -- read-only -------------------------------------------------------------------------------


def test_a_read_only_device_is_read(devices: Devices, file: Path) -> None:
    assert disk.read(devices.loop(file, read_only=True).node, 0, 4 * MIB) == WHOLE


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda node: disk.write(node, 0, bytes(4 * KIB)), id="write"),
        pytest.param(lambda node: disk.discard(node, 0, 4 * KIB), id="discard"),
        pytest.param(lambda node: disk.zero_allocated(node, 0, 4 * KIB), id="zero"),
    ],
)
def test_a_read_only_device_refuses_changes(devices: Devices, file: Path, change: Callable[[Path], None]) -> None:
    device = devices.loop(file, read_only=True)
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        change(device.node)
    assert caught.value.errno in (errno.EPERM, errno.EROFS, errno.EACCES, errno.EOPNOTSUPP)
    assert file.read_bytes() == WHOLE


# -- over block devices ----------------------------------------------------------------------


def exercise(upper: Path, file: Path) -> None:
    """Every operation through a device whose bytes end up at the start of ``file``, which holds WHOLE."""
    assert disk.read(upper, 0, 4 * MIB) == WHOLE
    data = disk.pattern(256 * KIB, seed=2)
    disk.write(upper, 512 * KIB, data)
    disk.flush(upper)
    expected = bytearray(WHOLE)
    expected[512 * KIB : 768 * KIB] = data
    assert file.read_bytes() == expected
    disk.discard(upper, MIB, MIB)
    expected[MIB : 2 * MIB] = bytes(MIB)
    assert file.read_bytes() == expected
    assert disk.allocated(file) == 3 * MIB
    disk.zero_unmapped(upper, 2 * MIB, 512 * KIB)
    disk.zero_allocated(upper, 3 * MIB, 512 * KIB)
    expected[2 * MIB : 2 * MIB + 512 * KIB] = bytes(512 * KIB)
    expected[3 * MIB : 3 * MIB + 512 * KIB] = bytes(512 * KIB)
    assert file.read_bytes() == expected
    assert disk.read(upper, 0, 4 * MIB) == expected


def test_over_another_ublk_device(devices: Devices, loop: Device, file: Path) -> None:
    exercise(devices.loop(loop.node).node, file)


def test_over_a_kernel_loop_device(devices: Devices, file: Path) -> None:
    with kernel.kernel_loop(file, "--direct-io=on") as node:
        device = devices.loop(node)
        exercise(device.node, file)
        devices.remove(device)


def test_block_sizes_are_those_of_the_backing(devices: Devices, file: Path) -> None:
    with kernel.kernel_loop(file, "--sector-size=4096") as node:
        device = devices.loop(node)
        found = limits(device)
        assert (found["logical_block_size"], found["physical_block_size"]) == ("4096", "4096")
        with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
            disk.read(device.node, 512, 512)
        exercise(device.node, file)
        devices.remove(device)


def test_over_a_part_of_a_block_device(devices: Devices, loop: Device, file: Path) -> None:
    upper = devices.loop(loop.node, offset=1 * MIB, size=2 * MIB)
    disk.discard(upper.node, 0, MIB)
    disk.zero_allocated(upper.node, MIB, 4 * KIB)
    assert file.read_bytes() == with_zeroes(MIB, 2 * MIB + 4 * KIB)


def test_buffered_over_a_block_device(devices: Devices, loop: Device, file: Path) -> None:
    upper = devices.loop(loop.node, direct=False)
    data = disk.pattern(64 * KIB, seed=3)
    disk.write(upper.node, MIB, data)
    disk.flush(upper.node)
    assert file.read_bytes()[MIB : MIB + 64 * KIB] == data


def test_a_block_device_is_held_exclusively(devices: Devices, loop: Device) -> None:
    devices.loop(loop.node)
    with pytest.raises(OSError, match=os.strerror(errno.EBUSY)), held_open(loop.node, os.O_RDWR | os.O_EXCL):
        pass
