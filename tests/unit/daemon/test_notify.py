"""The datagrams that a service manager gets."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ublkpy.daemon import notify
from ublkpy.daemon.notify import Manager
from ublkpy.errors import UblkError


@pytest.fixture(params=["path", "abstract"])
def listener(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    """systemd's end of $NOTIFY_SOCKET."""
    address = str(tmp_path / "notify") if request.param == "path" else f"@ublkpy-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address.replace("@", "\0", 1) if request.param == "abstract" else address)
        sock.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        yield sock


def heard(listener: socket.socket) -> dict[str, str]:
    lines = listener.recv(4096).decode().splitlines()
    return dict(line.split("=", 1) for line in lines)


def test_ready(listener: socket.socket) -> None:
    Manager.from_environment().ready("/dev/ublkb0: null")
    assert heard(listener) == {"READY": "1", "STATUS": "/dev/ublkb0: null"}


def test_stopping(listener: socket.socket) -> None:
    Manager.from_environment().stopping("bye")
    assert heard(listener) == {"STOPPING": "1", "STATUS": "bye"}


def test_an_error_is_one_line_and_has_the_number_of_its_cause(listener: socket.socket) -> None:
    manager = Manager.from_environment()
    try:
        raise UblkError("two\nlines") from OSError(errno.ENOSPC, "full")
    except UblkError as e:
        manager.failed(e)
    assert heard(listener) == {"STATUS": "two lines", "ERRNO": str(errno.ENOSPC)}
    manager.failed(UblkError("of our own"))
    assert heard(listener) == {"STATUS": "of our own"}


def test_the_watchdog_is_told_twice_in_its_time(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    manager = Manager.from_environment()
    assert manager.period == 30
    manager.alive()
    assert heard(listener) == {"WATCHDOG": "1"}


def test_the_watchdog_of_another_process_is_not_ours(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    manager = Manager.from_environment()
    manager.alive()
    manager.stopping("")
    assert "STOPPING" in heard(listener)
    assert manager.period is None


def test_children_are_told_nothing(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert Manager.from_environment()
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & set(os.environ)
    assert not Manager.from_environment()


def test_another_process_is_known_when_that_was_read(listener: socket.socket) -> None:
    said: list[object] = []

    def listen() -> None:
        said.append(heard(listener))
        message, fds, _, _ = socket.recv_fds(listener, 4096, 4)
        said.append(message)
        os.close(*fds)

    manager = Manager(**json.loads(json.dumps(Manager.from_environment().to_dict())))
    reader = threading.Thread(target=listen)
    reader.start()
    assert manager.main_process(42)
    reader.join()
    assert said == [{"MAINPID": "42"}, b"BARRIER=1"]


def test_a_manager_that_reads_nothing(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, open_fds: Callable[[], set[str]]
) -> None:
    monkeypatch.setattr(notify, "_HEARD", 0.1)
    before = open_fds()
    assert not Manager.from_environment().main_process(42)
    assert len(open_fds() - before) <= 1  # the one on its way


def test_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    Manager.from_environment().ready("")
    Manager(str(tmp_path / "gone")).ready("")
