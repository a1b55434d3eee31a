"""The examples as devices: added by their files, used, and what each of them is about."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.examples import NbdServer, WebServer, path, serving
from ublkpy.driver import inspect
from ublkpy.uring.uapi import Feature, State

from . import disk, kernel, load, program
from .devices import MIB, Device, Devices

DATA = disk.pattern(MIB)
TEXT = b"0123456789abcdef" * (MIB // 16)
MIXED = ("--ioengine=libaio", "--iodepth=8", "--rw=randrw", "--bsrange=4k-64k", "--bs_unaligned=0", "--size=2m")


def add(devices: Devices, name: str, *args: object) -> Device:
    done = program.ublk("add", path(name), *map(str, args))
    assert done.status == 0, done.err
    return devices.adopt(int(done.out.strip().removeprefix("/dev/ublkb")))


@pytest.fixture
def kept(request: pytest.FixtureRequest, scratch: Path) -> list[str]:
    """How to add one of those that keep what they have in a file."""
    if request.param == "encrypted":
        disk.image(scratch / "disk", 8 * MIB)
        (scratch / "key").write_bytes(b"correct horse battery staple")
        return ["encrypted", "--file", str(scratch / "disk"), "--key-file", str(scratch / "key")]
    return [request.param, "--file", str(scratch / "disk"), "--size", "8M"]


KEPT = pytest.mark.parametrize("kept", ["sqlite_disk", "encrypted", "compressed"], indirect=True)


# -- any disk ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "args"), [("ram", []), ("event", ["--delay", "1"])])
def test_what_fio_writes_is_there(devices: Devices, name: str, args: list[str]) -> None:
    load.verify(add(devices, name, "--size", "8M", *args).node, *MIXED)


@KEPT
def test_what_fio_writes_is_kept(devices: Devices, kept: list[str]) -> None:
    load.verify(add(devices, *kept, "-q", "2").node, *MIXED)


@KEPT
def test_a_file_system(devices: Devices, kept: list[str], scratch: Path) -> None:
    device = add(devices, *kept)
    kernel.keep_file(device.node, scratch / "mnt", DATA)


@KEPT
def test_what_was_flushed_survives_its_daemon(devices: Devices, kept: list[str]) -> None:
    device = add(devices, *kept, "--recovery", "queue")
    disk.write(device.node, 65536 - 4096, DATA)
    disk.flush(device.node)
    device.kill_daemon()
    done = program.ublk("recover", "-n", str(device.id))
    assert done.status == 0, done.err
    assert device.state is State.LIVE
    assert disk.read(device.node, 65536 - 4096, MIB) == DATA


@pytest.mark.parametrize("kept", ["encrypted", "compressed"], indirect=True)
def test_what_was_not_flushed_does_in_these(devices: Devices, kept: list[str]) -> None:
    device = add(devices, *kept, "--recovery", "queue")
    disk.write(device.node, MIB, DATA)
    device.kill_daemon()
    assert program.ublk("recover", "-n", str(device.id)).status == 0
    assert disk.read(device.node, MIB, MIB) == DATA


@KEPT
def test_an_end_is_as_good_as_a_flush(devices: Devices, kept: list[str]) -> None:
    device = add(devices, *kept)
    disk.write(device.node, MIB, DATA)
    devices.remove(device)
    assert disk.read(add(devices, *kept).node, MIB, MIB) == DATA


@KEPT
def test_an_upgrade(devices: Devices, kept: list[str]) -> None:
    """What was written and not flushed goes over to the next daemon."""
    if Feature.QUIESCE not in inspect.features():
        pytest.skip("this driver has no UBLK_F_QUIESCE (Linux 6.16)")
    device = add(devices, *kept, "--recovery", "reissue")
    before = device.pid
    disk.write(device.node, MIB, DATA)
    done = program.ublk("upgrade", "-n", str(device.id))
    assert done.status == 0, done.err
    assert device.pid != before
    assert disk.read(device.node, MIB, MIB) == DATA


@pytest.mark.any_kernel
def test_a_program_of_its_own(devices: Devices) -> None:
    printed = kernel.run(sys.executable, path("ram"), "--size", "8M")
    device = devices.adopt(int(printed.strip().removeprefix("/dev/ublkb")))
    disk.write(device.node, 0, DATA)
    assert disk.read(device.node, 0, MIB) == DATA


# -- what each is about --------------------------------------------------------------------


def test_null(devices: Devices) -> None:
    device = add(devices, "null", "--size", "1G")
    disk.write(device.node, 0, DATA)
    disk.flush(device.node)
    disk.discard(device.node, 0, MIB)
    assert len(disk.read(device.node, 0, MIB)) == MIB


def test_event_answers_later_and_many_at_once(devices: Devices) -> None:
    """A read takes as long as it was said; with 32 side by side, many take a fraction of the sum."""
    device = add(devices, "event", "--size", "8M", "--delay", "250", "-d", "64")
    began = time.monotonic()
    disk.read(device.node, 0, 4096)
    one = time.monotonic() - began
    assert one >= 0.25
    began = time.monotonic()
    with load.running(device, "--iodepth=32", "--rw=randread", "--bs=4k", "--number_ios=320") as fio:
        status, output = load.result(fio)
    assert status == 0, output
    assert time.monotonic() - began < 320 * 0.25 / 4


@pytest.fixture
def web() -> Iterator[WebServer]:
    with serving(WebServer(DATA)) as server:
        yield server


def test_http(devices: Devices, web: WebServer) -> None:
    device = add(devices, "http_disk", "--url", web.url)
    assert (device.sysfs / "ro").read_text() == "1\n"
    assert disk.read(device.node, 0, MIB) == DATA
    assert None not in web.ranges, "nobody asks for the whole file"
    blocks = [place for place in web.ranges if place != (0, 0)]
    assert sorted(filter(None, blocks)) == [(n, n + 65535) for n in range(0, MIB, 65536)], "each block once"
    load.verify(device.node, "--rw=randread", "--bs=4k", "--size=1m", "--verify=0", "--iodepth=16")
    assert disk.read(device.node, 0, MIB) == DATA
    assert len(web.ranges) == len(blocks) + 1


@pytest.mark.logs
def test_http_without_its_server(devices: Devices, web: WebServer) -> None:
    device = add(devices, "http_disk", "--url", web.url)
    web.fails = True
    with pytest.raises(OSError, match="Input/output error"):
        disk.read(device.node, MIB // 2, 4096)
    web.fails = False
    assert disk.read(device.node, MIB // 2, 4096) == DATA[MIB // 2 :][:4096]


@pytest.mark.parametrize("kept", ["encrypted"], indirect=True)
def test_encrypted(devices: Devices, kept: list[str], scratch: Path) -> None:
    """Neither what was written nor that it was written twice can be seen in the file."""
    device = add(devices, *kept)
    disk.write(device.node, 0, DATA[:4096] * 2)
    disk.flush(device.node)
    devices.remove(device)
    stored = (scratch / "disk").read_bytes()
    assert DATA[:16] not in stored
    assert stored[4096:8192] != stored[8192:12288]
    (scratch / "key").write_bytes(b"incorrect")
    refused = program.ublk("add", path("encrypted"), *kept[1:])
    assert refused.status == 1
    assert "this is not the key" in refused.err


@pytest.mark.parametrize("kept", ["compressed"], indirect=True)
def test_compressed(devices: Devices, kept: list[str], scratch: Path) -> None:
    device = add(devices, *kept)
    disk.write(device.node, 0, TEXT)
    disk.flush(device.node)
    assert disk.read(device.node, 0, MIB) == TEXT
    devices.remove(device)
    assert (scratch / "disk").stat().st_size < MIB // 8


@pytest.mark.parametrize("kept", ["sqlite_disk"], indirect=True)
def test_a_file_on_a_disk_of_its_own(devices: Devices, kept: list[str], scratch: Path) -> None:
    """The daemon opens it, in a namespace that has not all mounts."""
    below = add(devices, "ram", "--size", "32M")
    kernel.run("mkfs.ext4", "-q", below.node)
    with kernel.mounted(below.node, scratch / "mnt") as point:
        device = add(devices, kept[0], "--file", str(point / "disk.db"), "--size", "8M")
        disk.write(device.node, 0, DATA)
        disk.flush(device.node)
        assert (point / "disk.db").exists()
        devices.remove(device)


@pytest.mark.parametrize("mode", ["get-data", "auto"])
def test_rpc(devices: Devices, mode: str) -> None:
    with serving(NbdServer(8 * MIB)) as server:
        device = add(devices, "rpc_buffer", "--port", server.port, "--mode", mode)
        disk.write(device.node, MIB, DATA)
        assert server.data[MIB : 2 * MIB] == DATA
        load.verify(device.node, *MIXED)
        devices.remove(device)
    assert {0, 1} <= set(server.commands)
