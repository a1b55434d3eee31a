"""The target zoned: what the kernel, fio and btrfs make of its zones, and what a death leaves of them."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ublkpy.driver import inspect
from ublkpy.life.add import add
from ublkpy.life.recover import recover
from ublkpy.life.upgrade import upgrade
from ublkpy.system.spawn import wait_end
from ublkpy.tgt import zone_table
from ublkpy.tgt.zone_rules import Rules, Write
from ublkpy.uring.uapi import Feature

from . import disk, kernel, load, program
from .devices import MIB, Device, Devices, configure, until
from .test_filesystem import TREE, checksums
from .zones import blkzone, open_zone, report

PAGE = Path(__file__).parents[2] / "docs/targets/zoned.md"
ZONE = 4 * MIB
_DATA = disk.pattern(64 << 10)


def serve(devices: Devices, folder: Path | None = None, **options: Any) -> Device:
    """A device of 16 zones, unless something else is said."""
    where = {"folder": folder} if folder else {}
    return devices.adopt(add(configure("zoned", **{"size": 16 * ZONE, "zone_size": ZONE} | where | options)))


@pytest.fixture(params=["folder", "memory"])
def folder(request: pytest.FixtureRequest, scratch: Path) -> Path | None:
    return scratch / "disk" if request.param == "folder" else None


@pytest.fixture
def on_disk(scratch: Path) -> Iterator[Path]:
    """A folder whose files wait for a device; ask for it before ``devices``, which end first then."""
    with kernel.kernel_loop(disk.image(scratch / "ext4.image", 192 * MIB)) as node:
        kernel.run("mkfs.ext4", "-q", node)
        with kernel.mounted(node, scratch / "ext4") as point:
            yield point
            # The files of a ring are let go some time after its process has ended.
            until(lambda: subprocess.run(["umount", point], capture_output=True).returncode == 0, "the disk is free")


@pytest.mark.any_kernel
def test_what_its_page_says(devices: Devices, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command, but for that with a file, which is tested elsewhere."""
    monkeypatch.chdir(scratch)
    commands = re.findall(r"^    (\w.*)$", PAGE.read_text(), re.MULTILINE)
    assert len(commands) == 6
    for command in commands:
        name, *args = shlex.split(command)
        if name == "ublk" and "-c" not in args:
            if Path("/dev/ublkb0").exists():
                devices.remove(Device(0))
            done = program.ublk(*args)
            assert (done.status, done.out) == (0, "/dev/ublkb0\n"), done.err
            devices.adopt(0)
        elif name != "ublk":
            kernel.run(name, *args)
    assert "btrfs" in kernel.run("blkid", "-p", "/dev/ublkb0")
    assert str(scratch / "disk") in program.ublk("list").out


def test_zones_do_what_the_kernel_wants(devices: Devices, folder: Path | None) -> None:
    device = serve(devices, folder, zone_capacity=3 * MIB, conv_zones=1, max_open=4, max_active=6)
    assert [device.queue(name) for name in ("zoned", "nr_zones", "max_open_zones", "max_active_zones")] == [
        *("host-managed", "16", "4", "6")
    ]
    assert report(device) == [(0, 0, "nw"), *((n * ZONE, 0, "em") for n in range(1, 16))]

    blkzone(device, "open", 2)
    for _ in range(3):
        disk.write(device.node, 3 * ZONE + report(device)[3][1], bytes(MIB))
    disk.write(device.node, 4 * ZONE, _DATA)
    disk.write(device.node, 5 * ZONE, _DATA)
    blkzone(device, "close", 5)
    blkzone(device, "finish", 6)
    assert [zone[2] for zone in report(device)[2:8]] == ["oe", "fu", "oi", "cl", "fu", "em"]
    for place in (2 * ZONE + 4096, 3 * ZONE + 3 * MIB, 4 * ZONE, 6 * ZONE):
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            disk.write(device.node, place, _DATA)
    assert disk.read(device.node, 4 * ZONE, 2 * len(_DATA)) == _DATA.ljust(2 * len(_DATA), b"\0")

    blkzone(device, "close", 2)
    blkzone(device, "reset", 4)
    assert [zone[2] for zone in report(device)[2:8]] == ["em", "fu", "em", "cl", "fu", "em"]
    assert disk.read(device.node, 4 * ZONE, len(_DATA)) == bytes(len(_DATA))
    disk.write(device.node, 0, _DATA)
    blkzone(device, "reset", 1, 15)
    assert {zone[2] for zone in report(device)[1:]} == {"em"}
    assert disk.read(device.node, 0, len(_DATA)) == _DATA
    if folder:
        assert disk.allocated(folder / "data") <= MIB


