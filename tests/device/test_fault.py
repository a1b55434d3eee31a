"""The fault target: what programs and file systems meet on it, and its daemon."""

from __future__ import annotations

import errno
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ublkpy import Device as Api
from ublkpy.driver import inspect
from ublkpy.driver.delete import delete
from ublkpy.errors import UblkError
from ublkpy.life.add import add
from ublkpy.life.recover import recover
from ublkpy.system.spawn import wait_end
from ublkpy.tgt.fault import FaultTarget
from ublkpy.tgt.options import Range
from ublkpy.uring.map import Extent, Fault, Faulty, Map, Routing, Zero
from ublkpy.uring.uapi import Feature

from . import disk, kernel, program
from .devices import MIB, Device, Devices, configure, until
from .kernel import run
from .targets import Mapped

pytestmark = pytest.mark.logs

SIZE = 8 * MIB
DATA = disk.pattern(SIZE)
SECOND = 10**9
PAGE = Path(__file__).parents[2] / "docs/targets/fault.md"
AS_THEY_ARE = re.findall(r"E[A-Z]+", PAGE.read_text().partition("reach it as they are:")[2].partition(". ")[0])


@pytest.fixture
def image(scratch: Path) -> Path:
    return disk.image(scratch / "image", SIZE, DATA)


@pytest.fixture
def switch(scratch: Path) -> Path:
    """The file that turns faults on."""
    return scratch / "on"


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def serve(devices: Devices, **options: Any) -> Device:
    return devices.adopt(add(configure("fault", **options)))


def write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def late_read(device: Device, switch: Path, pool: ThreadPoolExecutor) -> Future[bytes]:
    """One that the daemon has, and does not answer yet."""
    until(lambda: (device.sysfs / "inflight").read_text().split() == ["0", "0"], "the kernel has looked for partitions")
    switch.touch()
    late = pool.submit(disk.read, device.node, 0, 4096)
    until(lambda: (device.sysfs / "inflight").read_text().split() == ["1", "0"], "it is under way")
    return late


def test_which_errors_programs_see() -> None:
    """Those that the page names, and EIO for all others."""
    numbers = range(1, 134)

    def make(made: Map) -> None:
        for nr in numbers:
            fault = made.add_fault(Fault(error_rate=1, errno=nr))
            made.replace([Extent(MIB + nr * 4096, 4096, Routing.all(Faulty(Zero(), fault)))])

    seen = set()
    with Api(Mapped(make)) as device:
        for nr in numbers:
            with pytest.raises(OSError, match=r"\[Errno") as caught:
                disk.read(Path(device.node), MIB + nr * 4096, 4096)
            assert caught.value.errno in (nr, errno.EIO)
            seen.add(caught.value.errno)
    assert seen - {errno.EIO} == {getattr(errno, name) for name in AS_THEY_ARE}


@pytest.mark.any_kernel
def test_the_example_of_its_page(devices: Devices, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(scratch)
    (block,) = re.findall(r"\n\n((?:    .*\n)+)\nA disk in memory", PAGE.read_text())
    node = ""
    for line in block.splitlines():
        command, _, wrong = line.strip().replace("/tmp/full", str(scratch / "full")).partition(" # ")
        command = command.replace("/dev/ublkb0", node)
        if command.startswith("ublk "):
            done = program.ublk(*shlex.split(command)[1:])
            assert done.status == 0, done.err
            node = done.out.strip()
            devices.adopt(int(node.removeprefix("/dev/ublkb")))
        else:
            ran = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=50)
            assert (ran.returncode != 0) == bool(wrong), f"{command}: {ran.stderr}"
            assert wrong.strip() in ran.stderr


@pytest.mark.any_kernel
@pytest.mark.parametrize("op", ["read", "write", "flush", "discard", "write_zeroes"])
def test_only_what_was_named_fails(op: str) -> None:
    tried: dict[str, Callable[[Path], object]] = {
        "read": lambda node: disk.read(node, 0, 4096),
        "write": lambda node: disk.write(node, 0, bytes(4096)),
        "flush": disk.flush,
        "discard": lambda node: disk.discard(node, 0, MIB),
        "write_zeroes": lambda node: disk.zero_unmapped(node, 0, MIB),
    }
    target = FaultTarget({"size": SIZE, "error_rate": 1.0, "ops": (op,), "errno": errno.ENOLINK})
    with Api(target) as device:
        for name, action in tried.items():
            if name == op:
                with pytest.raises(OSError, match=os.strerror(errno.ENOLINK)):
                    action(Path(device.node))
            else:
                action(Path(device.node))


@pytest.mark.any_kernel
def test_ranges_and_operations_have_their_own_delays(image: Path, way: str) -> None:
    options = {"file": image, "delay_read": SECOND, "ranges": (Range(MIB, MIB + 512),)}
    with Api(FaultTarget(options), mode=way) as device:
        node = Path(device.node)
        disk.write(node, MIB, DATA[:4096])
        begin = time.monotonic()
        assert disk.read(node, MIB - 4096, 8192) == DATA[MIB - 4096 : MIB] + DATA[:4096]
        assert time.monotonic() - begin >= 1
    assert image.read_bytes() == DATA[:MIB] + DATA[:4096] + DATA[MIB + 4096 :]


