"""Targets of methods: plain ones, async ones, and ones that threads of a pool call."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ublkpy.config import DeviceConfig, DeviceOptions
from ublkpy.errors import UblkError
from ublkpy.life.add import add
from ublkpy.tgt.base import Target

from . import disk, kernel, load, targets
from .devices import MIB, Device, Devices, until

WAYS = ["", "Async", "Blocking"]


def serve(devices: Devices, target: Target, **options: object) -> Device:
    return devices.adopt(add(DeviceConfig(DeviceOptions(options), target)))


def make(way: str, name: str) -> Target:
    made: Target = getattr(targets, way + name)()
    return made


@pytest.fixture(params=WAYS, ids=["plain", "async", "blocking"])
def way(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.mark.parametrize("mode", ["auto", "copy", "user-copy"])
def test_what_fio_writes_is_there(devices: Devices, way: str, mode: str) -> None:
    device = serve(devices, make(way, "Ram"), mode=mode)
    load.verify(device.node, "--ioengine=libaio", "--iodepth=32", "--rw=randrw", "--bsrange=4k-64k", "--size=4m")


def test_over_several_queues_and_threads(devices: Devices, way: str) -> None:
    device = serve(devices, make(way, "Ram"), queues=2)
    mixed = ("--ioengine=libaio", "--iodepth=16", "--rw=randrw", "--bs=4k", "--size=2m")
    load.verify(device.node, *mixed, "--numjobs=2", "--offset_increment=4m")


def test_a_file_system(devices: Devices, way: str, scratch: Path) -> None:
    device = serve(devices, make(way, "Ram"))
    kernel.keep_file(device.node, scratch / "mnt", disk.pattern(MIB))


def test_what_it_has_no_method_for_it_cannot_do(devices: Devices) -> None:
    device = serve(devices, targets.ReadOnly())
    assert (device.sysfs / "ro").read_text() == "1\n"
    assert device.queue("write_cache") == "write through"
    assert (device.queue("discard_max_bytes"), device.queue("write_zeroes_max_bytes")) == ("0", "0")
    assert disk.read(device.node, 512 * 77, 512)[:8] == (77).to_bytes(8, "little")


def test_what_it_has_methods_for(devices: Devices) -> None:
    device = serve(devices, targets.Ram())
    assert (device.sysfs / "ro").read_text() == "0\n"
    assert device.queue("write_cache") == "write back"
    assert int(device.queue("discard_max_bytes")) > MIB
    data = disk.pattern(MIB)
    disk.write(device.node, 0, data)
    disk.discard(device.node, 4096, 8192)
    disk.zero_allocated(device.node, 65536, 4096)
    expected = bytearray(data)
    expected[4096:12288] = bytes(8192)
    expected[65536:69632] = bytes(4096)
    assert disk.read(device.node, 0, MIB) == bytes(expected)


def test_flushes_come_in_order(devices: Devices, way: str) -> None:
    """One for each that is asked for, and one after a write that has to be durable at once."""
    device = serve(devices, make(way, "Counting"), part_scan=None)
    disk.write(device.node, 0, bytes(4096))
    disk.flush(device.node)
    disk.write(device.node, 8192, bytes(4096), os.O_DSYNC)
    calls = disk.read(device.node, 0, 4096).rstrip(b"\0").decode().splitlines()
    # Linux sends a flush after such a write besides.
    assert calls == ["write 0 4096", "flush", "write 8192 4096", "flush", "flush"]


@pytest.mark.logs
def test_what_requests_ask_for_besides(devices: Devices, way: str, scratch: Path) -> None:
    device = serve(devices, make(way, "Flagged"), log=scratch / "log")
    disk.write(device.node, 0, bytes(4096))
    disk.write(device.node, 8192, bytes(4096), os.O_DSYNC)
    disk.zero_allocated(device.node, 0, 4096)
    disk.zero_unmapped(device.node, 4096, 8192)
    calls = disk.read(device.node, 0, 4096).rstrip(b"\0").decode().splitlines()
    # The block layer may flush what O_DSYNC has written once more.
    assert [call for call in calls if call != "flush"] == [
        *["start_thread", "write 0 4096", "write_fua 8192 4096", "write_zeroes 0 4096", "punch_hole 4096 8192"]
    ]
    devices.remove(device)
    until(lambda: "the thread ends" in (scratch / "log").read_text(), "the thread says so")


@pytest.mark.logs
def test_what_it_raises_is_the_answer(devices: Devices, way: str, scratch: Path) -> None:
    device = serve(devices, make(way, "Failing"), log=scratch / "log")
    log = (scratch / "log").read_text
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        disk.read(device.node, 0, 4096)
    assert "Traceback" not in log()
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        disk.read(device.node, 4096, 4096)
    assert "KeyError: 'a bug'" in log()
    assert 'targets.py", line' in log()
    assert len(disk.read(device.node, 16384, 4096)) == 4096


@pytest.mark.logs
def test_what_a_method_must_not_do_fails_one_request(devices: Devices, way: str, scratch: Path) -> None:
    """Return something, among that what should be awaited, or end the process."""
    device = serve(devices, make(way, "Sloppy"), log=scratch / "log")
    for place in range(3):
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            disk.read(device.node, place * 4096, 4096)
        assert len(disk.read(device.node, 16384, 4096)) == 4096
    log = (scratch / "log").read_text()
    assert "TypeError: read() returned something" in log
    assert "SystemExit: a library ends the program" in log
    load.verify(device.node, "--ioengine=libaio", "--iodepth=16", "--rw=randrw", "--bs=4k", "--offset=1m", "--size=1m")


@pytest.mark.logs
def test_a_buffer_is_used_too_late(devices: Devices, way: str, scratch: Path) -> None:
    device = serve(devices, make(way, "Failing"), log=scratch / "log")
    disk.read(device.node, 2 * 4096, 4096)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        disk.write(device.node, 0, bytes(4096))
    assert "ValueError: operation forbidden on released memoryview object" in (scratch / "log").read_text()


def test_threads_are_not_bound_to_a_cpu(devices: Devices, way: str) -> None:
    """That of the queue is."""
    device = serve(devices, make(way, "Where"))
    found = int(disk.read(device.node, 0, 512).rstrip(b"\0"))
    assert found == (len(os.sched_getaffinity(0)) if way else 1)


@pytest.mark.parametrize("mode", ["get-data"])
def test_writes_go_where_it_says(devices: Devices, mode: str) -> None:
    device = serve(devices, targets.Boxes(), mode=mode)
    load.verify(device.node, "--ioengine=libaio", "--iodepth=16", "--rw=randrw", "--bs=4k", "--size=2m")


@pytest.mark.parametrize("name", ["Starting", "AsyncStarting"])
def test_it_starts_in_the_daemon(devices: Devices, name: str) -> None:
    device = serve(devices, getattr(targets, name)())
    assert disk.read(device.node, 0, 512).rstrip(b"\0") == str(device.pid).encode()


@pytest.mark.parametrize("name", ["Starting", "AsyncStarting"])
def test_a_start_that_fails_is_told(devices: Devices, name: str) -> None:
    with pytest.raises(UblkError, match="failed in start") as caught:
        serve(devices, getattr(targets, name)({"size": MIB}))
    assert "ConnectionRefusedError: [Errno 111] no server" in caught.value.hint
