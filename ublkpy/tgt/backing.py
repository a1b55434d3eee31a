"""A file or block device that holds a target's bytes: opening, locking, and what it can do."""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import re
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from ublkpy.errors import BusyError, UblkError
from ublkpy.tgt.base import MAX_DISCARD_BYTES
from ublkpy.tgt.options import exact_size, format_size
from ublkpy.uring import libc

log = logging.getLogger(__name__)

_RELEASE = 1.0  # seconds
_CANNOT_WRITE = (errno.EROFS, errno.EACCES, errno.EPERM)

# The file systems of which it is known that they punch holes, by their magic numbers (linux/magic.h). To try it
# is to change the file, its times at least: the kernel refuses wrong arguments before it asks the file system.
_PUNCHING = {
    0xEF53,  # ext2, ext3, ext4
    0x58465342,  # XFS
    0x9123683E,  # Btrfs
    0xF2F52010,  # F2FS
    0xCA451A4E,  # bcachefs
    0x2FC12FC1,  # ZFS
    0x01021994,  # tmpfs
    0x794C7630,  # overlayfs, whose upper layer is one of these
}

# Those whose files are nowhere but in memory: reading and writing them is copying.
_IN_MEMORY = {0x01021994, 0x858458F6}  # tmpfs, ramfs

# The kernel whose block devices take a discard from io_uring, as a command of their own. They take write-zeroes
# as files do.
_DISCARD_COMMAND = (6, 12)


@dataclass(frozen=True)
class Limits:
    """What a backing can do. Sizes in bytes; a ``direct_block`` of 0: no O_DIRECT."""

    direct_block: int
    logical_block: int
    physical_block: int
    io_min: int
    io_opt: int
    rotational: bool
    discard_granularity: int
    max_discard_bytes: int
    max_write_zeroes_bytes: int


