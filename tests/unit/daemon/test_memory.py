"""What memory may be shared: no driver is needed to say no."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ublkpy.daemon.memory import HugeFile, Refused, length_of, owner_of
from ublkpy.errors import UblkError


@pytest.fixture
def memfd() -> Iterator[int]:
    """Of no size, and not sealed yet."""
    fd = os.memfd_create("memory", os.MFD_ALLOW_SEALING)
    yield fd
    os.close(fd)


def refusal(fd: int) -> Refused:
    with pytest.raises(Refused) as caught:
        length_of(fd)
    return caught.value


def test_a_sealed_memfd(memfd: int) -> None:
    os.ftruncate(memfd, 8192)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    assert length_of(memfd) == 8192


def test_one_that_can_shrink(memfd: int) -> None:
    os.ftruncate(memfd, 8192)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    assert refusal(memfd).errno == errno.EPERM


@pytest.mark.parametrize("length", [0, 1, 4097, (4 << 30) + 4096])
def test_lengths(memfd: int, length: int) -> None:
    os.ftruncate(memfd, length)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    assert refusal(memfd).errno == errno.EINVAL
    assert f"{length} bytes are not whole pages" in str(refusal(memfd))


def test_what_is_no_memfd() -> None:
    read_end, write_end = os.pipe()
    assert refusal(read_end).errno == errno.EINVAL
    os.close(read_end)
    os.close(write_end)


def test_the_owner_is_who_connected(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "sock"))
    listener.listen()
    code = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({str(tmp_path / 'sock')!r}); s.recv(1)"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        client = listener.accept()[0]
        try:
            fd = owner_of(client)
        except Refused:
            pytest.skip("this kernel has no SO_PEERPIDFD")
        finally:
            client.close()
            listener.close()
        info = Path(f"/proc/self/fdinfo/{fd}").read_text()
        os.close(fd)
    assert f"Pid:\t{process.pid}\n" in info


def test_a_file_that_is_not_of_a_hugetlbfs(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(UblkError, match=f"cannot open {path}: No such file"):
        HugeFile.open(path, read_only=False)
    path.write_bytes(bytes(4096))
    with pytest.raises(UblkError, match=f"{path} is not a hugetlbfs file") as caught:
        HugeFile.open(path, read_only=False)
    assert "mount -t hugetlbfs" in caught.value.hint
