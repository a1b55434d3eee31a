"""The queue engine's edges: what can be had without the driver."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from ublkpy.uring.ffi import lib
from ublkpy.uring.mode import MODES
from ublkpy.uring.queue import IoError, Linear, Map, Null, Queue, _to_c

OpenFds = Callable[[], set[str]]


def test_file_that_cannot_be_mapped(open_fds: OpenFds) -> None:
    fd = os.open("/dev/null", os.O_RDWR)
    before = open_fds()
    with pytest.raises(OSError, match="set-up of queue 2") as caught:
        Queue(fd, 2, 4, 4096, MODES["copy"], Null())
    assert caught.value.errno == errno.ENODEV
    assert open_fds() == before
    os.close(fd)


@pytest.mark.parametrize("backing", [True, False])
def test_driver_that_refuses_every_fetch(backing: bool, open_fds: OpenFds) -> None:
    before = open_fds()
    fd = os.open("/dev/zero", os.O_RDWR)
    target_map: Map = Linear(fd) if backing else Null()
    for depth in (1, 4, 128, 4096):
        queue = Queue(fd, 0, depth, 4096, MODES["copy"], target_map)
        with pytest.raises(OSError, match="queue: ") as caught:
            queue.run()
        assert caught.value.errno == errno.EOPNOTSUPP
        queue.close()
    os.close(fd)
    assert open_fds() == before


def test_backing_that_is_not_open(open_fds: OpenFds) -> None:
    fd = os.open("/dev/zero", os.O_RDWR)
    before = open_fds()
    with pytest.raises(OSError, match="set-up of queue 0") as caught:
        Queue(fd, 0, 4, 4096, MODES["copy"], Linear(1 << 20))
    assert caught.value.errno == errno.EBADF
    assert open_fds() == before
    os.close(fd)


def test_map_of_nothing() -> None:
    assert _to_c(Null()).route == lib.UQ_NULL  # type: ignore[attr-defined]


def test_linear_map() -> None:
    c_map: object = _to_c(Linear(5, 1 << 40, True))
    assert c_map.route == lib.UQ_LINEAR  # type: ignore[attr-defined]
    assert (c_map.fd, c_map.offset, c_map.is_block_device) == (5, 1 << 40, 1)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("op", "name"), [(0, "READ"), (1, "WRITE"), (5, "WRITE_ZEROES"), (4, "op 4"), (99, "op 99")])
def test_name_of_a_failed_operation(op: int, name: str) -> None:
    assert IoError(op, 0, errno.EIO, 1).op_name == name
