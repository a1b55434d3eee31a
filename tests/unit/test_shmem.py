"""The client's side of shared memory, with a daemon of the test."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ublkpy import shmem

Answering = Callable[[bytes], list[int]]


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("memory", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    yield fd
    os.close(fd)


@pytest.fixture
def answering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Answering]:
    """Answers the next client with these bytes; the inodes of the files that it sent are in the list."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "sock"))
    listener.listen()
    monkeypatch.setattr(shmem, "socket_path", lambda dev_id: tmp_path / "sock")
    threads = []

    def start(answer: bytes) -> list[int]:
        sent: list[int] = []

        def run() -> None:
            with listener.accept()[0] as client:
                for fd in socket.recv_fds(client, 16, 4)[1]:
                    sent.append(os.fstat(fd).st_ino)
                    os.close(fd)
                client.sendall(answer)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return sent

    yield start
    for thread in threads:
        thread.join()
    listener.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_nothing_is_given_to_a_daemon_of_another(memfd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shmem, "socket_path", lambda dev_id: tmp_path / "sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sock"))
        os.seteuid(54321)  # the one that listens counts
        try:
            listener.listen()
        finally:
            os.seteuid(0)
        with pytest.raises(PermissionError, match="is not the socket of a daemon of this user"):
            shmem.register(0, memfd)


def test_a_number_comes_back_and_the_memory_is_sealed(memfd: int, answering: Answering) -> None:
    sent = answering(struct.pack("i", 7))
    assert shmem.register(0, memfd) == 7
    assert sent == [os.fstat(memfd).st_ino]
    assert fcntl.fcntl(memfd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EPERM, "the memory cannot be shared: it must be sealed against shrinking"),
        (errno.EEXIST, "the memory cannot be shared: some of it is shared already"),
        (errno.EREMOTE, "the memory cannot be shared: Object is remote"),
    ],
)
def test_a_refusal(memfd: int, answering: Answering, number: int, words: str) -> None:
    answering(struct.pack("i", -number))
    with pytest.raises(OSError, match=words) as caught:
        shmem.register(0, memfd)
    assert caught.value.errno == number


@pytest.mark.parametrize("answer", [b"", b"\1\2"])
def test_a_daemon_that_goes(memfd: int, answering: Answering, answer: bytes) -> None:
    answering(answer)
    with pytest.raises(ConnectionResetError, match="the daemon of device 0 closed the connection"):
        shmem.register(0, memfd)


def test_no_daemon(memfd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shmem, "socket_path", lambda dev_id: tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no daemon shares memory for device 3; was it added with shmem_zc"):
        shmem.register(3, memfd)
