"""System calls that Python's ``os`` lacks."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
from typing import Any

from ublkpy.uring.ffi import check_libc, ffi, lib

# include/uapi/linux/stat.h; newer than the headers of some build machines
_STATX_DIOALIGN = 0x2000
_STATX_SIZE = 256
_STATX_DIO_OFFSET_ALIGN = 0x9C


def unshare_mounts() -> None:
    """Give the calling process a mount namespace of its own that sees no later mounts. OSError without privilege."""
    check_libc(lib.unshare(lib.CLONE_NEWNS), "unshare")
    check_libc(lib.mount(ffi.NULL, b"/", ffi.NULL, lib.MS_REC | lib.MS_PRIVATE, ffi.NULL), "mount")


def detach_mount(path: str) -> None:
    """Take a mount out of this namespace; open files on it stay usable."""
    check_libc(lib.umount2(os.fsencode(path), lib.MNT_DETACH), path)


def lock_memory() -> None:
    """Keep what is in memory there, and what is touched later: the I/O buffers of a deep queue, or a disk in memory,
    are gigabytes that may never be used.
    """
    check_libc(lib.mlockall(lib.MCL_CURRENT | lib.MCL_FUTURE | lib.MCL_ONFAULT), "mlockall")


def lock_range(start: int, length: int) -> None:
    """Have these addresses in memory at once, and keep them there."""
    check_libc(lib.mlock(ffi.cast("void *", start), length), "mlock")


def set_io_flusher() -> None:
    """Memory reclaim on behalf of this thread and those it starts must not wait for I/O (prctl(2))."""
    check_libc(lib.prctl(lib.PR_SET_IO_FLUSHER, 1, 0, 0, 0), "PR_SET_IO_FLUSHER")


def die_with_parent() -> None:
    """SIGKILL for this process when the thread that started it ends."""
    check_libc(lib.prctl(lib.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "PR_SET_PDEATHSIG")


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with FALLOC_FL_*, which ``os.posix_fallocate`` has not. OSError."""
    check_libc(lib.fallocate(fd, mode, offset, length), "fallocate")


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Zeroes that need no space, within the length of the file. OSError."""
    fallocate(fd, lib.FALLOC_FL_PUNCH_HOLE | lib.FALLOC_FL_KEEP_SIZE, offset, length)


def file_system_type(fd: int) -> int:
    """The magic number of the file system that holds a file (statfs(2))."""
    buf = ffi.new("struct statfs *")
    check_libc(lib.fstatfs(fd, buf), "fstatfs")
    return int(buf.f_type) & 0xFFFFFFFF  # signed on 32-bit machines


def direct_io_alignment(fd: int) -> int | None:
    """The block size in bytes that O_DIRECT asks for, 0 if the file cannot do it; None if the kernel or the
    file system does not tell (statx(2): STATX_DIOALIGN, Linux 6.1)."""
    buf = ffi.new(f"char[{_STATX_SIZE}]")
    flags = lib.AT_EMPTY_PATH
    check_libc(lib.statx(fd, b"", flags, _STATX_DIOALIGN, ffi.cast("struct statx *", buf)), "statx")
    data = bytes(ffi.buffer(buf))
    (mask,) = struct.unpack_from("=I", data)
    (align,) = struct.unpack_from("=I", data, _STATX_DIO_OFFSET_ALIGN)
    return align if mask & _STATX_DIOALIGN else None


def shm_create(size: int, *, huge_pages: bool = False) -> int:
    """A new shared memory segment for this user, of so many bytes: its id. OSError (shmget(2))."""
    flags = lib.IPC_CREAT | 0o600 | (lib.SHM_HUGETLB if huge_pages else 0)
    return int(check_libc(lib.shmget(lib.IPC_PRIVATE, size, flags), "shmget"))


def shm_attach(segment: int) -> int:
    """Where it is from now on in this process, and in those that it forks. OSError."""
    address = lib.shmat(segment, ffi.NULL, 0)
    found = int(ffi.cast("intptr_t", address))
    check_libc(found if found == -1 else 0, "shmat")
    return found


def shm_detach(address: int) -> None:
    """Not here any more. OSError."""
    check_libc(lib.shmdt(ffi.cast("void *", address)), "shmdt")


def shm_stat(segment: int) -> tuple[int, int]:
    """Its bytes, and the id of the user who made it. OSError where there is none."""
    found = ffi.new("struct shmid_ds *")
    check_libc(lib.shmctl(segment, lib.IPC_STAT, found), "shmctl")
    return int(found.shm_segsz), int(found.shm_perm.cuid)


def shm_remove(segment: int) -> None:
    """It goes with the last process that has it attached. Nothing, where it has gone."""
    with contextlib.suppress(OSError):
        check_libc(lib.shmctl(segment, lib.IPC_RMID, ffi.NULL), "shmctl")


def buffer(address: int, size: int) -> Any:
    """Bytes of this process's memory, to read and write."""
    return ffi.buffer(ffi.cast("char *", address), size)
