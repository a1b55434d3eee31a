"""The module that plugins for nbdkit import."""

from __future__ import annotations

import errno
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ublkpy.tgt import nbdkit_module as nbdkit

MIB = 1 << 20


def test_constants() -> None:
    nbdkit._install()
    found: Any = sys.modules["nbdkit"]
    assert (found.THREAD_MODEL_SERIALIZE_CONNECTIONS, found.THREAD_MODEL_PARALLEL) == (0, 3)
    assert (found.FLAG_MAY_TRIM, found.FLAG_FUA, found.FLAG_REQ_ONE, found.FLAG_FAST_ZERO) == (1, 2, 4, 8)
    assert (found.FUA_NONE, found.FUA_EMULATE, found.FUA_NATIVE) == (0, 1, 2)
    assert (found.EXTENT_HOLE, found.EXTENT_ZERO) == (1, 2)


def test_numbers_in_texts() -> None:
    assert nbdkit.parse_size("100M") == 100 * MIB
    with pytest.raises(ValueError, match="is not a size"):
        nbdkit.parse_size("big")
    assert nbdkit.parse_delay("delay", "1.2") == (1, 200_000_000)
    assert nbdkit.parse_delay("delay", "120ms") == (0, 120_000_000)
    assert nbdkit.parse_delay("delay", "1.5us") == (0, 1500)
    assert nbdkit.parse_delay("delay", "7ns") == (0, 7)
    assert [nbdkit.parse_probability("p", text) for text in ("0.1", "10%", "1:10", "1/10")] == [0.1] * 4
    for text in ("", "x", "1:0", "10 percent"):
        with pytest.raises(ValueError, match=r"p: .* is not a probability"):
            nbdkit.parse_probability("p", text)
    with pytest.raises(ValueError, match=r"d: .* is not a time"):
        nbdkit.parse_delay("d", "1 year")


def test_passwords(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("open sesame\n")
    assert nbdkit.read_password("plain") == b"plain"
    assert nbdkit.read_password(f"+{tmp_path}/secret") == b"open sesame"


def test_there_is_no_peer() -> None:
    assert (nbdkit.export_name(), nbdkit.is_tls(), nbdkit.stdio_safe()) == ("", False, False)
    with pytest.raises(OSError, match="the client is the kernel"):
        nbdkit.peer_pid()
    assert nbdkit._take_error() == errno.ENOTCONN


def test_shutdown_is_for_the_device_that_there_is() -> None:
    asked: list[str] = []
    one, another = partial(asked.append, "one"), partial(asked.append, "another")
    with pytest.raises(RuntimeError, match="there is no device yet"):
        nbdkit.shutdown()
    nbdkit._begin(one)
    nbdkit._begin(another)
    with pytest.raises(RuntimeError, match="several devices"):
        nbdkit.shutdown()
    nbdkit._end(one)
    nbdkit.shutdown()
    nbdkit._end(another)
    assert asked == ["another"]


def test_an_errno_is_one() -> None:
    nbdkit.set_error(-5)
    assert nbdkit._take_error() == errno.EIO
    assert nbdkit._take_error() == 0
