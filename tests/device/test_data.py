"""Bytes that go in come out again, in the right place."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from . import disk, load
from .devices import MIB, Devices, held_open

KIB = 1024

SHAPES = [
    pytest.param(1, 1, 512 * KIB, id="one-request-at-a-time"),
    pytest.param(2, 1, 4 * KIB, id="two-queues-of-one-small-request"),
    pytest.param(1, 128, 4 * KIB, id="small-requests"),
    pytest.param(2, 128, 1 * MIB, id="two-queues-of-large-requests"),
    pytest.param(1, 4096, 1 * MIB, id="deepest-queue-of-large-requests"),
    pytest.param(2, 4096, 512 * KIB, id="two-deepest-queues"),
]


@pytest.mark.parametrize(("queues", "depth", "buf"), SHAPES)
def test_loop_keeps_what_fio_writes(devices: Devices, scratch: Path, queues: int, depth: int, buf: int) -> None:
    file = disk.image(scratch / "image", 8 * MIB)
    device = devices.loop(file, queues=queues, depth=depth, max_io_buf_bytes=buf)
    load.verify(
        device.node,
        "--ioengine=libaio",
        "--iodepth=32",
        "--rw=randrw",
        "--rwmixwrite=70",
        "--bssplit=4k/40:8k/20:12k/10:64k/20:1m/10",
        # one job on each CPU, so that each queue gets requests
        f"--numjobs={queues}",
        f"--size={8 // queues}m",
        f"--offset_increment={8 // queues}m",
        "--cpus_allowed_policy=split",
        "--cpus_allowed=0-1",
    )
    found = disk.read(device.node, 0, 8 * MIB)
    assert found == file.read_bytes()
    assert sum(any(found[start : start + 4096]) for start in range(0, 8 * MIB, 4096)) > 500, "fio wrote too little"


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_loop_serves_a_part_of_a_file(devices: Devices, scratch: Path, direct: bool) -> None:
    before = disk.pattern(8 * MIB)
    file = disk.image(scratch / "image", 8 * MIB, before)
    device = devices.loop(file, offset=1 * MIB, size=4 * MIB, direct=direct)
    assert disk.read(device.node, 0, 4 * MIB) == before[MIB : 5 * MIB]
    load.verify(device.node, "--ioengine=psync", "--rw=randwrite", "--bsrange=512-64k", "--bs_unaligned=0", "--size=4m")
    after = file.read_bytes()
    assert disk.read(device.node, 0, 4 * MIB) == after[MIB : 5 * MIB]
    assert after[MIB : 5 * MIB] != before[MIB : 5 * MIB]
    assert after[:MIB] == before[:MIB]
    assert after[5 * MIB :] == before[5 * MIB :]


@pytest.mark.parametrize("direct", [None, False], ids=["direct", "buffered"])
def test_loop_bypasses_the_page_cache_where_it_can(devices: Devices, scratch: Path, direct: bool | None) -> None:
    device = devices.loop(disk.image(scratch / "image", MIB), direct=direct)
    known = device.status().known
    assert known
    assert known.target["direct_io"] == (direct is None)
    assert bool(_flags(device.pid, scratch / "image") & os.O_DIRECT) == (direct is None)


def test_buffered_writes_arrive_when_synced(devices: Devices, scratch: Path) -> None:
    file = disk.image(scratch / "image", 4 * MIB)
    device = devices.loop(file)
    data = disk.pattern(3 * MIB)
    with held_open(device.node, os.O_RDWR) as fd:
        os.pwrite(fd, data, 4 * KIB + 100)
        os.fsync(fd)
    assert file.read_bytes() == bytes(4 * KIB + 100) + data + bytes(MIB - 4 * KIB - 100)


def test_the_last_sector_of_an_odd_size(devices: Devices, scratch: Path) -> None:
    size = MIB + 512
    file = disk.image(scratch / "image", size, disk.pattern(size))
    device = devices.loop(file)
    assert int((device.sysfs / "size").read_text()) == size // 512
    assert disk.read(device.node, size - 512, 512) == file.read_bytes()[-512:]
    disk.write(device.node, size - 512, b"\xa5" * 512)
    assert file.read_bytes()[-512:] == b"\xa5" * 512


@pytest.mark.parametrize("buf", [4 * KIB, 512 * KIB, 1 * MIB])
def test_a_request_as_large_as_the_buffer(devices: Devices, scratch: Path, buf: int) -> None:
    file = disk.image(scratch / "image", 4 * MIB)
    device = devices.loop(file, max_io_buf_bytes=buf)
    assert int(device.queue("max_hw_sectors_kb")) == buf // KIB
    assert int(device.queue("max_sectors_kb")) == buf // KIB
    data = disk.pattern(buf)
    before = device.settled("writes")
    disk.write(device.node, buf, data)
    assert device.settled("writes") == before + 1, "not in one request"
    assert file.read_bytes()[buf : 2 * buf] == data
    before = device.settled("reads")
    assert disk.read(device.node, buf, buf) == data
    assert device.settled("reads") == before + 1, "not in one request"


def test_null_completes_reads_and_writes(devices: Devices) -> None:
    device = devices.null(queues=2)
    assert len(disk.read(device.node, MIB, MIB)) == MIB
    disk.write(device.node, MIB, disk.pattern(MIB))


def test_null_completes_operations_without_data(devices: Devices) -> None:
    device = devices.null()
    disk.flush(device.node)
    disk.discard(device.node, 0, MIB)
    disk.zero_allocated(device.node, MIB, MIB)
    disk.zero_unmapped(device.node, 2 * MIB, MIB)
    assert device.settled("flushes") == 1
    assert device.settled("discards") == 1


def test_null_takes_the_load_of_deep_queues(devices: Devices) -> None:
    device = devices.null(queues=2, depth=4096, max_io_buf_bytes=4 * KIB)
    fio = ["fio", "--name=load", f"--filename={device.node}", "--direct=1", "--thread", "--ioengine=libaio"]
    fio += ["--rw=randrw", "--bs=4k", "--iodepth=1024", "--numjobs=2", "--size=16m", "--minimal"]
    done = subprocess.run(fio, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _backing_fd(pid: int, file: Path) -> Path:
    """The daemon's open file, as a link in /proc."""
    return next(fd for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.readlink() == file)


def _flags(pid: int, file: Path) -> int:
    info = Path(f"/proc/{pid}/fdinfo/{_backing_fd(pid, file).name}").read_text()
    return int(dict(line.split(":", 1) for line in info.splitlines())["flags"], 8)