def test_what_may_be_open_and_active(devices: Devices) -> None:
    device = serve(devices, max_open=2, max_active=3)
    open_zone(device, 0)
    disk.write(device.node, ZONE, _DATA)
    disk.write(device.node, 2 * ZONE, _DATA)  # has the one before closed
    assert [zone[2] for zone in report(device)[:3]] == ["oe", "cl", "oi"]
    with pytest.raises(OSError, match=os.strerror(errno.EOVERFLOW)):
        disk.write(device.node, 3 * ZONE, _DATA)
    open_zone(device, 2)
    with pytest.raises(OSError, match=os.strerror(errno.ETOOMANYREFS)):
        open_zone(device, 1)
    with pytest.raises(OSError, match=os.strerror(errno.ETOOMANYREFS)):
        disk.write(device.node, ZONE + len(_DATA), _DATA)
    blkzone(device, "finish", 2)
    open_zone(device, 1)


def test_fio_finds_what_it_wrote(on_disk: Path, devices: Devices) -> None:
    device = serve(devices, on_disk / "disk", queues=2, max_open=4)
    for rw in ("write", "randwrite"):
        options = ("--zonemode=zbd", "--ioengine=libaio", "--iodepth=8", "--bs=64k", "--max_open_zones=4")
        load.verify(device.node, f"--rw={rw}", "--size=24m", *options)
    assert {zone[2] for zone in report(device)} <= {"em", "oi", "cl", "fu"}


def test_conventional_zones_are_written_anywhere(devices: Devices, scratch: Path) -> None:
    device = serve(devices, scratch / "disk", conv_zones=3)
    load.verify(device.node, "--rw=randwrite", "--size=8m", "--bs=16k", "--ioengine=libaio", "--iodepth=8")
    before = disk.allocated(scratch / "disk" / "data")
    disk.discard(device.node, 0, 3 * ZONE)
    assert disk.allocated(scratch / "disk" / "data") <= before - 7 * MIB
    assert disk.read(device.node, 0, MIB) == bytes(MIB)


@pytest.mark.timeout(180)
def test_btrfs_outlives_its_device(devices: Devices, scratch: Path) -> None:
    kernel.load_module("btrfs")
    device = serve(devices, scratch / "disk", size=64 * ZONE, queues=2, max_open=16)
    kernel.run("mkfs.btrfs", "-q", "-f", "-O", "zoned", "-d", "single", "-m", "single", device.node)
    with kernel.mounted(device.node, scratch / "mnt") as point:
        shutil.copytree(TREE, point / "tree", ignore=shutil.ignore_patterns("__pycache__"))
    before = report(device)
    devices.remove(device)
    device = devices.adopt(add(configure("zoned", folder=scratch / "disk")))
    assert report(device) == before
    with kernel.mounted(device.node, scratch / "mnt") as point:
        assert checksums(point / "tree") == checksums(TREE)
        kernel.run("btrfs", "scrub", "start", "-B", point)
        (point / "file").write_bytes(_DATA)
        os.sync()
    kernel.run("btrfs", "check", device.node)


class _Writer(threading.Thread):
    """Fills a zone, one write after the other; ``done`` bytes have been written when it ends."""

    def __init__(self, device: Device, zone: int) -> None:
        super().__init__()
        self._node = device.node
        self.zone = zone
        self.done = 0
        self.error: OSError | None = None
        self.stopped = False

    def run(self) -> None:
        try:
            while not self.stopped and self.done < ZONE:
                disk.write(self._node, self.zone * ZONE + self.done, disk.pattern(16 << 10, self.zone + self.done))
                self.done += 16 << 10
        except OSError as e:
            self.error = e

    def expected(self) -> bytes:
        return b"".join(disk.pattern(16 << 10, self.zone + at) for at in range(0, self.done, 16 << 10))


def test_a_daemon_that_is_killed_loses_nothing(on_disk: Path, devices: Devices) -> None:
    """Nor does any write fail."""
    device = serve(devices, on_disk / "disk", recovery="reissue", queues=2)
    blkzone(device, "open", 12)
    disk.write(device.node, 13 * ZONE, _DATA)
    blkzone(device, "close", 13)
    blkzone(device, "finish", 14)
    writers = [_Writer(device, zone) for zone in range(4)]
    for writer in writers:
        writer.start()
    for _ in range(4):
        before = sum(writer.done for writer in writers)
        until(lambda: sum(writer.done for writer in writers) > before + (256 << 10), "they write")  # noqa: B023
        device.kill_daemon()
        recover(device.id)
    for writer in writers:
        writer.stopped = True
        writer.join()
        assert writer.error is None
    zones = report(device)
    for writer in writers:
        assert zones[writer.zone][1] == writer.done
        assert disk.read(device.node, writer.zone * ZONE, ZONE) == writer.expected().ljust(ZONE, b"\0")
    assert [zone[2] for zone in zones[12:15]] == ["oe", "cl", "fu"]