class Backing:
    """An open backing. Owns its file descriptor until ``close``.

    ``direct`` asks for O_DIRECT (True), forbids it (False), or takes it where the file system has it (None);
    afterwards the attribute says which it became. With ``durable``, a write is done when it is durable (O_DSYNC).
    Raises UblkError.
    """

    def __init__(self, path: Path, *, read_only: bool, direct: bool | None, durable: bool = False) -> None:
        self.path = path
        self.read_only = read_only
        self.is_block_device = stat.S_ISBLK(self._stat().st_mode)
        self.fd = -1
        flags = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR)
        flags |= os.O_DSYNC if durable else 0
        # As mkfs does: refuses a device that is mounted or part of another.
        if self.is_block_device and not read_only:
            flags |= os.O_EXCL
        if direct is not False:
            self._open(flags | os.O_DIRECT, refusal_is_error=direct is True)
        self.direct = self.fd >= 0
        if not self.direct:
            self._open(flags, refusal_is_error=True)
        self.end = os.lseek(self.fd, 0, os.SEEK_END)
        self.in_memory = not self.is_block_device and libc.file_system_type(self.fd) in _IN_MEMORY

    def close(self) -> None:
        os.close(self.fd)

    def without_direct(self) -> None:
        """Go on through the page cache."""
        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
        fcntl.fcntl(self.fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self.direct = False

    def fit(self, end: int, *, cut: bool) -> None:
        """Grow the file up to ``end`` bytes, or ``cut`` it there. UblkError where it cannot be."""
        self.end = os.lseek(self.fd, 0, os.SEEK_END)
        if self.end == end or (self.end > end and not cut):
            return
        if self.is_block_device or self.read_only:
            if self.end < end:
                raise UblkError(
                    f"{self.path} has {exact_size(self.end)}, which is too short for {exact_size(end)}",
                    "grow that first" if self.is_block_device else f"grow it with: truncate -s {end} {self.path}",
                )
            return
        try:
            os.ftruncate(self.fd, end)
        except OSError as e:
            raise UblkError(f"cannot give {self.path} {exact_size(end)}: {os.strerror(e.errno or 0)}") from e
        self.end = end
        self.check_space()

    def settle_direct(self, limits: Limits, said: int | None, *places: int, demanded: bool) -> None:
        """Give O_DIRECT up, or refuse if it was ``demanded``, where its block is more than the ``said`` logical block,
        or ``places`` (its size, and where the device begins; bytes) are no multiples of it.
        """
        block = limits.direct_block
        fits = block and (said or block) >= block and not any(place % block for place in places)
        if fits or not self.direct:
            return
        if demanded:
            why = f"size or offset is not a multiple of its block size {block}" if block else "reads fail"
            if block and said and said < block:
                why = f"its block size {block} is more than logical_block_size {said}"
            raise self._no_direct(why)
        # A block device's sectors are the same with and without: its blocks are checked later.
        if not self.is_block_device:
            self.without_direct()

    def check_content(self) -> None:
        """UblkError if there is none."""
        if self.end == 0:
            raise UblkError(f"backing file {self.path} is empty", f"give it a size with: truncate -s 1G {self.path}")

    def _no_direct(self, reason: str) -> UblkError:
        """The error for an O_DIRECT that was asked for and cannot be had."""
        return UblkError(
            f"backing file {self.path} cannot be used with O_DIRECT: {reason}",
            "use it buffered, with --buffered_io",
        )

    def limits(self) -> Limits:
        """Block sizes and discard limits, as the file system or the block device has them."""
        return self._device_limits() if self.is_block_device else self._file_limits()

    def check_space(self) -> None:
        """A sparse image on a full disk would fail at the first write: refuse it, or warn if space is short."""
        status = os.fstat(self.fd)
        if not (self.is_block_device or self.read_only):
            check_free(self.path, status.st_size - status.st_blocks * 512, os.fstatvfs(self.fd))

    # -- opening ---------------------------------------------------------------------------

    def _stat(self) -> os.stat_result:
        try:
            status = self.path.stat()
        except FileNotFoundError as e:
            raise UblkError(
                f"backing file {self.path} does not exist", f"make one with: truncate -s 1G {self.path}"
            ) from e
        except OSError as e:
            raise self._open_error(e) from e
        if stat.S_ISDIR(status.st_mode):
            raise UblkError(f"backing file {self.path} is a directory", "name a file in it, or a block device")
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            raise UblkError(f"backing file {self.path} is neither a regular file nor a block device")
        return status

    def _open(self, flags: int, *, refusal_is_error: bool) -> None:
        """Open and lock, with patience: a ring's files are let go some time after its process has ended."""
        deadline = time.monotonic() + _RELEASE
        while True:
            try:
                return self._try_open(flags, refusal_is_error)
            except BusyError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.02)

    def _try_open(self, flags: int, refusal_is_error: bool) -> None:
        """Open and lock; a file system that knows no O_DIRECT says EINVAL, and that may be no error."""
        try:
            fd = os.open(self.path, flags)
        except OSError as e:
            if e.errno != errno.EINVAL or not flags & os.O_DIRECT:
                raise self._open_error(e) from e
            if refusal_is_error:
                raise self._no_direct("its file system has none") from e
            return
        try:
            self._lock(fd)
        except UblkError:
            os.close(fd)
            raise
        self.fd = fd

    def _open_error(self, e: OSError) -> UblkError:
        what = f"cannot open {self.path}: {os.strerror(e.errno or errno.EIO)}"
        if e.errno == errno.EBUSY:
            return BusyError(
                f"block device {self.path} is in use: mounted, or part of another device",
                f"see what uses it with: lsblk {self.path}",
            )
        if e.errno in _CANNOT_WRITE and not self.read_only:
            return UblkError(what, "serve it read-only with --read-only, or make it writable")
        return UblkError(what)

    def _lock(self, fd: int) -> None:
        """Two devices over one file would corrupt it. The lock goes with the open file, through the fork."""
        if self.is_block_device:
            return
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if self.read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise BusyError(
                f"backing file {self.path} is in use by another device or program",
                "ublk list shows the devices and their files; read-only devices may share one",
            ) from e
        except OSError as e:  # a file system without locks
            log.debug("no lock on %s: %s", self.path, e)

    # -- limits ----------------------------------------------------------------------------

    def _file_limits(self) -> Limits:
        block = os.fstat(self.fd).st_blksize
        block = block if 512 <= block <= 1 << 20 and block & (block - 1) == 0 else 4096
        return Limits(
            direct_block=_direct_block(self.fd) if self.direct else 0,
            logical_block=512,
            physical_block=block,
            io_min=block,
            io_opt=block,
            rotational=False,
            discard_granularity=block if libc.file_system_type(self.fd) in _PUNCHING else 0,
            max_discard_bytes=MAX_DISCARD_BYTES,
            max_write_zeroes_bytes=MAX_DISCARD_BYTES,
        )

    def _device_limits(self) -> Limits:
        queue = _queue(os.fstat(self.fd).st_rdev)
        assert queue is not None  # each disk has one

        def read(name: str) -> int:
            return int((queue / name).read_text())

        physical = read("physical_block_size")
        can_discard = _kernel_version() >= _DISCARD_COMMAND
        return Limits(
            direct_block=read("logical_block_size"),
            logical_block=read("logical_block_size"),
            physical_block=physical,
            io_min=_power_of_two(read("minimum_io_size")),
            io_opt=_power_of_two(read("optimal_io_size") or physical),
            rotational=bool(read("rotational")),
            discard_granularity=read("discard_granularity") or read("logical_block_size"),
            max_discard_bytes=min(read("discard_max_bytes"), MAX_DISCARD_BYTES) if can_discard else 0,
            max_write_zeroes_bytes=MAX_DISCARD_BYTES,
        )


