"""The plugins that nbdkit's source has as examples, as their authors wrote them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.examples import WebServer, serving

from . import disk, kernel, load, program
from .devices import MIB, Device, Devices

FOLDER = os.environ.get("UBLKPY_NBDKIT_EXAMPLES", "")
DATA = disk.pattern(MIB)

pytestmark = [
    pytest.mark.any_kernel,
    pytest.mark.skipif(not FOLDER, reason="nbdkit's examples are not here; scripts/setup vm fetches them"),
]


def add(devices: Devices, name: str, *args: object) -> Device:
    done = program.ublk("add", "-t", "nbdkit-python", "--script", str(Path(FOLDER, name)), *map(str, args))
    assert done.status == 0, done.err
    return devices.adopt(int(done.out.strip().removeprefix("/dev/ublkb")))


@pytest.fixture(params=["ramdisk.py", "file.py"])
def writable(request: pytest.FixtureRequest, devices: Devices, scratch: Path) -> Device:
    if request.param == "ramdisk.py":
        return add(devices, "ramdisk.py")
    return add(devices, "file.py", f"file={disk.image(scratch / 'image', 8 * MIB)}")


def test_what_is_written_is_there(writable: Device) -> None:
    expected = DATA
    disk.write(writable.node, 0, DATA)
    if writable.queue("write_zeroes_max_bytes") != "0":
        disk.zero_unmapped(writable.node, 8192, 4096)
        expected = DATA[:8192] + bytes(4096) + DATA[12288:]
    assert disk.read(writable.node, 0, MIB) == expected
    load.verify(writable.node, "--ioengine=libaio", "--iodepth=16", "--rw=randrw", "--bs=4k", "--size=1m")


def test_a_file_system(devices: Devices, scratch: Path) -> None:
    device = add(devices, "file.py", f"file={disk.image(scratch / 'image', 8 * MIB)}")
    kernel.keep_file(device.node, scratch / "mnt", DATA)


def test_url(devices: Devices) -> None:
    with serving(WebServer(DATA)) as server:
        device = add(devices, "url.py", f"url={server.url}")
        assert (device.sysfs / "ro").read_text() == "1\n"
        assert disk.read(device.node, 0, MIB) == DATA
        devices.remove(device)


@pytest.mark.logs
def test_error(devices: Devices, scratch: Path) -> None:
    """Every other call of it fails, and says so."""
    (scratch / "image").write_bytes(DATA)
    device = add(devices, "error.py", f"file={scratch / 'image'}", "--log", scratch / "log")
    results = []
    for place in range(0, 8 * 4096, 4096):
        try:
            results.append(disk.read(device.node, place, 4096) == DATA[place : place + 4096])
        except OSError:
            results.append(False)
    assert results in ([False, True] * 4, [True, False] * 4)
    assert "pread error offset=" in (scratch / "log").read_text()


def test_what_one_lacks_is_told() -> None:
    """imageio.py is for oVirt: what it says of what it lacks comes out."""
    done = program.ublk("add", "-t", "nbdkit-python", "--script", str(Path(FOLDER, "imageio.py")))
    assert done.status != 0
    assert "imageio.py" in done.err
