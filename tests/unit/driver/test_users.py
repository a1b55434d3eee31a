"""Who uses a block device. The kernel's own loop devices stand for ublk devices here."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ublkpy.driver import users


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A block device that nobody uses."""
    if not shutil.which("losetup") or os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        pytest.skip("needs losetup, /dev/loop-control and root")
    image = tmp_path / "image"
    with image.open("wb") as f:
        f.truncate(16 << 20)
    done = subprocess.run(["losetup", "--find", "--show", image], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"losetup: {done.stderr.strip()}")
    yield Path(done.stdout.strip())
    subprocess.run(["losetup", "--detach", done.stdout.strip()], check=True)


def sysfs(device: Path) -> Path:
    return Path("/sys/block") / device.name


def test_device_that_does_not_exist_is_unused() -> None:
    users.check_unused(1 << 19)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENODEV])
@pytest.mark.parametrize("where", ["glob", "read_text", "iterdir"])
def test_device_that_goes_while_it_is_looked_at_is_unused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, number: int
) -> None:
    def gone(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "ublkb1048575").mkdir()
    monkeypatch.setattr(users, "BLOCK", tmp_path)
    monkeypatch.setattr(Path, where, gone)
    users.check_unused(1048575)


def test_unused_device(device: Path) -> None:
    assert users._mount_point(sysfs(device)) is None
    assert users._swap(sysfs(device)) is None
    assert users._holder(sysfs(device)) is None
    assert users._exclusive(sysfs(device)) is None


def test_mounted_device(device: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    folder.mkdir()
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    subprocess.run(["mount", device, folder], check=True)
    try:
        found = users._mount_point(sysfs(device))
        assert users._exclusive(sysfs(device)) is not None
    finally:
        subprocess.run(["umount", folder], check=True)
    assert found is not None
    assert found[0] == f"mounted on {folder}"
    assert found[1].startswith("unmount it first: umount ")
    assert users._mount_point(sysfs(device)) is None


def test_device_that_is_swap(device: Path) -> None:
    subprocess.run(["mkswap", device], check=True, capture_output=True)
    if subprocess.run(["swapon", device], check=False, capture_output=True).returncode:
        pytest.skip("this kernel allows no swap")
    try:
        found = users._swap(sysfs(device))
    finally:
        subprocess.run(["swapoff", device], check=True)
    assert found == ("used as swap", f"take it out first: swapoff {device}")


def test_device_that_is_held(device: Path) -> None:
    fd = os.open(device, os.O_RDONLY | os.O_EXCL)
    try:
        found = users._exclusive(sysfs(device))
    finally:
        os.close(fd)
    assert found == ("held by another block device or program", f"see what uses it with: fuser -v {device}")


def test_plain_readers_do_not_count(device: Path) -> None:
    fd = os.open(device, os.O_RDONLY)
    try:
        assert users._exclusive(sysfs(device)) is None
    finally:
        os.close(fd)


def test_openers_are_named_also_when_the_node_is_gone() -> None:
    """A file stands for the node of a device that nobody has."""
    if os.geteuid() != 0:
        pytest.skip("writing to /dev needs root")
    node, dev_id = Path("/dev/ublkc1048575"), 1048575
    if node.exists():
        pytest.skip(f"{node} exists")
    me = f"process {os.getpid()} ({Path('/proc/self/comm').read_text().strip()})"
    assert users.openers(dev_id) == []
    fd = os.open(node, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        assert users.openers(dev_id) == [me]
        assert users.openers(104857) == []
        node.unlink()
        assert users.openers(dev_id) == [me]
    finally:
        os.close(fd)
        node.unlink(missing_ok=True)
    assert users.openers(dev_id) == []