def check_free(path: Path, missing: int, fs: os.statvfs_result) -> None:
    """A warning where ``path`` needs ``missing`` bytes more than its file system has; UblkError where that has none."""
    free = fs.f_bfree * fs.f_frsize
    if missing <= 0 or fs.f_blocks == 0:
        return
    if free < fs.f_bsize:
        raise UblkError(
            f"the disk that holds {path} is full, and the image still needs {format_size(missing)} of it",
            "free some space, or serve the image read-only with --read-only",
        )
    if free < missing:
        log.warning(
            "%s is sparse and may need %s more, but its disk has only %s free: writes can fail",
            path,
            format_size(missing),
            format_size(free),
        )


def _kernel_version() -> tuple[int, int]:
    """The running kernel's, as (6, 12)."""
    major, minor = re.findall(r"\d+", os.uname().release)[:2]
    return int(major), int(minor)


def _power_of_two(value: int) -> int:
    """The largest power of two that divides ``value``: the driver knows no other block sizes."""
    return value & -value


def _queue(number: int) -> Path | None:
    """The sysfs folder of a device number's request queue: the disk's, for a partition; None without a disk."""
    sysfs = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    return next((q for q in (sysfs / "queue", sysfs.resolve().parent / "queue") if q.exists()), None)


def _direct_block(fd: int) -> int:
    """The block that O_DIRECT needs on this file, 0 if it can do none.

    Where the file system does not tell, what reads accept is not enough: those of a hole accept anything. So
    it is at least a sector of the disk below, if that is known.
    """
    told = libc.direct_io_alignment(fd)
    if told is not None:
        return 0 if told > 4096 else told and max(told, 512)
    accepted = _accepted_block(fd)
    queue = _queue(os.fstat(fd).st_dev)
    return max(accepted, int((queue / "logical_block_size").read_text())) if accepted and queue else accepted


def _accepted_block(fd: int) -> int:
    """The smallest block that O_DIRECT reads take from this file, 0 if they take none."""
    with mmap.mmap(-1, 4096) as buf, memoryview(buf) as view:
        for block in (512, 1024, 2048, 4096):
            try:
                os.preadv(fd, [view[:block]], 0)
            except OSError as e:
                if e.errno == errno.EINVAL:
                    continue
                raise UblkError(f"cannot read the backing file: {os.strerror(e.errno or errno.EIO)}") from e
            return block
    return 0
