"""Mappings of shared memory, and the modes that they go with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from ublkpy.errors import ConfigError, UblkError
from ublkpy.uring.ffi import ffi
from ublkpy.uring.mode import MODES, check_sharing, sharing
from ublkpy.uring.shmem import MAX_BUFFERS, Mapping, SharedBuffers
from ublkpy.uring.uapi import Feature

OpenFds = Callable[[], set[str]]


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("memory")
    os.write(fd, b"hello".ljust(8192, b"!"))
    yield fd
    os.close(fd)


def test_mapping(memfd: int, open_fds: OpenFds) -> None:
    before = open_fds()
    mapping = Mapping(memfd, 8192, read_only=False)
    place = ffi.cast("char *", mapping.address)
    assert ffi.string(place, 5) == b"hello"
    place[0] = b"H"
    assert os.pread(memfd, 5, 0) == b"Hello"
    mapping.close()
    assert open_fds() == before


def test_mapping_of_a_file_that_cannot_be_written(memfd: int) -> None:
    fd = os.open(f"/proc/self/fd/{memfd}", os.O_RDONLY)
    with pytest.raises(PermissionError):
        Mapping(fd, 8192, read_only=False)
    mapping = Mapping(fd, 8192, read_only=True)
    assert ffi.string(ffi.cast("char *", mapping.address), 5) == b"hello"
    mapping.close()
    os.close(fd)


def test_buffers_are_unmapped_when_they_go(memfd: int, open_fds: OpenFds) -> None:
    before = open_fds()
    buffers = SharedBuffers()
    for index in (0, 5, MAX_BUFFERS - 1):
        buffers.put(index, Mapping(memfd, 8192, read_only=True))
    buffers.remove(5)
    assert buffers.indices() == [0, MAX_BUFFERS - 1]
    beyond = Mapping(memfd, 4096, read_only=True)
    with pytest.raises(OSError, match="No space left"):
        buffers.put(MAX_BUFFERS, beyond)
    beyond.close()
    for index in (0, MAX_BUFFERS - 1):
        buffers.remove(index)
    assert buffers.indices() == []
    assert open_fds() == before


@pytest.mark.parametrize("name", ["auto", "copy", "user-copy", "batch+copy", "batch+user-copy"])
def test_modes_that_go(name: str) -> None:
    check_sharing(name, recovers=False)
    if name == "auto" or "user" in name:
        check_sharing(name, recovers=True)


@pytest.mark.parametrize(
    ("name", "recovers", "why"),
    [
        ("get-data", False, "would take the place of the client's"),
        ("zero-copy", False, "serves requests in the client's memory"),
        ("batch+auto-buf", True, "serves requests in the client's memory"),
        ("copy", True, "could not even be copied"),
        ("batch+copy", True, "could not even be copied"),
    ],
)
def test_modes_that_do_not(name: str, recovers: bool, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        check_sharing(name, recovers)
    assert "user-copy" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "recovers", "taken"),
    [("batch+copy", False, "batch+copy"), ("batch+copy", True, "batch+user-copy"), ("copy", True, "user-copy")],
)
def test_with_recovery_all_can_be_copied(name: str, recovers: bool, taken: str) -> None:
    mode = sharing(MODES[name], ~Feature(0), recovers)
    assert mode.name == taken
    assert mode.flags == MODES[taken].flags | Feature.SHMEM_ZC
    assert mode.in_place


def test_a_driver_without() -> None:
    with pytest.raises(UblkError, match="lacks UBLK_F_SHMEM_ZC, which shmem_zc needs"):
        sharing(MODES["copy"], Feature.USER_COPY, recovers=False)
