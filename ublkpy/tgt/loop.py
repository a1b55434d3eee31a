"""loop: a file or block device as a block device, natively.

The bytes are reached with O_DIRECT where the backing allows it; block sizes
and discard limits are those of the backing.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from ublkpy.errors import BusyError, ConfigError, UblkError
from ublkpy.tgt.base import MAX_DISCARD_BYTES, Geometry, Target
from ublkpy.tgt.options import SECTOR, Offset, Size, format_size, option
from ublkpy.uring import libc
from ublkpy.uring.queue import Linear, Map

log = logging.getLogger(__name__)

_CANNOT_WRITE = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class _Limits:
    """What the backing can do. Sizes in bytes; ``direct_block`` 0: no O_DIRECT."""

    direct_block: int
    logical_block: int
    physical_block: int
    io_min: int
    io_opt: int
    rotational: bool
    discard_granularity: int
    max_discard_bytes: int
    max_write_zeroes_bytes: int


class LoopTarget(Target):
    """A file or block device as a block device."""

    name = "loop"
    file: Path = option(..., "-f", help="backing file or block device")
    offset: Offset = option(
        0, "-o", help="where the device starts in the file: 512-byte sectors, or bytes with a unit (1M)"
    )
    size: Size | None = option(
        None, help="size of the device; default: up to the end of the file", minimum=512, multiple=512
    )
    direct: bool | None = option(
        None,
        help="O_DIRECT or an error; default: O_DIRECT where the file allows it",
        off_flags=("--buffered_io", "--buffered-io"),
    )
    read_only: bool = option(False, "--ro", help="refuse writes; the file is opened read-only")

    def open(self) -> Geometry:
        self._fd = self._open_backing()
        try:
            return self._measure()
        except BaseException:
            self.close()
            raise

    def map(self) -> Map:
        return Linear(self._fd, self.offset, self._is_block_device)

    def close(self) -> None:
        os.close(self._fd)

    def backing(self) -> str:
        return str(self.file)

    def status(self) -> dict[str, object]:
        return {
            "backing_file": str(self.file),
            "direct_io": int(self._direct),
            "offset": self.offset // SECTOR,
        }

    # -- opening ---------------------------------------------------------------------------

    def _open_backing(self) -> int:
        """The backing, opened with O_DIRECT where it can be."""
        mode = self._stat_backing().st_mode
        self._is_block_device = stat.S_ISBLK(mode)
        flags = os.O_RDONLY if self.read_only else os.O_RDWR
        # As mkfs does: refuses a device that is mounted or part of another.
        if self._is_block_device and not self.read_only:
            flags |= os.O_EXCL
        self._direct = self.direct is not False
        if self._direct:
            try:
                return self._lock(os.open(self.file, flags | os.O_DIRECT | os.O_CLOEXEC))
            except OSError as e:
                if e.errno != errno.EINVAL:
                    raise self._open_error(e) from e
                if self.direct:
                    raise self._no_direct("its file system cannot do O_DIRECT") from e
            self._direct = False
        try:
            return self._lock(os.open(self.file, flags | os.O_CLOEXEC))
        except OSError as e:
            raise self._open_error(e) from e

    def _stat_backing(self) -> os.stat_result:
        try:
            status = self.file.stat()
        except FileNotFoundError as e:
            raise UblkError(
                f"backing file {self.file} does not exist", f"make one with: truncate -s 1G {self.file}"
            ) from e
        except OSError as e:
            raise self._open_error(e) from e
        if stat.S_ISDIR(status.st_mode):
            raise UblkError(f"backing file {self.file} is a directory", "name a file in it, or a block device")
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
            raise UblkError(f"backing file {self.file} is neither a regular file nor a block device")
        return status

    def _open_error(self, e: OSError) -> UblkError:
        what = f"cannot open {self.file}: {os.strerror(e.errno or errno.EIO)}"
        if e.errno == errno.EBUSY:
            return BusyError(
                f"block device {self.file} is in use: mounted, or part of another device",
                f"see what uses it with: lsblk {self.file}",
            )
        if e.errno in _CANNOT_WRITE and not self.read_only:
            return UblkError(what, "serve it read-only with --read-only, or make it writable")
        return UblkError(what)

    def _lock(self, fd: int) -> int:
        """Two devices over one file would corrupt it. The lock goes with the open file, through the fork."""
        if self._is_block_device:
            return fd
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if self.read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as e:
            os.close(fd)
            raise BusyError(
                f"backing file {self.file} is in use by another device or program",
                "ublk list shows the devices and their files; read-only devices may share one",
            ) from e
        except OSError as e:  # a file system without locks
            log.debug("no lock on %s: %s", self.file, e)
        return fd

    def _no_direct(self, reason: str) -> UblkError:
        return UblkError(
            f"backing file {self.file} cannot be used with O_DIRECT: {reason}", "use it buffered, with --buffered_io"
        )

    # -- measuring -------------------------------------------------------------------------

    def _measure(self) -> Geometry:
        end = os.lseek(self._fd, 0, os.SEEK_END)
        if end == 0:
            raise UblkError(f"backing file {self.file} is empty", f"give it a size with: truncate -s 1G {self.file}")
        if self.offset >= end:
            raise ConfigError(
                f"offset {format_size(self.offset)} is not inside {self.file}, which has {format_size(end)}"
            )
        size = end - self.offset if self.size is None else self.size
        if self.offset + size > end:
            raise ConfigError(
                f"{self.file} has {format_size(end)}: too short for {format_size(size)} at offset"
                f" {format_size(self.offset)}",
                "" if self._is_block_device else f"grow it with: truncate -s {self.offset + size} {self.file}",
            )
        limits = self._device_limits() if self._is_block_device else self._file_limits()
        self._settle_direct(limits, size)
        if not (self._is_block_device or self.read_only):
            self._check_space()
        block = limits.direct_block if self._direct else limits.logical_block
        self._check_blocks(block, size)
        return Geometry(
            size=size,
            logical_block=block,
            physical_block=max(limits.physical_block, block),
            io_min=max(limits.io_min, block),
            io_opt=max(limits.io_opt, block),
            read_only=self.read_only,
            rotational=limits.rotational,
            write_cache=not self.read_only,
            discard_granularity=0 if self.read_only else limits.discard_granularity,
            max_discard_bytes=limits.max_discard_bytes,
            max_write_zeroes_bytes=limits.max_write_zeroes_bytes,
        )

    def _settle_direct(self, limits: _Limits, size: int) -> None:
        """Give O_DIRECT up, or refuse, where its block size does not fit the file."""
        if not self._direct:
            return
        block = limits.direct_block
        fits = block and not (size % block or self.offset % block)
        if fits:
            return
        if self.direct:
            raise self._no_direct(
                f"size or offset is not a multiple of its block size {block}" if block else "reads fail"
            )
        if self._is_block_device:
            return
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._direct = False

    def _check_blocks(self, block: int, size: int) -> None:
        for what, value in (("offset", self.offset), ("size", size)):
            if value % block:
                good = -(-value // block) * block
                grown = what == "size" and self.size is None and not self._is_block_device
                raise ConfigError(
                    f"{what} {value} of {self.file} is not a multiple of the block size {block}",
                    f"grow the file with: truncate -s {self.offset + good} {self.file}"
                    if grown
                    else f"the next multiple is --{what} {good}B",
                )

    def _check_space(self) -> None:
        """A sparse image on a full disk would fail at the first write."""
        status, fs = os.fstat(self._fd), os.fstatvfs(self._fd)
        missing = status.st_size - status.st_blocks * 512
        free = fs.f_bfree * fs.f_frsize
        if missing <= 0 or fs.f_blocks == 0:
            return
        if free < fs.f_bsize:
            raise UblkError(
                f"the disk that holds {self.file} is full, and the image still needs {format_size(missing)} of it",
                "free some space, or serve the image read-only with --read-only",
            )
        if free < missing:
            log.warning(
                "%s is sparse and may need %s more, but its disk has only %s free: writes can fail",
                self.file,
                format_size(missing),
                format_size(free),
            )

    def _file_limits(self) -> _Limits:
        block = os.fstat(self._fd).st_blksize
        block = block if 512 <= block <= 1 << 20 and block & (block - 1) == 0 else 4096
        discard = not self.read_only and self._can_punch()
        return _Limits(
            direct_block=_direct_block(self._fd) if self._direct else 0,
            logical_block=512,
            physical_block=block,
            io_min=block,
            io_opt=block,
            rotational=False,
            discard_granularity=block if discard else 0,
            max_discard_bytes=MAX_DISCARD_BYTES,
            max_write_zeroes_bytes=MAX_DISCARD_BYTES,
        )

    def _can_punch(self) -> bool:
        """Whether the file system has holes; tried behind the end of the file, where there is nothing."""
        end = os.fstat(self._fd).st_size
        try:
            libc.punch_hole(self._fd, -(-end // 4096) * 4096, 4096)
        except OSError:
            return False
        return True

    def _device_limits(self) -> _Limits:
        """The request queue of the block device, or of the disk that a partition is on (sysfs)."""
        queue = _queue_limits(os.fstat(self._fd).st_rdev)
        assert queue is not None  # each disk has one

        def read(name: str) -> int:
            return int((queue / name).read_text())

        io_opt = read("optimal_io_size")
        return _Limits(
            direct_block=read("logical_block_size"),
            logical_block=read("logical_block_size"),
            physical_block=read("physical_block_size"),
            io_min=_power_of_two(read("minimum_io_size")),
            io_opt=_power_of_two(io_opt or read("physical_block_size")),
            rotational=bool(read("rotational")),
            discard_granularity=read("discard_granularity") or read("logical_block_size"),
            max_discard_bytes=min(read("discard_max_bytes"), MAX_DISCARD_BYTES),
            max_write_zeroes_bytes=MAX_DISCARD_BYTES,
        )


def _power_of_two(value: int) -> int:
    """The largest power of two that divides ``value``: the driver knows no other block sizes."""
    return value & -value


def _queue_limits(number: int) -> Path | None:
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
    queue = _queue_limits(os.fstat(fd).st_dev)
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
