"""Several files behind a device: where its bytes go, and how."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from . import disk, kernel
from .devices import MIB, Devices

KIB = 1024


@pytest.fixture
def drives(scratch: Path) -> Iterator[list[Path]]:
    """Three block devices with memory behind them, which take a moment for each request."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                kernel.null_block(
                    scratch, f"leg{n}", memory_backed="1", size="16", blocksize="4096", discard="1", irqmode="2"
                )
            )
            for n in range(3)
        ]


def striped(data: bytes, legs: int, chunk: int) -> list[bytes]:
    """What is in each file of a stripe."""
    chunks = [data[at : at + chunk] for at in range(0, len(data), chunk)]
    return [b"".join(chunks[leg::legs]) for leg in range(legs)]


@pytest.mark.parametrize("chunk", [4 * KIB, 64 * KIB])
def test_chunks_of_a_stripe_in_turns(devices: Devices, scratch: Path, mode: str, chunk: int) -> None:
    files = [disk.image(scratch / f"image{n}", MIB + 5 * KIB) for n in range(3)]
    device = devices.add("stripe", files=tuple(files), chunk=chunk, mode=mode)
    data = disk.pattern(3 * MIB)
    for at in range(0, len(data), 384 * KIB):
        disk.write(device.node, at, data[at : at + 384 * KIB])
    assert int(device.queue("../size")) * 512 == 3 * ((MIB + 5 * KIB) // chunk * chunk)
    for file, expected in zip(files, striped(data, 3, chunk), strict=True):
        assert file.read_bytes()[:MIB] == expected
    assert disk.read(device.node, 100 * KIB, 300 * KIB) == data[100 * KIB : 400 * KIB]


def test_a_stripe_of_block_devices(devices: Devices, drives: list[Path], mode: str) -> None:
    device = devices.add("stripe", files=tuple(drives), chunk=64 * KIB, mode=mode)
    assert device.queue("minimum_io_size") == str(64 * KIB)
    data = disk.pattern(2 * MIB)
    for at in range(0, len(data), 512 * KIB):
        disk.write(device.node, 4 * KIB + at, data[at : at + 512 * KIB])
    for at in range(0, len(data), 256 * KIB):
        assert disk.read(device.node, 4 * KIB + at, 256 * KIB) == data[at : at + 256 * KIB]
    disk.flush(device.node)


def test_a_discard_of_a_stripe_is_one_for_each_file(devices: Devices, drives: list[Path]) -> None:
    device = devices.add("stripe", files=tuple(drives), chunk=4 * KIB)
    data = disk.pattern(6 * MIB)
    for at in range(0, len(data), MIB):
        disk.write(device.node, at, data[at : at + MIB])

    def discards() -> list[int]:
        return [int(Path(f"/sys/block/{drive.name}/stat").read_text().split()[11]) for drive in drives]

    before = discards()
    disk.discard(device.node, MIB, 4 * MIB)
    assert [now - then for now, then in zip(discards(), before, strict=True)] == [1, 1, 1]
    assert disk.read(device.node, 0, MIB) == data[:MIB]
    assert disk.read(device.node, MIB, MIB) == bytes(MIB)
    assert disk.read(device.node, 4 * MIB, MIB) == bytes(MIB)
    assert disk.read(device.node, 5 * MIB, MIB) == data[5 * MIB :]


def test_a_small_discard_touches_no_other_file(devices: Devices, scratch: Path) -> None:
    files = tuple(disk.image(scratch / f"image{n}", MIB, disk.pattern(MIB, n)) for n in range(2))
    device = devices.add("stripe", files=files, chunk=64 * KIB)
    before = [disk.allocated(file) for file in files]
    disk.discard(device.node, 64 * KIB, 64 * KIB)
    assert [then - disk.allocated(file) for then, file in zip(before, files, strict=True)] == [0, 64 * KIB]
    disk.zero_unmapped(device.node, 0, 256 * KIB)
    assert disk.read(device.node, 0, 256 * KIB) == bytes(256 * KIB)
    assert disk.read(device.node, 256 * KIB, 4 * KIB) == disk.pattern(MIB, 0)[128 * KIB : 132 * KIB]


def test_one_drive_that_fails(devices: Devices, scratch: Path) -> None:
    with (
        kernel.null_block(scratch, "good", memory_backed="1", size="8", blocksize="4096") as good,
        kernel.null_block(scratch, "bad", memory_backed="1", size="8", blocksize="4096", badblocks="+0-7") as bad,
    ):
        device = devices.add("stripe", files=(good, bad), chunk=64 * KIB)
        disk.write(device.node, 0, bytes(64 * KIB))
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            disk.write(device.node, 0, bytes(128 * KIB))
        devices.remove(device)


def test_files_one_after_the_other(devices: Devices, scratch: Path, mode: str) -> None:
    sizes = (MIB, 256 * KIB, 2 * MIB)
    files = [disk.image(scratch / f"image{n}", size) for n, size in enumerate(sizes)]
    device = devices.add("concat", files=tuple(files), mode=mode)
    data = disk.pattern(sum(sizes))
    for at in range(0, len(data), 416 * KIB):
        disk.write(device.node, at, data[at : at + 416 * KIB])
    assert b"".join(file.read_bytes() for file in files) == data
    assert disk.read(device.node, 900 * KIB, 500 * KIB) == data[900 * KIB : 1400 * KIB]
