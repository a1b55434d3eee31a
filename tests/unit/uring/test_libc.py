"""System calls that Python's ``os`` lacks."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ublkpy.uring import libc

InChild = Callable[[Callable[[], object]], Any]

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mount namespaces need root")


def test_file_system_type_is_what_stat_shows(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    shown = subprocess.run(["stat", "-f", "-c", "%t", path], capture_output=True, text=True, check=True).stdout
    with path.open() as f:
        assert libc.file_system_type(f.fileno()) == int(shown, 16)


def test_file_system_type_of_what_is_not_open() -> None:
    with pytest.raises(OSError, match="fstatfs: ") as caught:
        libc.file_system_type(1 << 20)
    assert caught.value.errno == errno.EBADF


def test_direct_io_alignment_is_what_reads_take(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 65536)
    with path.open("rb") as f:
        told = libc.direct_io_alignment(f.fileno())
    if told is None:
        pytest.skip(f"the file system of {tmp_path} does not tell")
    assert told == 0 or (told & (told - 1) == 0 and told <= 65536)


def test_direct_io_alignment_of_what_is_no_file() -> None:
    read_end, write_end = os.pipe()
    assert not libc.direct_io_alignment(read_end)
    os.close(read_end)
    os.close(write_end)
    with pytest.raises(OSError, match="statx: ") as caught:
        libc.direct_io_alignment(1 << 20)
    assert caught.value.errno == errno.EBADF


@as_root
def test_mounts_of_a_namespace_of_its_own(in_child: InChild, tmp_path: Path) -> None:
    def look() -> str:
        libc.unshare_mounts()
        return str(Path("/proc/self/ns/mnt").readlink())

    assert in_child(look) != str(Path("/proc/self/ns/mnt").readlink())


def test_detaching_what_is_not_mounted(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="ü") as caught:
        libc.detach_mount(str(tmp_path / "ü"))
    assert caught.value.errno in (errno.ENOENT, errno.EPERM)
