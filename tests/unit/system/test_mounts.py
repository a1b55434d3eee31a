"""The kernel's table of mounts."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ublkpy.system import mounts
from ublkpy.system.mounts import Mount


def test_proc_is_mounted() -> None:
    (proc,) = {mount for mount in mounts.read() if mount.point == Path("/proc")}
    assert proc.source == "proc"
    number = Path("/proc").stat().st_dev
    assert proc.devno == f"{os.major(number)}:{os.minor(number)}"


def test_mounts_of_nobody() -> None:
    assert mounts.read("4194304") == []


@pytest.mark.parametrize(
    ("line", "mount"),
    [
        ("36 35 98:0 / / rw - ext3 /dev/root rw", Mount(Path("/"), "98:0", "/dev/root")),
        (
            "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:2 - ext3 /dev/sda1 rw,errors=continue",
            Mount(Path("/mnt2"), "98:0", "/dev/sda1"),
        ),
        (r"36 35 0:5 / /a\040b\011c\134d rw - tmpfs none rw", Mount(Path("/a b\tc\\d"), "0:5", "none")),
        (r"36 35 0:5 / /ü\040b rw - nfs host:/ü\040c rw", Mount(Path("/ü b"), "0:5", "host:/ü c")),
    ],
)
def test_line(line: str, mount: Mount) -> None:
    assert mounts._parse(line) == mount


@pytest.fixture
def odd_mount(tmp_path: Path) -> Iterator[Path]:
    """A mount whose name is as odd as names get."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    path = tmp_path / "ü b\\040 - x"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "an odd - source", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


def test_odd_names(odd_mount: Path) -> None:
    (found,) = [mount for mount in mounts.read() if mount.point == odd_mount]
    assert found.source == "an odd - source"
