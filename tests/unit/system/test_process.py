"""Hardening: what the daemon's process is protected from, with and without privileges."""

from __future__ import annotations

import logging
import mmap
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ublkpy.system import mounts, process

InChild = Callable[[Callable[[], object]], Any]

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mount namespaces and memory locks need root")


class Messages(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def has_capability(number: int) -> bool:
    """Whether this process has a capability (linux/capability.h)."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("CapEff:")]
    return bool(int(line.split()[1], 16) >> number & 1)


SYS_RESOURCE = 24


def harden() -> list[str]:
    """Harden this process and say what was not possible."""
    messages = Messages()
    process.log.setLevel(logging.INFO)
    process.log.addHandler(messages)
    process.harden()
    process.leave_mounts()
    return messages.texts


@as_root
def test_root_gets_all_of_it(in_child: InChild) -> None:
    def look() -> dict[str, object]:
        failed = harden()
        status = dict(
            line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line
        )
        return {
            "failed": failed,
            "oom": Path("/proc/self/oom_score_adj").read_text(),
            "namespace": str(Path("/proc/self/ns/mnt").readlink()),
            "cwd": str(Path.cwd()),
            "locked": int(status["VmLck"].split()[0]),
        }

    seen = in_child(look)
    if has_capability(SYS_RESOURCE):
        assert seen["failed"] == []
        assert seen["oom"] == "-1000\n"
    else:
        assert [text.split(":")[0] for text in seen["failed"]] == ["PR_SET_IO_FLUSHER", "oom_score_adj"]
    assert seen["namespace"] != str(Path("/proc/self/ns/mnt").readlink())
    assert seen["cwd"] == "/"
    assert seen["locked"] > 1000


@as_root
def test_memory_that_nobody_used_is_not_taken(in_child: InChild) -> None:
    def look() -> list[int]:
        disk = mmap.mmap(-1, 1 << 30)
        disk[4096] = 1
        harden()
        status = Path("/proc/self/smaps_rollup").read_text()
        return [int(re.findall(rf"^{name}:\s+(\d+)", status, re.M)[0]) for name in ("Rss", "Locked")]

    resident, locked = in_child(look)
    assert 1000 < locked <= resident < 512 << 10


@as_root
def test_without_privilege_it_goes_on_and_says_what_is_missing(in_child: InChild) -> None:
    def look() -> list[str]:
        os.setgid(65534)
        os.setuid(65534)
        return harden()

    failed = in_child(look)
    assert failed
    assert all(": not available: " in text for text in failed)
    assert any(text.startswith("own mount namespace: ") for text in failed)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system on a block device, mounted where blanks and letters beyond ASCII are in the way."""
    if not shutil.which("losetup") or not Path("/dev/loop-control").exists():
        pytest.skip("needs losetup and /dev/loop-control")
    image, folder = tmp_path / "image", tmp_path / "ü b"
    folder.mkdir()
    with image.open("wb") as f:
        f.truncate(4 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, folder], check=False).returncode:
        pytest.skip("cannot mount a loop device")
    yield folder
    subprocess.run(["umount", folder], check=True)


@as_root
def test_disks_of_others_are_left_behind(mounted: Path, in_child: InChild) -> None:
    def look() -> list[bool]:
        before = mounted.is_mount()
        harden()
        return [before, mounted.is_mount(), Path("/proc/self").exists(), Path(process.__file__).exists()]

    assert in_child(look) == [True, False, True, True]
    assert mounted.is_mount()
    assert mounted in [mount.point for mount in mounts.read()]


@as_root
def test_open_files_on_disks_that_are_left_behind_stay_usable(mounted: Path, in_child: InChild) -> None:
    (mounted / "disk.img").write_bytes(b"data")

    def look() -> str:
        fd = os.open(mounted / "disk.img", os.O_RDWR)
        harden()
        return os.pread(fd, 4, 0).decode()

    assert in_child(look) == "data"


@as_root
def test_disk_can_be_unmounted_elsewhere_while_the_daemon_lives(mounted: Path, tmp_path: Path) -> None:
    """The namespace of the daemon must not keep the file system alive."""
    ready_r, ready_w = os.pipe()
    go_r, go_w = os.pipe()
    daemon = os.fork()
    if daemon == 0:
        os.close(go_w)
        try:
            harden()
            os.write(ready_w, b"x")
            os.read(go_r, 1)
        finally:
            os._exit(0)
    os.close(go_r)
    os.read(ready_r, 1)
    device = next(mount.source for mount in mounts.read() if mount.point == mounted)
    subprocess.run(["umount", mounted], check=True)
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))  # EBUSY if it were still mounted anywhere
    except FileNotFoundError:
        pass
    finally:
        os.close(go_w)
        os.waitpid(daemon, 0)
        for fd in (ready_r, ready_w):
            os.close(fd)
        subprocess.run(["mount", "-o", "loop", tmp_path / "image", mounted], check=True)


def test_inherited_files_are_closed(in_child: InChild) -> None:
    def look() -> list[bool]:
        inherited, own = os.open("/dev/null", os.O_RDONLY), os.open("/dev/null", os.O_RDONLY)
        os.set_inheritable(inherited, True)
        process.close_inherited_files()
        return [Path(f"/proc/self/fd/{fd}").exists() for fd in (0, 1, 2, inherited, own)]

    assert in_child(look) == [True, True, True, False, True]
