"""System calls that Python's ``os`` lacks."""

from __future__ import annotations

import os

from ublkpy.uring.ffi import check_libc, ffi, lib


def unshare_mounts() -> None:
    """Give the calling process a mount namespace of its own that sees no later mounts. OSError without privilege."""
    check_libc(lib.unshare(lib.CLONE_NEWNS), "unshare")
    check_libc(lib.mount(ffi.NULL, b"/", ffi.NULL, lib.MS_REC | lib.MS_PRIVATE, ffi.NULL), "mount")


def detach_mount(path: str) -> None:
    """Take a mount out of this namespace; open files on it stay usable."""
    check_libc(lib.umount2(os.fsencode(path), lib.MNT_DETACH), path)


def lock_memory() -> None:
    """Keep all pages of today in memory, and those of tomorrow once they were touched.

    On fault, not at once: the I/O buffers of a deep queue are gigabytes that may never be used.
    """
    check_libc(lib.mlockall(lib.MCL_CURRENT), "mlockall")
    check_libc(lib.mlockall(lib.MCL_FUTURE | lib.MCL_ONFAULT), "mlockall")


def set_io_flusher() -> None:
    """Memory reclaim on behalf of this thread and those it starts must not wait for I/O (prctl(2))."""
    check_libc(lib.prctl(lib.PR_SET_IO_FLUSHER, 1, 0, 0, 0), "PR_SET_IO_FLUSHER")


def punch_hole(fd: int, offset: int, length: int) -> None:
    """fallocate(2): deallocate ``length`` bytes at ``offset``; the file keeps its size."""
    mode = lib.FALLOC_FL_PUNCH_HOLE | lib.FALLOC_FL_KEEP_SIZE
    check_libc(lib.fallocate(fd, mode, offset, length), "fallocate")