@pytest.mark.any_kernel
def test_ext4_sees_writes_fail_and_comes_back(devices: Devices, scratch: Path, switch: Path) -> None:
    """What was synced before is there; what could not be written is told."""
    device = serve(
        devices, file=disk.image(scratch / "large", 32 * MIB), error_rate=1.0, ops=("write",), while_file=switch
    )
    run("mkfs.ext4", "-q", "-F", device.node)
    with kernel.mounted(device.node, scratch / "mnt") as point:
        write_synced(point / "kept", DATA[:MIB])
        switch.touch()
        with pytest.raises(OSError, match=r"Input/output error|Read-only file system"):
            write_synced(point / "lost", DATA[:MIB])
        switch.unlink()
    subprocess.run(["e2fsck", "-fy", device.node], capture_output=True, timeout=50)
    run("e2fsck", "-fn", device.node)
    with kernel.mounted(device.node, scratch / "mnt") as point:
        assert (point / "kept").read_bytes() == DATA[:MIB]
        (point / "lost").write_bytes(DATA[:MIB])


@pytest.mark.any_kernel
def test_a_write_through_the_page_cache_fails_at_its_flush(devices: Devices, image: Path) -> None:
    device = serve(devices, file=image, error_rate=1.0, ops=("flush",))
    fd = os.open(device.node, os.O_RDWR | os.O_CLOEXEC)
    os.pwrite(fd, b"new".ljust(4096), 0)
    with pytest.raises(OSError, match="Input/output error"):
        os.fsync(fd)
    os.close(fd)
    assert image.read_bytes()[:3] == b"new"  # it was not the write that failed


@pytest.mark.any_kernel
def test_its_file_is_seen_on_a_disk_of_its_own(devices: Devices, scratch: Path, image: Path) -> None:
    """Which the daemon would have left, but for that, and on which the file is not there yet."""
    with kernel.kernel_loop(disk.image(scratch / "other", 16 * MIB)) as other:
        run("mkfs.ext4", "-q", other)
        with kernel.mounted(other, scratch / "mnt") as point:
            switch = point / "on"
            device = serve(devices, file=image, error_rate=1.0, while_file=switch)
            assert disk.read(device.node, 0, 4096) == DATA[:4096]
            switch.touch()
            with pytest.raises(OSError, match="Input/output error"):
                disk.read(device.node, 0, 4096)
            switch.unlink()
            assert disk.read(device.node, 0, 4096) == DATA[:4096]
            devices.remove(device)


@pytest.mark.any_kernel
def test_it_grows_with_its_file(devices: Devices, image: Path) -> None:
    if Feature.UPDATE_SIZE not in inspect.features():
        pytest.skip("this driver has no UBLK_F_UPDATE_SIZE (Linux 6.16)")
    device = serve(devices, file=image, error_rate=1.0, ranges=(Range(0, 4096),))
    Api(device.id).resize(2 * SIZE)
    assert disk.read(device.node, 2 * SIZE - 4096, 4096) == bytes(4096)
    with pytest.raises(OSError, match="Input/output error"):
        disk.read(device.node, 0, 4096)
    with pytest.raises(UblkError, match="ends behind the new end of the device"):
        Api(device.id).resize(2048)


# -- the end of a device with requests that are late ---------------------------------------


def test_a_device_that_is_deleted_waits_for_them(
    devices: Devices, image: Path, switch: Path, pool: ThreadPoolExecutor
) -> None:
    device = serve(devices, file=image, delay=3 * SECOND, while_file=switch)
    late = late_read(device, switch, pool)
    devices.remove(device)
    assert late.result() == DATA[:4096]


def test_a_daemon_that_is_told_to_end_waits_for_them(
    devices: Devices, image: Path, switch: Path, pool: ThreadPoolExecutor
) -> None:
    device = serve(devices, file=image, delay=3 * SECOND, while_file=switch)
    pid = device.pid
    late = late_read(device, switch, pool)
    os.kill(pid, signal.SIGTERM)
    assert wait_end(pid, 40)
    assert late.result() == DATA[:4096]
    assert not device.exists()


def test_nobody_waits_for_an_hour(devices: Devices, image: Path, switch: Path, pool: ThreadPoolExecutor) -> None:
    """A deletion says what is the matter, and one by force goes on without the daemon."""
    device = serve(devices, file=image, delay=3600 * SECOND, while_file=switch)
    late = late_read(device, switch, pool)
    with pytest.raises(UblkError, match="its server holds requests and does not answer them") as caught:
        delete(device.id, timeout=2)
    assert f"ublk del --force -n {device.id}" in caught.value.hint
    delete(device.id, force=True, timeout=2)
    with pytest.raises(OSError, match="Input/output error"):
        late.result()


def test_the_next_daemon_has_them_again(devices: Devices, image: Path, switch: Path, pool: ThreadPoolExecutor) -> None:
    device = serve(devices, file=image, delay=3600 * SECOND, while_file=switch, recovery="reissue")
    late = late_read(device, switch, pool)
    device.kill_daemon()
    switch.unlink()
    recover(device.id)
    assert late.result() == DATA[:4096]
