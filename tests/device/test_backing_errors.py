"""Backings that fail while they are in use: an error for the reader, never garbage, and a line in the log."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ublkpy.errors import UblkError

from . import disk, kernel
from .devices import MIB, Devices, until

KIB = 1024


@pytest.fixture
def small_disk(scratch: Path) -> Iterator[Path]:
    """A file system with room for 4 MiB."""
    with kernel.mounted("none", scratch / "small", "-t", "tmpfs", "-o", "size=4m") as point:
        yield point


@pytest.fixture
def devices(small_disk: Path) -> Iterator[Devices]:
    """As elsewhere, but gone before the small disk."""
    added = Devices()
    yield added
    added.close()


@pytest.mark.any_kernel
@pytest.mark.parametrize("direct", [None, False], ids=["direct", "buffered"])
def test_reads_behind_the_end_of_a_truncated_file_fail(devices: Devices, scratch: Path, direct: bool | None) -> None:
    data = disk.pattern(4 * MIB)
    file = disk.image(scratch / "image", 4 * MIB, data)
    device = devices.loop(file, direct=direct)
    os.truncate(file, MIB)
    for start, length in ((2 * MIB, 4 * KIB), (MIB, 512), (MIB - 4 * KIB, 8 * KIB)):
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            disk.read(device.node, start, length)
    assert disk.read(device.node, 0, MIB) == data[:MIB]


@pytest.mark.any_kernel
def test_a_truncated_file_grows_again_when_written(devices: Devices, scratch: Path) -> None:
    file = disk.image(scratch / "image", 4 * MIB, disk.pattern(4 * MIB))
    device = devices.loop(file)
    os.truncate(file, MIB)
    disk.write(device.node, 2 * MIB, b"back" * KIB)
    assert disk.read(device.node, 0, 2 * MIB + 4 * KIB) == disk.pattern(MIB) + bytes(MIB) + b"back" * KIB


@pytest.mark.any_kernel
@pytest.mark.logs
def test_a_full_disk_is_an_error_at_the_write_and_a_line_in_the_log(
    devices: Devices, small_disk: Path, scratch: Path
) -> None:
    file = disk.image(small_disk / "image", 16 * MIB, disk.pattern(MIB))
    log = scratch / "log"
    device = devices.loop(file, log=log)
    (small_disk / "filler").write_bytes(bytes(3 * MIB - 4 * KIB))
    before = log.read_text()
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        disk.write(device.node, 8 * MIB, disk.pattern(512 * KIB))
    assert caught.value.errno in (errno.ENOSPC, errno.EIO)
    until(lambda: log.read_text() != before, "the daemon has logged")
    assert re.search(
        rf"ublkb{device.id}\[{device.pid}\]: ERROR: queue 0: WRITE at sector {8 * MIB // 512} failed:"
        r" No space left on device \(1 failed so far\)",
        log.read_text(),
    ), log.read_text()
    assert disk.read(device.node, 0, MIB) == disk.pattern(MIB)
    (small_disk / "filler").unlink()
    disk.write(device.node, 8 * MIB, b"room" * KIB)
    assert disk.read(device.node, 8 * MIB, 4 * KIB) == b"room" * KIB


@pytest.mark.any_kernel
@pytest.mark.logs
def test_a_failing_disk_does_not_flood_the_log(devices: Devices, small_disk: Path, scratch: Path) -> None:
    file = disk.image(small_disk / "image", 16 * MIB)
    device = devices.loop(file, log=scratch / "log")
    (small_disk / "filler").write_bytes(bytes(4 * MIB - 4 * KIB))
    for n in range(40):
        with pytest.raises(OSError, match=r"\[Errno"):
            disk.write(device.node, 4 * MIB + n * 64 * KIB, bytes(64 * KIB))
    until(lambda: "(32 failed so far)" in (scratch / "log").read_text(), "the 32nd failure is logged")
    failures = [line for line in (scratch / "log").read_text().splitlines() if "failed:" in line]
    assert len(failures) == 6  # 1, 2, 4, 8, 16, 32


@pytest.mark.any_kernel
def test_a_sparse_image_on_a_full_disk_is_refused(devices: Devices, small_disk: Path) -> None:
    file = disk.image(small_disk / "image", 16 * MIB)
    (small_disk / "filler").write_bytes(bytes(4 * MIB))
    with pytest.raises(UblkError, match=f"the disk that holds {file} is full, and the image still needs 16M"):
        devices.loop(file)
    assert disk.read(devices.loop(file, read_only=True).node, 0, 4 * KIB) == bytes(4 * KIB)


@pytest.mark.any_kernel
def test_a_complete_image_on_a_full_disk_is_served(devices: Devices, small_disk: Path) -> None:
    file = disk.image(small_disk / "image", 4 * MIB, bytes(4 * MIB))
    disk.write(devices.loop(file).node, 0, b"here" * KIB)
    assert file.read_bytes()[: 4 * KIB] == b"here" * KIB


@pytest.mark.any_kernel
def test_a_sparse_image_on_a_nearly_full_disk_is_warned_about(
    devices: Devices, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    devices.loop(disk.image(small_disk / "image", 16 * MIB))
    assert "may need 16M more, but its disk has only 4M free" in caplog.text


@pytest.mark.parametrize("mode", ["auto", "user-copy"])
def test_bad_blocks_of_the_backing_are_bad_blocks_of_the_device(devices: Devices, scratch: Path, mode: str) -> None:
    settings = {"memory_backed": "1", "size": "8", "blocksize": "512", "badblocks": "+2048-2055"}
    with kernel.null_block(scratch, "bad", **settings) as node:
        device = devices.loop(node, mode=mode)
        disk.write(device.node, 0, disk.pattern(MIB))
        assert disk.read(device.node, 0, MIB) == disk.pattern(MIB)
        for start, length in ((MIB, 512), (MIB - 4 * KIB, 8 * KIB)):
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                disk.read(device.node, start, length)
        assert disk.read(device.node, 2 * MIB, 4 * KIB) == bytes(4 * KIB)
        devices.remove(device)
