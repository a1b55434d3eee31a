"""Memory that holds a disk: a System V shared memory segment, which the kernel keeps without any process.

So another daemon can go on with it (``DiskOptions.is_recoverable``). No file system
limits it, and its size is accounted when it is made, not when a page is missing.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import re
from pathlib import Path

from ublkpy.errors import ConfigError, UblkError
from ublkpy.tgt.base import MAX_DISCARD_BYTES, Geometry, Target
from ublkpy.tgt.options import exact_size
from ublkpy.uring import libc
from ublkpy.uring.map import Error, File, Map, Memory, Routing

_log = logging.getLogger(__name__)

_LIMITS = "/proc/sys/kernel"


class DiskMemory:
    """The memory behind a target's disk: opened with the target, begun with it, and closed with it.

    ``size`` is in bytes. What outlives the daemon is made when it begins, so that a command that only looks leaves
    nothing behind; ``Target.segment`` says then which it is. Raises UblkError.
    """

    def __init__(self, target: Target, size: int, *, huge_pages: bool = False) -> None:
        self._target = target
        self._size = size
        self._huge_pages = huge_pages
        # A hole in huge pages gives up what was set aside for it: to fill it again may fail, by a signal.
        self._can_free = not huge_pages and _can_free()
        self._fd = -1
        self._address = 0
        if target.segment is not None:
            self._address = _attach(target.segment, size)
            return
        check_fits(size)
        if huge_pages:
            _check_huge_pages(size)
        if not target.disk.is_recoverable:
            segment = self._make()
            libc.shm_remove(segment)  # once nobody is attached any more

    @property
    def geometry(self) -> Geometry:
        """Of a disk that is all of it."""
        return Geometry(
            size=self._size,
            write_cache=self._target.disk.write_cache is not False,  # what goes with the machine need not be durable
            discard_granularity=mmap.PAGESIZE if self._can_free else 0,
            max_discard_bytes=MAX_DISCARD_BYTES if self._can_free else 0,
            max_write_zeroes_bytes=MAX_DISCARD_BYTES if self._can_free else 0,
        )

    def begin(self) -> None:
        """In the daemon."""
        if not self._address:
            self._target.segment = self._make()
        if self._can_free:
            self._fd = _open(self._address, self._size)

    def add_to(self, target_map: Map) -> Routing:
        """What is done with the whole of that map."""
        memory: Memory = target_map.add_memory(libc.buffer(self._address, self._size))
        if self._fd < 0:
            return Routing(memory, memory, Error(errno.EOPNOTSUPP), Error(errno.EOPNOTSUPP))
        file = File(target_map.add_file(self._fd, in_memory=True))
        return Routing(memory, memory, file, file)

    def close(self) -> None:
        """Let go of it."""
        if self._fd >= 0:
            os.close(self._fd)
        if self._address:
            libc.shm_detach(self._address)
        self._fd, self._address = -1, 0

    def _make(self) -> int:
        try:
            segment = libc.shm_create(self._size, huge_pages=self._huge_pages)
        except OSError as e:
            raise _no_room(self._size, e, self._huge_pages) from e
        try:
            self._address = libc.shm_attach(segment)
        except OSError as e:
            libc.shm_remove(segment)
            raise UblkError(f"cannot map {exact_size(self._size)} of memory: {os.strerror(e.errno or 0)}") from e
        return segment


def check_fits(size: int, otherwise: str = "keep it in a file") -> None:
    """UblkError for more than this machine has, a warning for more than is free now. ``otherwise``: another cure."""
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE))
    total, free = int(found["MemTotal"]) << 10, int(found["MemAvailable"]) << 10
    if size > total:
        raise UblkError(
            f"a disk of {exact_size(size)} does not fit into the memory of this machine, {exact_size(total)}",
            f"make it smaller, or {otherwise}",
        )
    if size > free:
        _log.warning(
            "a disk of %s, and %s of memory are free: filling it will cost other programs theirs",
            exact_size(size),
            exact_size(free),
        )


def _check_huge_pages(size: int) -> None:
    page = _huge_page()
    if size % page:
        raise ConfigError(
            f"size {size} is not a multiple of a huge page, {exact_size(page)}",
            f"the next multiple is --size {-(-size // page) * page}",
            ["size"],
        )


def _huge_page() -> int:
    """Bytes of one, of the default size."""
    found = re.search(r"^Hugepagesize:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    if not found:
        raise UblkError("this kernel has no huge pages", "do without huge_pages")
    return int(found[1]) << 10


def _no_room(size: int, error: OSError, huge_pages: bool) -> UblkError:
    what = f"there is no memory for {exact_size(size)}"
    why = os.strerror(error.errno or 0)
    if error.errno == errno.ENOMEM and huge_pages:
        page = _huge_page()
        match = re.search(r"^HugePages_Free:\s+(\d+)$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        free = match[1] if match else "0"
        return UblkError(
            f"{what} in huge pages: that is {size // page} of {exact_size(page)}, and {free} are free",
            f"set more aside: sysctl vm.nr_hugepages={size // page}",
        )
    hints = {
        errno.EPERM: "huge pages are for root, and for the group in vm.hugetlb_shm_group",
        errno.EINVAL: f"a limit of the system is lower: see {_LIMITS}/shmmax",
        errno.ENOSPC: f"the limits of the system are reached: see {_LIMITS}/shmall, {_LIMITS}/shmmni, and ipcs -m",
    }
    return UblkError(f"{what}: {why}", hints.get(error.errno or 0, "make it smaller, or keep it in a file"))


def _attach(segment: int, size: int) -> int:
    """To that of an earlier daemon."""
    try:
        found, creator = libc.shm_stat(segment)
        if (found, creator) == (size, os.geteuid()):
            return libc.shm_attach(segment)
        why = "another one has its number now"
    except OSError as e:
        why = os.strerror(e.errno or 0)
    raise UblkError(
        f"the memory that the disk was in, shared memory segment {segment}, is gone: {why}",
        "its data is lost: delete the device, and add it anew",
    )


def _open(address: int, size: int) -> int:
    """A mapping of this process as a file, which can have holes. OSError for users who may not."""
    end = address + -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    return os.open(f"/proc/self/map_files/{address:x}-{end:x}", os.O_RDWR | os.O_CLOEXEC)


def _can_free() -> bool:
    """Whether what is discarded can give its memory back: ``_open`` needs CAP_CHECKPOINT_RESTORE."""
    segment = libc.shm_create(mmap.PAGESIZE)
    try:
        address = libc.shm_attach(segment)
    finally:
        libc.shm_remove(segment)
    try:
        os.close(_open(address, mmap.PAGESIZE))
    except OSError:
        return False
    finally:
        libc.shm_detach(address)
    return True
