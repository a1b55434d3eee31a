"""The targets that keep what is written: that they do, through file systems, load and the death of their daemon."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ublkpy.life.recover import recover
from ublkpy.tgt.mirror import MirrorTarget

from . import disk, kernel, load, program
from .devices import MIB, Device, Devices
from .test_filesystem import TREE, checksums

Options = dict[str, Any]


def images(scratch: Path, *sizes: int) -> tuple[Path, ...]:
    return tuple(disk.image(scratch / f"image{n}", size) for n, size in enumerate(sizes))


def mirrors(first: Path, second: Path, third: Path, fourth: Path) -> tuple[MirrorTarget, MirrorTarget]:
    return MirrorTarget({"files": (first, second)}), MirrorTarget({"files": (third, fourth)})


KEEPING: dict[str, Callable[[Path], Options]] = {
    "stripe": lambda scratch: {"files": images(scratch, *[20 * MIB] * 3), "chunk": 16384},
    "concat": lambda scratch: {"files": images(scratch, 20 * MIB, 8 * MIB, 32 * MIB)},
    "mirror": lambda scratch: {"files": images(scratch, 61 * MIB, 64 * MIB)},
    "ram": lambda _scratch: {"size": 60 * MIB},
    "fault": lambda scratch: {"file": images(scratch, 60 * MIB)[0], "delay": 10**5},
    "fault-in-memory": lambda _scratch: {"size": 60 * MIB, "delay": 10**5},
    "raid10": lambda scratch: {"files": mirrors(*images(scratch, *[31 * MIB] * 4))},
}
"""Of each target, options for a device of about 60 MiB in a folder."""


@pytest.fixture(params=KEEPING)
def device(request: pytest.FixtureRequest, devices: Devices, scratch: Path) -> Device:
    target = {"raid10": "stripe", "fault-in-memory": "fault"}.get(request.param, request.param)
    return devices.add(target, recovery="reissue", queues=2, **KEEPING[request.param](scratch))


def test_random_writes(device: Device) -> None:
    load.verify(device.node, "--rw=randwrite", "--bs=4k-256k", "--ioengine=libaio", "--iodepth=16", "--size=12M")


def test_a_tree_of_files(device: Device, scratch: Path) -> None:
    kernel.run("mkfs.ext4", "-q", "-F", device.node)
    with kernel.mounted(device.node, scratch / "mnt") as point:
        shutil.copytree(TREE, point / "tree", ignore=shutil.ignore_patterns("__pycache__"))
    kernel.run("fsck.ext4", "-fn", device.node)
    with kernel.mounted(device.node, scratch / "mnt", "-o", "ro") as point:
        assert checksums(point / "tree") == checksums(TREE)


def test_what_was_flushed_outlives_the_daemon(device: Device) -> None:
    data = disk.pattern(24 * MIB)
    for at in range(0, len(data), MIB):
        disk.write(device.node, at, data[at : at + MIB])
    disk.flush(device.node)
    device.kill_daemon()
    recover(device.id)
    for at in range(0, len(data), MIB):
        assert disk.read(device.node, at, MIB) == data[at : at + MIB]
    disk.write(device.node, 0, data[MIB : 2 * MIB])
    assert disk.read(device.node, 0, MIB) == data[MIB : 2 * MIB]


PAGES = Path(__file__).parents[2] / "docs/targets"


@pytest.mark.any_kernel
@pytest.mark.parametrize("target", ["concat", "error", "full", "mirror", "pattern", "ram", "stripe", "zero"])
def test_the_example_of_its_page(devices: Devices, scratch: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """The commands that it begins with."""
    monkeypatch.chdir(scratch)
    found = re.search(r"(?:^    .*\n)+", (PAGES / f"{target}.md").read_text(), re.MULTILINE)
    assert found
    for command in found[0].splitlines():
        name, *args = shlex.split(command, comments=True)
        if name != "ublk":
            kernel.run(name, *args)
            continue
        if args[0] == "add" and Path("/dev/ublkb0").exists():
            devices.remove(Device(0))
        done = program.ublk(*args)
        assert done.status == 0, done.err
        assert args[0] != "add" or done.out == "/dev/ublkb0\n"
        devices.adopt(0)
    assert target in program.ublk("list").out
