"""The same data in every mode."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from ublkpy.driver import inspect
from ublkpy.errors import ConfigError, ExitCode, UblkError
from ublkpy.life.recover import recover
from ublkpy.uring import queue
from ublkpy.uring.mode import MODES, fastest
from ublkpy.uring.uapi import Feature

from . import disk, kernel, load, program
from .devices import MIB, Device, Devices, held_open, until
from .kernel import run

MIXED = ["--ioengine=libaio", "--iodepth=32", "--rw=randrw", "--bssplit=4k/40:8k/20:12k/10:64k/20:512k/10", "--size=8m"]


def mode_of(device: Device) -> str:
    known = device.status().known
    assert known
    return known.mode


@pytest.mark.parametrize("queues", [1, 2])
def test_loop_keeps_what_fio_writes(devices: Devices, scratch: Path, mode: str, queues: int) -> None:
    file = disk.image(scratch / "image", 16 * MIB)
    device = devices.loop(file, mode=mode, queues=queues, depth=32)
    assert mode_of(device) == mode
    load.verify(device.node, *MIXED, f"--numjobs={queues}", "--offset_increment=8m")
    assert disk.read(device.node, 0, 16 * MIB) == file.read_bytes()
    assert any(file.read_bytes())


@pytest.mark.parametrize("queues", [1, 2])
def test_null_answers_everything(devices: Devices, mode: str, queues: int) -> None:
    device = devices.null(mode=mode, queues=queues)
    with load.running(device, *MIXED, f"--numjobs={queues}") as fio:
        status, output = load.result(fio)
    assert status == 0, output
    run("blkdiscard", device.node)
    run("blkdiscard", "--zeroout", "--length", "1M", device.node)


def test_a_file_system(devices: Devices, scratch: Path, mode: str) -> None:
    file = disk.image(scratch / "image", 64 * MIB)
    device = devices.loop(file, mode=mode)
    run("mkfs.ext4", "-q", "-F", device.node)
    tree = Path(os.__file__).parent / "json"
    with kernel.mounted(device.node, scratch / "mnt") as point:
        shutil.copytree(tree, point / "tree")
        (point / "large").write_bytes(disk.pattern(4 * MIB))
    run("fsck.ext4", "-fn", device.node)
    with kernel.mounted(device.node, scratch / "mnt", "-o", "ro") as point:
        run("diff", "-r", tree, point / "tree")
        assert (point / "large").read_bytes() == disk.pattern(4 * MIB)


def test_odd_places_in_a_buffered_file(devices: Devices, scratch: Path, way: str) -> None:
    before = disk.pattern(4 * MIB)
    file = disk.image(scratch / "image", 4 * MIB, before)
    device = devices.loop(file, mode=way, direct=False, offset=512, size=2 * MIB)
    assert disk.read(device.node, 0, 2 * MIB) == before[512 : 2 * MIB + 512]
    disk.write(device.node, 512 * 3, b"x" * 512 * 5)
    after = file.read_bytes()
    assert after[512 * 4 : 512 * 9] == b"x" * 512 * 5
    assert after[: 512 * 4] + after[512 * 9 :] == before[: 512 * 4] + before[512 * 9 :]


def test_an_error_of_the_backing_is_one_of_the_request(devices: Devices, scratch: Path, way: str) -> None:
    log = scratch / "log"
    file = disk.image(scratch / "image", 4 * MIB, disk.pattern(4 * MIB))
    device = devices.loop(file, mode=way, log=log)
    os.truncate(file, 2 * MIB)
    with pytest.raises(OSError, match="Input/output error"):
        disk.read(device.node, 3 * MIB, 4096)
    until(lambda: "READ at sector 6144 failed: Input/output error" in log.read_text(), "the log tells of it")
    assert disk.read(device.node, 0, 2 * MIB) == disk.pattern(4 * MIB)[: 2 * MIB]


def test_del_under_load(devices: Devices, scratch: Path, way: str) -> None:
    device = devices.loop(disk.image(scratch / "image", 8 * MIB), mode=way, queues=2)
    options = ["--ioengine=libaio", "--iodepth=32", "--rw=randrw", "--bs=4k", "--time_based", "--runtime=60"]
    with load.running(device, *options) as fio:
        devices.remove(device)
        status, output = load.result(fio)
    assert status != 0, output
    assert not device.exists()


def test_recovery_under_load_loses_nothing(devices: Devices, scratch: Path, mode: str) -> None:
    device = devices.loop(disk.image(scratch / "image", 8 * MIB), mode=mode, recovery="reissue")
    options = ["--ioengine=libaio", "--iodepth=16", "--rw=randwrite", "--bs=4k", "--size=2m", "--verify=crc32c"]
    with load.running(device, *options, "--rate_iops=,400") as fio:
        until(lambda: device.completed("writes") > 50, "fio writes")
        os.kill(device.pid, signal.SIGKILL)
        recover(device.id)
        status, output = load.result(fio)
    assert status == 0, output
    assert mode_of(device) == mode


@pytest.mark.parametrize("name", ["auto-buf", "batch+auto-buf"])
def test_requests_that_the_driver_cannot_register_are_copied(
    devices: Devices, scratch: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the tags find no place in the ring's table of buffers."""
    if MODES[name].flags & ~inspect.features():
        pytest.skip(f"this driver has no {name}")
    monkeypatch.setattr(queue, "_BUFFER_SLOTS", 8)
    file = disk.image(scratch / "image", 8 * MIB)
    device = devices.loop(file, mode=name, depth=16)
    load.verify(device.node, *MIXED)
    assert disk.read(device.node, 0, 8 * MIB) == file.read_bytes()


