"""A device that gets another size while it is served."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from ublkpy import Device as Api
from ublkpy.daemon.channel import RESIZE, ask, held
from ublkpy.driver import inspect
from ublkpy.errors import BusyError, ConfigError, ExitCode, UblkError
from ublkpy.life.recover import recover
from ublkpy.uring.uapi import Feature

from . import disk, load, program
from .devices import MIB, Device, Devices, configure, until

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def can_resize() -> None:
    if Feature.UPDATE_SIZE not in inspect.features():
        pytest.skip("this driver has no UBLK_F_UPDATE_SIZE (Linux 6.16)")


def size_of(device: Device) -> int:
    """As lsblk sees it."""
    done = subprocess.run(["lsblk", "-bdno", "SIZE", device.node], capture_output=True, text=True, check=True)
    return int(done.stdout)


def resize(device: Device, size: int | str, *options: str) -> program.Result:
    return program.ublk("resize", "-n", str(device.id), str(size), *options)


def test_a_driver_that_cannot_says_so(devices: Devices) -> None:
    if Feature.UPDATE_SIZE in inspect.features():
        pytest.skip("this driver has UBLK_F_UPDATE_SIZE")
    refused = resize(devices.null(), "1G")
    assert refused.status == ExitCode.FAILED
    assert "lacks UBLK_F_UPDATE_SIZE" in refused.err


def test_null(can_resize: None, devices: Devices) -> None:
    device = devices.null()
    assert resize(device, "1G") == program.Result(0, "", "")
    assert size_of(device) == 1 << 30
    assert len(disk.read(device.node, (1 << 30) - 4096, 4096)) == 4096
    assert resize(device, "1M").status == 0
    assert size_of(device) == MIB


def test_a_file_grows_and_shrinks_with_its_device(can_resize: None, devices: Devices, scratch: Path) -> None:
    data = disk.pattern(8 * MIB)
    file = disk.image(scratch / "image", 8 * MIB, data)
    device = devices.loop(file, recovery="queue", queues=2)
    for size in (16 * MIB, 12 * MIB + 512, 4 * MIB, 4 * MIB, 6 * MIB):
        Api(device.id).resize(size)
        assert (size_of(device), file.stat().st_size) == (size, size)
        assert device.status().to_dict()["size"] == size
        known = device.status().known
        assert known
        assert known.target["dev_size"] == size
    assert disk.read(device.node, 0, 4 * MIB) == data[: 4 * MIB]
    assert disk.read(device.node, 4 * MIB, 2 * MIB) == bytes(2 * MIB)
    disk.write(device.node, 6 * MIB - 4096, b"end!" * 1024, 0)
    device.kill_daemon()
    recover(device.id)
    assert (size_of(device), file.stat().st_size) == (6 * MIB, 6 * MIB)
    assert file.read_bytes()[-4096:] == b"end!" * 1024


def test_a_part_of_a_file(can_resize: None, devices: Devices, scratch: Path) -> None:
    """What lies behind the device stays."""
    file = disk.image(scratch / "image", 8 * MIB, disk.pattern(8 * MIB))
    device = devices.loop(file, offset=MIB, size=4 * MIB, recovery="queue")
    for size in (2 * MIB, 7 * MIB):
        Api(device.id).resize(size)
        assert (size_of(device), file.stat().st_size) == (size, 8 * MIB)
    assert file.read_bytes() == disk.pattern(8 * MIB)
    device.kill_daemon()
    recover(device.id)
    assert size_of(device) == 7 * MIB
    Api(device.id).resize(9 * MIB)
    assert file.stat().st_size == 10 * MIB


@pytest.mark.parametrize("queues", [1, 2])
def test_under_load(can_resize: None, devices: Devices, scratch: Path, queues: int) -> None:
    """Requests go on in the part that stays, and none is lost."""
    device = devices.loop(disk.image(scratch / "image", 16 * MIB), queues=queues)
    options = ("--rw=randwrite", "--bs=4k", "--size=4M", "--iodepth=16", "--verify=crc32c", "--verify_backlog=32")
    with load.running(device, *options, "--time_based", "--runtime=60") as fio:
        for size in (8 * MIB, 32 * MIB, 5 * MIB, 64 * MIB):
            before = device.completed("writes")
            Api(device.id).resize(size)
            assert size_of(device) == size
            until(lambda before=before: device.completed("writes") > before, "requests go on")  # type: ignore[misc]
            assert fio.poll() is None
        fio.terminate()
        status, output = load.result(fio)
    assert "error" not in output.lower(), output
    assert status in (0, 128), output


def test_a_mounted_file_system_is_not_cut(can_resize: None, devices: Devices, scratch: Path) -> None:
    device = devices.loop(disk.image(scratch / "image", 32 * MIB))
    subprocess.run(["mkfs.ext4", "-q", device.node], check=True)
    folder = scratch / "mnt"
    folder.mkdir()
    subprocess.run(["mount", device.node, folder], check=True)
    try:
        refused = resize(device, "16M")
        assert refused.status == ExitCode.BUSY
        assert f"is mounted on {folder}: what is behind the first 16M would be lost" in refused.err
        assert "--force" in refused.err
        assert size_of(device) == 32 * MIB
        assert resize(device, "64M").status == 0
        subprocess.run(["resize2fs", device.node], check=True, capture_output=True)
        assert os.statvfs(folder).f_blocks * os.statvfs(folder).f_frsize > 40 * MIB
    finally:
        subprocess.run(["umount", folder], check=True)
    subprocess.run(["e2fsck", "-fn", device.node], check=True, capture_output=True)


def test_force_cuts_what_is_in_use(can_resize: None, devices: Devices, scratch: Path) -> None:
    file = disk.image(scratch / "image", 8 * MIB)
    device = devices.loop(file)
    fd = os.open(device.node, os.O_RDONLY | os.O_EXCL)
    try:
        with pytest.raises(BusyError, match="would be lost"):
            Api(device.id).resize(4 * MIB)
        assert resize(device, "4M", "--force").status == 0
    finally:
        os.close(fd)
    assert (size_of(device), file.stat().st_size) == (4 * MIB, 4 * MIB)


@pytest.mark.any_kernel
@pytest.mark.parametrize("size", [0, 1000, 4 * MIB + 1])
def test_blocks_are_whole(can_resize: None, devices: Devices, scratch: Path, size: int) -> None:
    lower = devices.loop(disk.image(scratch / "image", 8 * MIB))
    assert lower.queue("logical_block_size") == "512"
    with pytest.raises(ConfigError, match="not a multiple of the device's blocks of 512 bytes"):
        Api(lower.id).resize(size)
    assert size_of(lower) == 8 * MIB


def test_a_block_device_that_is_too_short(can_resize: None, devices: Devices, scratch: Path) -> None:
    lower = devices.loop(disk.image(scratch / "image", 8 * MIB))
    upper = devices.loop(lower.node)
    Api(upper.id).resize(4 * MIB)
    assert (size_of(upper), size_of(lower)) == (4 * MIB, 8 * MIB)
    with pytest.raises(UblkError, match="too short") as caught:
        Api(upper.id).resize(16 * MIB)
    assert caught.value.hint == "grow that first"
    Api(lower.id).resize(16 * MIB)
    Api(upper.id).resize(16 * MIB)
    assert size_of(upper) == 16 * MIB


def test_what_cannot_grow(can_resize: None, devices: Devices, scratch: Path) -> None:
    file = disk.image(scratch / "image", 8 * MIB)
    device = devices.loop(file, read_only=True)
    with pytest.raises(UblkError, match="too short") as caught:
        Api(device.id).resize(16 * MIB)
    assert caught.value.hint == f"grow it with: truncate -s {16 * MIB} {file}"
    os.truncate(file, 16 * MIB)
    Api(device.id).resize(16 * MIB)
    assert size_of(device) == 16 * MIB


def test_a_file_that_cannot_be_so_long(can_resize: None, devices: Devices, scratch: Path) -> None:
    """The file system cannot give the file its size, and all stays as it is."""
    lower = devices.loop(disk.image(scratch / "disk", 32 * MIB))
    subprocess.run(["mkfs.ext4", "-qFb", "4096", lower.node], check=True)
    folder = scratch / "mnt"
    folder.mkdir()
    subprocess.run(["mount", lower.node, folder], check=True)
    try:
        file = disk.image(folder / "image", 8 * MIB)
        device = devices.loop(file)
        with pytest.raises(UblkError, match=f"cannot give {file} 17T: File too large"):
            Api(device.id).resize(17 << 40)
        assert (size_of(device), file.stat().st_size) == (8 * MIB, 8 * MIB)
        Api(device.id).resize(4 * MIB)
        assert (size_of(device), file.stat().st_size) == (4 * MIB, 4 * MIB)
        devices.remove(device)
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("size", [MIB, 1 << 30])
def test_a_device_with_metadata_keeps_its_size(can_resize: None, devices: Devices, size: int) -> None:
    if Feature.INTEGRITY not in inspect.features():
        pytest.skip("this driver has no UBLK_F_INTEGRITY (Linux 7.0)")
    device = devices.null(metadata_size=8)
    before = size_of(device)
    with pytest.raises(UblkError, match="a device with metadata keeps its size"):
        Api(device.id).resize(size)
    assert size_of(device) == before


def test_without_a_daemon(can_resize: None, devices: Devices) -> None:
    device = devices.null(recovery="queue")
    device.kill_daemon()
    with pytest.raises(UblkError, match="nobody serves it"):
        Api(device.id).resize(16 * MIB)


@pytest.mark.any_kernel
def test_no_such_device() -> None:
    refused = program.ublk("resize", "-n", "7", "1G")
    assert refused.status == ExitCode.NO_DEVICE


@pytest.mark.any_kernel
def test_a_device_from_python(devices: Devices, tmp_path: Path) -> None:
    """The class that Python programs use does what the command does."""
    file = tmp_path / "disk.yaml"
    file.write_text("target:\n  type: null\n  size: 1M\n")
    device = Api.add(file)
    devices.adopt(device.dev_id)
    assert device in Api.all()
    assert device.exists()
    assert device.status().size == MIB
    device.delete()
    assert not device.exists()
    other = Api.add(configure("null", size=2 * MIB))
    devices.adopt(other.dev_id)
    assert Path(other.node).is_block_device()


def test_only_one_at_a_time(can_resize: None, devices: Devices, scratch: Path) -> None:
    """Two would cut the backing under the device that the other one made; nor may anybody else change it meanwhile."""
    file = disk.image(scratch / "image", 8 * MIB)
    device = devices.loop(file)
    with held(device.id, RESIZE, 10), pytest.raises(BusyError, match="another command is about to resize the device"):
        Api(device.id).resize(4 * MIB)
    with held(device.id, RESIZE, 10), pytest.raises(UblkError, match="has another size by now"):
        ask(device.id, "resize", 10, size=4 * MIB, done=True)
    assert file.stat().st_size == 8 * MIB
    Api(device.id).resize(4 * MIB)
    assert (file.stat().st_size, device.status().size) == (4 * MIB, 4 * MIB)
