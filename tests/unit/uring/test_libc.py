"""System calls that Python's ``os`` lacks."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ublkpy.uring import libc

InChild = Callable[[Callable[[], object]], Any]

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mount namespaces need root")


def test_hole_reads_as_zeros_and_the_size_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 16384)
    with path.open("r+b") as f:
        libc.punch_hole(f.fileno(), 4096, 8192)
        libc.punch_hole(f.fileno(), 1 << 20, 4096)  # behind the end
    assert path.read_bytes() == b"x" * 4096 + bytes(8192) + b"x" * 4096


def test_hole_in_what_has_none() -> None:
    read_end, write_end = os.pipe()
    with pytest.raises(OSError, match="fallocate: ") as caught:
        libc.punch_hole(write_end, 0, 4096)
    assert caught.value.errno == errno.ESPIPE
    os.close(read_end)
    os.close(write_end)


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