def test_a_write_that_was_done_but_not_answered_is_sent_again(
    devices: Devices, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = Rules.done

    def dies(rules: Rules, write: Write) -> None:
        done(rules, write)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as dying:
        dying.setattr(Rules, "done", dies)
        device = serve(devices, scratch / "disk", recovery="reissue")
    pid, writer = device.pid, _Writer(device, 1)
    writer.start()
    assert wait_end(pid, 20)
    recover(device.id)
    writer.join()
    assert writer.error is None
    assert report(device)[1] == (ZONE, ZONE, "fu")
    assert disk.read(device.node, ZONE, ZONE) == writer.expected()


def test_an_upgrade_leaves_zones_as_they_are(devices: Devices, scratch: Path) -> None:
    if Feature.QUIESCE not in inspect.features():
        pytest.skip("this driver has no UBLK_F_QUIESCE (Linux 6.16)")
    device = serve(devices, scratch / "disk", recovery="queue")
    blkzone(device, "open", 1)
    writer = _Writer(device, 2)
    writer.start()
    upgrade(device.id)
    writer.join()
    assert writer.error is None
    assert [zone[2] for zone in report(device)[1:3]] == ["oe", "fu"]
    assert disk.read(device.node, 2 * ZONE, ZONE) == writer.expected()


def test_a_folder_that_is_full(devices: Devices, scratch: Path, caplog: pytest.LogCaptureFixture) -> None:
    with kernel.mounted("none", scratch / "small", "-t", "tmpfs", "-o", "size=6m") as small:
        device = serve(devices, small / "disk")
        assert "is sparse and may need 64M more" in caplog.messages[0]
        writers = [_Writer(device, zone) for zone in range(2)]
        for writer in writers:
            writer.run()
        assert (writers[0].done, writers[0].error) == (ZONE, None)
        assert writers[1].error
        assert writers[1].error.errno == errno.ENOSPC
        assert report(device)[1] == (ZONE, writers[1].done, "oi")
        blkzone(device, "reset", 0)
        disk.write(device.node, ZONE + writers[1].done, _DATA)
        assert disk.read(device.node, ZONE, writers[1].done + len(_DATA)) == writers[1].expected() + _DATA
        devices.remove(device)


def test_what_a_loss_of_power_leaves(devices: Devices, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was flushed, or written with FUA; zones are closed then, and what was not flushed is gone."""
    device = serve(devices, scratch / "disk")
    disk.write(device.node, 0, _DATA)
    disk.flush(device.node)
    disk.write(device.node, len(_DATA), _DATA)
    disk.write(device.node, ZONE, _DATA, os.O_DSYNC)
    disk.write(device.node, ZONE + len(_DATA), _DATA)
    disk.write(device.node, 2 * ZONE, _DATA)
    blkzone(device, "finish", 3)
    disk.write(device.node, 4 * ZONE, _DATA)
    shutil.copytree(scratch / "disk", scratch / "after")
    devices.remove(device)
    monkeypatch.setattr(zone_table, "boot_id", lambda: b"another")
    device = devices.adopt(add(configure("zoned", folder=scratch / "after")))
    # FUA of one zone is a flush of all that was written before, and so is what is done with a zone.
    expected = [(2, "cl"), (2, "cl"), (1, "cl"), (0, "fu"), (0, "em")]
    assert [(wp // len(_DATA), cond) if cond != "fu" else (0, cond) for _, wp, cond in report(device)[:5]] == expected
    assert disk.read(device.node, 4 * ZONE, len(_DATA)) == bytes(len(_DATA))
    assert disk.read(device.node, 0, 2 * len(_DATA)) == 2 * _DATA


def test_a_read_only_device_shows_what_is_there(devices: Devices, scratch: Path) -> None:
    device = serve(devices, scratch / "disk", conv_zones=1)
    disk.write(device.node, 0, _DATA)
    disk.write(device.node, ZONE, _DATA)
    devices.remove(device)
    before = (scratch / "disk" / "zones").read_bytes()
    device = devices.adopt(add(configure("zoned", folder=scratch / "disk", read_only=True)))
    assert disk.read(device.node, 0, len(_DATA)) == _DATA
    assert disk.read(device.node, ZONE, 2 * len(_DATA)) == _DATA.ljust(2 * len(_DATA), b"\0")
    assert report(device)[1][1:] == (len(_DATA), "oi")
    devices.remove(device)
    assert (scratch / "disk" / "zones").read_bytes() == before
