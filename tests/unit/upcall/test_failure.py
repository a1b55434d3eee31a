"""What becomes of an exception in a target."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from ublkpy.upcall.failure import Failures


@pytest.mark.parametrize(
    ("error", "result"),
    [
        (OSError(errno.ENOSPC, "full"), -errno.ENOSPC),
        (ConnectionRefusedError(errno.ECONNREFUSED, "no server"), -errno.ECONNREFUSED),
    ],
)
@pytest.mark.logs
def test_what_is_an_answer(error: BaseException, result: int) -> None:
    assert Failures("disk").result(error) == result


@pytest.mark.logs
def test_what_it_says_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Not what the number says already, and not for each of many."""
    failures = Failures("disk")
    for _ in range(5):
        failures.result(OSError(errno.EILSEQ, "block 3 has rotted"))
        failures.result(OSError(errno.EIO, os.strerror(errno.EIO)))
    said = [record.message for record in caplog.records]
    assert said == [f"target disk: [Errno 84] block 3 has rotted ({n} such errors so far)" for n in (1, 2, 4)]


@pytest.mark.parametrize(
    "error",
    [
        socket.gaierror(socket.EAI_NONAME, "unknown name"),  # a negative one would be a success
        OSError("no number"),
        OSError("x", "no number either"),
        OSError(4096, "more than there are"),
        TimeoutError(),
        KeyError("a bug"),
    ],
    ids=repr,
)
def test_what_is_none(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    assert Failures("disk").result(error) == -errno.EIO
    assert "target disk failed (1 times so far)" in caplog.text