# -- which mode -----------------------------------------------------------------------------


def test_the_default_is_the_fastest(devices: Devices, scratch: Path) -> None:
    device = devices.loop(disk.image(scratch / "image", MIB))
    assert mode_of(device) == fastest(inspect.features(), 128).name
    assert mode_of(device) in program.ublk("list").out
    assert mode_of(devices.null()) == fastest(inspect.features(), 128, user_copy=True).name
    if Feature.BATCH_IO in inspect.features():
        assert (mode_of(device), mode_of(devices.null())) == ("batch+copy", "batch+user-copy")


@pytest.mark.any_kernel
@pytest.mark.parametrize(
    ("switches", "name"),
    [
        (["-z"], "auto-buf"),
        (["--usercopy"], "user-copy"),
        (["-g", "1"], "get-data"),
        (["-g", "0"], None),
        (["-b"], "batch+copy"),
        (["-b", "-z"], "batch+auto-buf"),
        (["-b", "--user_copy"], "batch+user-copy"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_switches_of_ublksrv(devices: Devices, switches: list[str], name: str | None) -> None:
    wanted = MODES[name] if name else fastest(inspect.features(), 128, user_copy=True)
    added = program.ublk("add", "-t", "null", *switches)
    if wanted.flags & ~inspect.features():
        assert (added.status, added.out, inspect.device_ids()) == (ExitCode.FAILED, "", [])
        assert "this kernel's ublk driver lacks UBLK_F_" in added.err
        assert f"which mode {wanted.name} needs" in added.err
        return
    assert added.status == 0, added.err
    assert mode_of(devices.adopt(0)) == wanted.name


def test_a_mode_that_the_driver_lacks(devices: Devices) -> None:
    if Feature.BATCH_IO in inspect.features():
        pytest.skip("this driver has all modes")
    with pytest.raises(UblkError, match=r"lacks UBLK_F_BATCH_IO, which mode batch\+copy needs"):
        devices.null(mode="batch+copy")


def test_batches_need_more_than_one_request(devices: Devices) -> None:
    assert mode_of(devices.null(depth=1)) == "user-copy"
    if Feature.BATCH_IO in inspect.features():
        with pytest.raises(ConfigError, match=r"mode batch\+copy needs a depth of 2 or more"):
            devices.null(mode="batch+copy", depth=1)


def test_a_device_held_open_goes_in_every_mode(devices: Devices, way: str) -> None:
    device = devices.null(mode=way)
    with held_open(device.node):
        assert device.exists()
    devices.remove(device)
    assert not device.exists()
