"""Control commands over a real io_uring, on files that are not the driver's."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ublkpy.uring.command import CommandRing
from ublkpy.uring.ffi import check, check_libc, ffi, lib

OpenFds = Callable[[], set[str]]


@pytest.fixture
def cmd() -> Any:
    return ffi.new("struct ublksrv_ctrl_cmd *")


@pytest.fixture
def plain_file(tmp_path: Path) -> str:
    path = tmp_path / "file"
    path.touch()
    return str(path)


def test_file_without_commands(plain_file: str, cmd: Any) -> None:
    with CommandRing(plain_file) as ring, pytest.raises(OSError, match="uring_cmd: ") as caught:
        ring.call(lib.UBLK_U_CMD_GET_FEATURES, cmd, 1.0)
    assert caught.value.errno == errno.EOPNOTSUPP


def test_result_of_a_command_that_succeeds(cmd: Any) -> None:
    """/dev/null takes any command, since Linux 6.0."""
    with CommandRing("/dev/null") as ring:
        assert ring.call(lib.UBLK_U_CMD_GET_FEATURES, cmd, 1.0) == 0


def test_many_commands_on_one_ring(plain_file: str, cmd: Any) -> None:
    """The ring has four slots; each must come free again."""
    with CommandRing(plain_file) as ring:
        for _ in range(50):
            with pytest.raises(OSError, match="uring_cmd"):
                ring.call(lib.UBLK_U_CMD_GET_FEATURES, cmd, 1.0, keep=(bytes(8),))
        assert ring._kept == {}
        assert ring._in_flight == set()


def test_nudges_are_not_taken_for_answers(cmd: Any) -> None:
    with CommandRing("/dev/null") as ring:
        for _ in range(2):
            ring._nudge()
            ring._nudge()
            assert ring.call(lib.UBLK_U_CMD_GET_FEATURES, cmd, 1.0) == 0
        sent = set(ring._in_flight)
        with pytest.raises(TimeoutError):
            ring._wait(-1, 1.0, -1)
        assert not ring._in_flight & sent


def test_patience_is_nudging(cmd: Any) -> None:
    """Nobody answers for a command that there is not."""
    with CommandRing("/dev/null") as ring:
        with pytest.raises(TimeoutError):
            ring._wait(-1, 1.0, -1)
        assert ring._serial == 2  # after 0.25 s and 0.75 s


def test_answer_wins_over_an_abort_that_came_before(plain_file: str, cmd: Any) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"x")
    with CommandRing(plain_file) as ring, pytest.raises(OSError, match="uring_cmd") as caught:
        ring.call(lib.UBLK_U_CMD_GET_FEATURES, cmd, 1.0, abort_fd=read_end)
    assert caught.value.errno == errno.EOPNOTSUPP
    os.close(read_end)
    os.close(write_end)


def test_missing_path(tmp_path: Path, open_fds: OpenFds) -> None:
    before = open_fds()
    with pytest.raises(FileNotFoundError):
        CommandRing(str(tmp_path / "no"))
    assert open_fds() == before


def test_nothing_stays_open(plain_file: str, cmd: Any, open_fds: OpenFds) -> None:
    before = open_fds()
    for _ in range(20):
        with CommandRing(plain_file) as ring, pytest.raises(OSError, match="uring_cmd"):
            ring.call(lib.UBLK_U_CMD_GET_FEATURES, cmd, 1.0)
    assert open_fds() == before


def test_nothing_stays_open_when_there_is_no_room_for_the_ring(plain_file: str, open_fds: OpenFds) -> None:
    before = open_fds()
    free = os.dup(0)
    os.close(free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))
    try:
        with pytest.raises(OSError, match="io_uring_setup: ") as caught:
            CommandRing(plain_file)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.errno == errno.EMFILE
    assert open_fds() == before


def test_rings_are_not_inherited(plain_file: str) -> None:
    with CommandRing(plain_file) as ring:
        assert not os.get_inheritable(ring._ring.fd)
        assert not os.get_inheritable(ring._fd)


def test_check() -> None:
    assert check(0, "x") == 0
    assert check(7, "x") == 7
    with pytest.raises(FileNotFoundError, match="opening: No such file or directory"):
        check(-errno.ENOENT, "opening")


def test_check_libc() -> None:
    assert check_libc(0, "x") == 0
    with pytest.raises(OSError, match="fstatfs: Bad file descriptor") as caught:
        check_libc(lib.fstatfs(-1, ffi.NULL), "fstatfs")
    assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize("depth", [1, 7, 8])
def test_fetches_of_a_queue_that_nobody_serves(depth: int) -> None:
    """/dev/null takes any command; all are sent at once."""
    ring = _ring_of_eight()
    with Path("/dev/null").open("r+b") as null:
        check(lib.uq_fetch_unserved(ring, null.fileno(), 0, depth, 4096), "FETCH")
    ident, res = ffi.new("uint64_t *"), ffi.new("int32_t *")
    answers = [lib.ur_next_cqe(ring, ident, res) or res[0] for _ in range(depth + 1)]
    assert answers == [0] * depth + [-errno.EAGAIN]
    lib.ur_ring_exit(ring)


def test_more_fetches_than_the_ring_has_entries() -> None:
    ring = _ring_of_eight()
    assert lib.uq_fetch_unserved(ring, -1, 0, 9, 4096) == -errno.EBUSY
    lib.ur_ring_exit(ring)


def _ring_of_eight() -> Any:
    ring = ffi.new("struct ur_ring *")
    check(lib.ur_ring_init(ring, 8, 16, 0), "io_uring_setup")
    return ring
