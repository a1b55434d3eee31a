"""For programs that do direct I/O on a device: memory of theirs that its daemon shares, so that nothing is copied.

docs/shmem.md has an example, and the protocol for other languages.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from pathlib import Path

from ublkpy import folders
from ublkpy.errors import UblkError

# What the errors of the protocol mean.
WHY = {
    errno.EACCES: "it must be open for reading and writing",
    errno.EBUSY: "the device is being set up or deleted",
    errno.EEXIST: "some of it is shared already",
    errno.EFAULT: "the driver cannot pin it",
    errno.EIO: "the daemon could not ask the driver; its log says why",
    errno.EINVAL: "it must be a memfd of whole pages, at least one, at most 4 GiB",
    errno.ENODEV: "the device is being deleted",
    errno.ENOMEM: "memory is short",
    errno.ENOSPC: "there are too many buffers already",
    errno.EPERM: "it must be sealed against shrinking: memfd_create() with MFD_ALLOW_SEALING, then F_SEAL_SHRINK",
    errno.ETIMEDOUT: "the device does not answer its requests",
}


def socket_path(dev_id: int) -> Path:
    """Where the daemon of this user's device with shared memory listens. UblkError if he has no folder for it."""
    return folders.socket_dir() / f"ublkb{dev_id}.sock"


def peer_uid(connection: socket.socket) -> int:
    """Who is at the other end: the user that connected, or that listens."""
    _, uid, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


def register(dev_id: int, fd: int, timeout: float = 90.0) -> int:
    """Share a memfd with the daemon of /dev/ublkb<dev_id>; returns the number that the driver gave it.

    Direct I/O from and to a mapping of it is then served without a copy, until this process ends. It is sealed
    against shrinking, which it must allow. The daemon must be of the same user. OSError says why it cannot be shared,
    TimeoutError that no answer came within ``timeout`` seconds.
    """
    with contextlib.suppress(OSError):  # sealed already, or else the answer tells
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    try:
        path = socket_path(dev_id)
    except UblkError as e:
        raise FileNotFoundError(errno.ENOENT, e.message) from e
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.settimeout(timeout)
        try:
            daemon.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError) as e:
            raise OSError(e.errno, f"no daemon shares memory for device {dev_id}; was it added with shmem_zc?") from e
        if peer_uid(daemon) != os.geteuid():
            raise PermissionError(errno.EPERM, f"{path} is not the socket of a daemon of this user")
        socket.send_fds(daemon, [b"\0"], [fd])
        answer = daemon.recv(4, socket.MSG_WAITALL)
    if len(answer) < 4:
        raise ConnectionResetError(errno.ECONNRESET, f"the daemon of device {dev_id} closed the connection")
    (result,) = struct.unpack("=i", answer)
    if result < 0:
        raise OSError(-result, f"the memory cannot be shared: {WHY.get(-result, os.strerror(-result))}")
    return int(result)
