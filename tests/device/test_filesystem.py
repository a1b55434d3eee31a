"""A file system on a device, and a device in use."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import signal
import struct
from pathlib import Path

import pytest

from ublkpy.driver import inspect
from ublkpy.errors import ExitCode
from ublkpy.system.spawn import wait_end

from . import disk, kernel, program
from .devices import MIB, Device, Devices, held_open, until
from .kernel import run

TREE = Path(asyncio.__file__).parent


def checksums(tree: Path) -> dict[str, str]:
    files = [path for path in tree.rglob("*.py") if path.is_file()]
    return {str(path.relative_to(tree)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def make_ext4(device: Device) -> None:
    run("mkfs.ext4", "-q", "-F", device.node)


def make_partition(device: Device) -> Path:
    """An MBR with one Linux partition from 1 MiB to 9 MiB."""
    entry = struct.pack("<B3sB3sII", 0, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", 2048, 16384)
    disk.write(device.node, 0, entry.rjust(446 + 16, b"\0").ljust(510, b"\0") + b"\x55\xaa")
    run("blockdev", "--rereadpt", device.node)
    part = Path(f"{device.node}p1")
    until(part.exists, "the partition is there")
    return part


@pytest.mark.parametrize("queues", [1, 2])
def test_ext4_outlives_its_device(devices: Devices, scratch: Path, queues: int) -> None:
    file = disk.image(scratch / "image", 64 * MIB)
    device = devices.loop(file, queues=queues)
    make_ext4(device)
    with kernel.mounted(device.node, scratch / "mnt") as point:
        shutil.copytree(TREE, point / "tree", ignore=shutil.ignore_patterns("__pycache__"))
    run("fsck.ext4", "-fn", device.node)
    devices.remove(device)
    device = devices.loop(file, queues=queues)
    with kernel.mounted(device.node, scratch / "mnt", "-o", "ro") as point:
        found = checksums(point / "tree")
    assert found == checksums(TREE)
    assert len(found) > 20


def test_xfs_outlives_its_device(devices: Devices, scratch: Path) -> None:
    if not shutil.which("mkfs.xfs"):
        pytest.skip("mkfs.xfs is not installed")
    kernel.load_module("xfs")
    file = disk.image(scratch / "image", 320 * MIB)
    device = devices.loop(file)
    run("mkfs.xfs", "-q", "-f", device.node)
    with kernel.mounted(device.node, scratch / "mnt") as point:
        shutil.copytree(TREE, point / "tree", ignore=shutil.ignore_patterns("__pycache__"))
    devices.remove(device)
    device = devices.loop(file)
    with kernel.mounted(device.node, scratch / "mnt", "-o", "ro") as point:
        assert checksums(point / "tree") == checksums(TREE)


def test_discard_on_ext4_frees_space_in_the_image(devices: Devices, scratch: Path) -> None:
    file = disk.image(scratch / "image", 64 * MIB)
    device = devices.loop(file)
    make_ext4(device)
    with kernel.mounted(device.node, scratch / "mnt", "-o", "discard") as point:
        (point / "data").write_bytes(disk.pattern(8 * MIB))
        run("sync", "-f", point)
        full = disk.allocated(file)
        (point / "data").unlink()
        run("sync", "-f", point)
        until(lambda: disk.allocated(file) < full - 7 * MIB, "the image has shrunk")


def test_del_refuses_a_mounted_device(devices: Devices, scratch: Path) -> None:
    device = devices.loop(disk.image(scratch / "image", 16 * MIB))
    make_ext4(device)
    with kernel.mounted(device.node, scratch / "a place") as point:
        refused = program.ublk("del", "-n", str(device.id))
        assert refused.status == ExitCode.BUSY
        assert f"{device.node} is mounted on {point}" in refused.err
        assert "umount" in refused.err
        (point / "file").write_text("still works")


def test_del_all_refuses_only_what_is_mounted(devices: Devices, scratch: Path) -> None:
    devices.null()
    device = devices.loop(disk.image(scratch / "image", 16 * MIB))
    make_ext4(device)
    with kernel.mounted(device.node, scratch / "mnt"):
        assert program.ublk("del", "-a").status == ExitCode.BUSY
        assert inspect.device_ids() == [device.id]


def test_force_deletes_a_mounted_device(devices: Devices, scratch: Path) -> None:
    device = devices.loop(disk.image(scratch / "image", 16 * MIB))
    make_ext4(device)
    with kernel.mounted(device.node, scratch / "mnt") as point:
        done = program.ublk("del", "--force", "-n", str(device.id))
        assert done.status == 0, done.err
        assert f"{device.node} is mounted on {point}" in done.err
        assert not device.node.exists()
    until(lambda: not device.exists(), "the id is free when the file system is gone")


def test_a_mounted_device_outlives_the_first_sigterm(devices: Devices, scratch: Path) -> None:
    """It comes early at shutdown; who means it can say it again."""
    log = scratch / "log"
    device = devices.loop(disk.image(scratch / "image", 16 * MIB), log=log)
    make_ext4(device)
    pid = device.pid
    with kernel.mounted(device.node, scratch / "mnt") as point:
        os.kill(pid, signal.SIGTERM)
        until(lambda: "another signal ends it by force" in log.read_text(), "the daemon has refused")
        assert f"{device.node} is mounted on {point}" in log.read_text()
        assert all(f" ublkb{device.id}[" in line or " ublk[" in line for line in log.read_text().splitlines())
        (point / "file").write_text("still works")
        run("sync", "-f", point)
        os.kill(pid, signal.SIGTERM)
        until(lambda: not device.node.exists(), "the disk is gone")
    assert wait_end(pid, 30)
    until(lambda: not device.exists(), "the id is free when the file system is gone")


def test_a_second_sigterm_counts_while_the_first_is_looked_into(devices: Devices, scratch: Path) -> None:
    log = scratch / "log"
    device = devices.loop(disk.image(scratch / "image", 16 * MIB), log=log)
    make_ext4(device)
    pid = device.pid
    with kernel.mounted(device.node, scratch / "mnt"):
        os.kill(pid, signal.SIGTERM)
        until(lambda: "asked to end" in log.read_text(), "the first one has arrived")
        os.kill(pid, signal.SIGTERM)
        assert "the device stays" not in log.read_text()
        until(lambda: not device.node.exists(), "the disk is gone")
        assert "by force" in log.read_text()
    assert wait_end(pid, 30)
    until(lambda: not device.exists(), "the id is free when the file system is gone")


def test_an_unmounted_device_goes_with_the_second_sigterm(devices: Devices, scratch: Path) -> None:
    log = scratch / "log"
    device = devices.loop(disk.image(scratch / "image", 16 * MIB), log=log)
    make_ext4(device)
    pid = device.pid
    with kernel.mounted(device.node, scratch / "mnt"):
        os.kill(pid, signal.SIGTERM)
        until(lambda: "another signal ends it by force" in log.read_text(), "the daemon has refused")
    os.kill(pid, signal.SIGTERM)
    assert wait_end(pid, 30)
    assert not device.exists()


def test_del_refuses_swap(devices: Devices, scratch: Path) -> None:
    device = devices.loop(disk.image(scratch / "image", 16 * MIB))
    run("mkswap", device.node)
    run("swapon", device.node)
    try:
        refused = program.ublk("del", "-n", str(device.id))
    finally:
        run("swapoff", device.node)
    assert refused.status == ExitCode.BUSY
    assert f"{device.node} is used as swap" in refused.err
    assert f"swapoff {device.node}" in refused.err


def test_del_refuses_a_device_under_another(devices: Devices, scratch: Path) -> None:
    lower = devices.loop(disk.image(scratch / "image", 16 * MIB))
    devices.loop(lower.node)
    refused = program.ublk("del", "-n", str(lower.id))
    assert refused.status == ExitCode.BUSY
    assert f"{lower.node} is held by another block device or program" in refused.err
    assert inspect.device_ids() == [0, 1]


@pytest.mark.parametrize("which", ["-a", "0 1", "1 0"])
def test_del_takes_a_stack_down(devices: Devices, scratch: Path, which: str) -> None:
    lower = devices.loop(disk.image(scratch / "image", 16 * MIB))
    devices.loop(lower.node)
    done = program.ublk("del", *which.split())
    assert (done.status, done.err, inspect.device_ids()) == (0, "", [])


@pytest.mark.parametrize("ids", [(0, 1), (1, 0)], ids=["lower first", "upper first"])
@pytest.mark.parametrize("use", [0, os.O_EXCL], ids=["open", "in use"])
def test_force_takes_a_stack_down_from_its_top(devices: Devices, scratch: Path, ids: tuple[int, int], use: int) -> None:
    """What is in the cache of the upper one still gets through the lower one."""
    image, data = disk.image(scratch / "image", 16 * MIB), disk.pattern(MIB)
    lower = devices.loop(image, id=ids[0])
    upper = devices.loop(lower.node, id=ids[1])
    with held_open(upper.node, os.O_RDWR | use) as fd:
        os.write(fd, data)
        done = program.ublk("del", "--force", "--async", "0", "1")
    assert done.status == 0, done.err
    assert image.read_bytes()[:MIB] == data
    until(lambda: not inspect.device_ids(), "both are gone when nobody has them open any more")


def test_del_refuses_a_device_with_a_mounted_partition(devices: Devices, scratch: Path) -> None:
    device = devices.loop(disk.image(scratch / "image", 16 * MIB))
    part = make_partition(device)
    run("mkfs.ext4", "-q", "-F", part)
    with kernel.mounted(part, scratch / "mnt") as point:
        refused = program.ublk("del", "-n", str(device.id))
    assert refused.status == ExitCode.BUSY
    assert f"{part} is mounted on {point}" in refused.err


def test_add_refuses_a_mounted_block_device(devices: Devices, scratch: Path) -> None:
    lower = devices.loop(disk.image(scratch / "image", 16 * MIB))
    make_ext4(lower)
    with kernel.mounted(lower.node, scratch / "mnt"):
        refused = program.ublk("add", "-t", "loop", "-f", str(lower.node))
    assert refused.status == ExitCode.BUSY
    assert f"block device {lower.node} is in use" in refused.err
