"""What memory may be shared with a device, and whose it is."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
from dataclasses import dataclass
from mmap import PAGESIZE
from pathlib import Path

from ublkpy.errors import UblkError
from ublkpy.uring import libc

_MAX_BYTES = 4 << 30  # ublk_drv.c, UBLK_SHMEM_BUF_SIZE_MAX
_HUGETLBFS_MAGIC = 0x958458F6  # include/uapi/linux/magic.h
_SO_PEERPIDFD = 77  # include/uapi/asm-generic/socket.h, Linux 6.5


class Refused(Exception):
    """A buffer that cannot be shared: the errno for the client, and words for the log."""

    def __init__(self, number: int, why: str) -> None:
        super().__init__(why)
        self.errno = number


@dataclass(frozen=True)
class HugeFile:
    """An open hugetlbfs file, to be shared from the start."""

    path: Path
    fd: int
    length: int

    @classmethod
    def open(cls, path: Path, *, read_only: bool) -> HugeFile:
        """UblkError for what is none, or empty."""
        try:
            fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        except OSError as e:
            raise UblkError(f"cannot open {path}: {os.strerror(e.errno or 0)}", "htlb needs a hugetlbfs file") from e
        length = os.fstat(fd).st_size
        problem = ""
        if not stat.S_ISREG(os.fstat(fd).st_mode) or libc.file_system_type(fd) != _HUGETLBFS_MAGIC:
            problem = "is not a hugetlbfs file"
        elif not 0 < length <= _MAX_BYTES:
            problem = f"has {length} bytes, and must have some, up to 4 GiB"
        if problem:
            os.close(fd)
            raise UblkError(
                f"{path} {problem}", "mount -t hugetlbfs none /mnt; then truncate -s 64M /mnt/shared, for example"
            )
        return cls(path, fd, length)

    def close(self) -> None:
        os.close(self.fd)


def length_of(fd: int) -> int:
    """The length of a client's memory. Raises Refused.

    It must never shrink: to touch a page that is gone would kill us.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as e:
        raise Refused(errno.EINVAL, "it is not a memfd") from e
    if not seals & fcntl.F_SEAL_SHRINK:
        raise Refused(errno.EPERM, "the memfd is not sealed against shrinking (F_SEAL_SHRINK)")
    length = os.fstat(fd).st_size
    if not 0 < length <= _MAX_BYTES or length % PAGESIZE:
        raise Refused(errno.EINVAL, f"{length} bytes are not whole pages, at least one and at most 4 GiB")
    return length


def owner_of(client: socket.socket) -> int:
    """A pidfd of the process that connected. Raises Refused if it is gone."""
    try:
        (fd,) = struct.unpack("i", client.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4))
        return int(fd)
    except OSError as e:
        raise Refused(errno.ESRCH, "its process has ended") from e
