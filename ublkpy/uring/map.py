"""The extent map: where each byte of a device lives, and what is done about it.

A target writes the map; the queues look each request up in it, without Python
and without a lock. Positions and lengths are in bytes, multiples of 512.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from ublkpy.uring.ffi import check, ffi, lib
from ublkpy.uring.integrity import Metadata
from ublkpy.uring.routing import (
    Action,
    Error,
    Extent,
    Fault,
    Faulty,
    File,
    Flush,
    Memory,
    Mirror,
    Null,
    Pattern,
    Routing,
    Stripe,
    Sync,
    Upcall,
    Zero,
    fault_to_c,
    flush_to_c,
    routing_to_c,
)
from ublkpy.uring.uapi import SECTOR

__all__ = [
    "Action",
    "Error",
    "Extent",
    "Fault",
    "Faulty",
    "File",
    "Flush",
    "Map",
    "Memory",
    "Mirror",
    "Null",
    "Pattern",
    "Routing",
    "Stripe",
    "Sync",
    "Upcall",
    "Zero",
]

_BATCH = 256  # extents per call while the map is read back


class Map:
    """A map of ``size`` bytes, at first one extent: of ``routing``, or of ``Null``.

    Any thread may use it, also while queues look requests up in it; ``c`` is what they are given. ValueError for what
    has no meaning, such as a position that is not a multiple of 512, OSError (ENOMEM, ENOSPC) when there is no memory
    or room; then everything is as it was.
    """

    size: int
    """Bytes, a multiple of 512."""
    metadata: Metadata | None
    """Where the metadata of each block lives, for ``Geometry.integrity``; for queues that are made from now on."""

    def __init__(self, size: int, routing: Routing | None = None) -> None:
        _check_size(size)
        self.size = size
        self.c: Any = ffi.new("struct um_map *")
        check(lib.um_init(self.c, size), "map")
        null = Routing.all(Null())
        self.metadata = None
        self._memories: list[Any] = []  # hold on to them
        self._lock = threading.Lock()  # of these two, which know the same
        self._routings = {0: null}
        self._ids = {null: 0}
        if routing is not None:  # it can name no files yet
            try:
                self.replace([Extent(0, size, routing)])
            except BaseException:
                self.close()
                raise

    def add_file(self, fd: int, *, is_block_device: bool = False, in_memory: bool = False) -> int:
        """The number, in this map, of the file that is open as ``fd``; the first is 0. At most 65535,
        OSError (ENOSPC) beyond. It stays its caller's, and open for as long as the map.

        ``is_block_device`` if it is one, which is discarded by a command of its own (BLKDISCARD). ``in_memory`` if
        reading and writing it waits for no device, as on tmpfs: then queues do not have io_uring wait.
        """
        file = ffi.new("struct um_file *", (fd, is_block_device, in_memory))
        return check(lib.um_add_file(self.c, file), "file for a map")

    def add_memory(self, memory: Any) -> Memory:
        """The bytes of something with a writable buffer (bytearray, mmap), as an action: ``offset`` of an extent counts
        from its begin. The map holds on to it until ``close``; BufferError for what is read-only.
        """
        buffer = ffi.from_buffer(memory, require_writable=True)
        self._memories.append(buffer)
        return Memory(int(ffi.cast("uintptr_t", buffer)), len(buffer))

    def add_fault(self, fault: Fault) -> int:
        """The number, in this map, of what befalls requests where a ``Faulty`` action says so; the first is 0. At most
        32768, OSError (ENOSPC) beyond. ValueError for one without meaning.
        """
        path = ffi.NULL if fault.while_file is None else os.fsencode(fault.while_file)
        return check(lib.um_add_fault(self.c, fault_to_c(fault), path), "fault for a map")

    def replace(self, extents: Iterable[Extent], flush: Flush | None = None) -> None:
        """Put extents, which may be in any order, in the place of what is there, and change ``flush`` if given.

        For queues it happens all at once. A request that was looked up before may still be on its way: ``drain`` waits.
        ValueError for extents that overlap, are not within the map, or name a file, memory or fault that is not
        there.
        """
        pieces = [self._piece(extent) for extent in extents]
        c_flush = ffi.NULL if flush is None else flush_to_c(flush, self.stats())
        res = lib.um_replace(self.c, ffi.new("struct um_extent[]", pieces), len(pieces), c_flush)
        if res == -errno.EINVAL:
            raise ValueError(_why_invalid(pieces))
        check(res, "map")

    def set_flush(self, flush: Flush) -> None:
        """What a flush, which has no place, does from now on: ``Null``, ``Sync`` or ``Upcall``, or one of these as
        ``Faulty``. At first, nothing.
        """
        self.replace([], flush)

    def resize(self, size: int) -> None:
        """Move the end to ``size`` bytes: the last extent stretches up to it, or what is behind it goes.

        The daemon does it, before the device grows, and after it has shrunk (see ``Target.resize``). ValueError where
        the file, or memory, of the last extent cannot be so long.
        """
        _check_size(size)
        (last,) = self.extents(self.size - SECTOR)
        if size > self.size and any(isinstance(action, Memory) for action in last.routing.places):
            raise ValueError("the map ends in memory, which has the length that it has")
        res = lib.um_resize(self.c, size)
        if res == -errno.EINVAL:
            raise ValueError(f"the last extent cannot go on up to {size}: no file has so many bytes")
        check(res, "map")
        self.size = size

    def extents(self, start: int = 0, end: int | None = None) -> Iterator[Extent]:
        """What the map says of the bytes [start, end), in order, cut to them; without ``end``, up to the map's. Changes
        meanwhile may or may not be seen.
        """
        end = self.size if end is None else min(end, self.size)
        batch = ffi.new("struct um_extent[]", _BATCH)
        while start < end:
            for e in batch[0 : lib.um_walk(self.c, start, batch, _BATCH)]:
                if start >= end:
                    break
                offset = e.offset + start - e.start if self._routings[e.routing].is_placed else 0
                stop = min(e.end, end)
                yield Extent(start, stop - start, self._routings[e.routing], offset)
                start = stop

    @property
    def count(self) -> int:
        """How many extents there are: neighbours that continue each other are one."""
        return int(self.stats().nr_extents)

    def stats(self) -> Any:
        """``struct um_stats`` of ublkpy/uring/map.h: its extents, nodes, levels, routings and files, as numbers."""
        stats = ffi.new("struct um_stats *")
        lib.um_get_stats(self.c, stats)
        return stats

    def synchronize(self, timeout: float) -> None:
        """Wait until no queue looks requests up in an older state of the map. TimeoutError after ``timeout`` seconds.

        Not in a queue's own thread. Requests that were looked up before may still be on their way.
        """
        check(lib.um_synchronize(self.c, int(timeout * 1000)), "queues that look at the old map")

    def drain(self, start: int, length: int, timeout: float) -> None:
        """Wait until native I/O that went by an older state of the map, in ``length`` bytes from ``start`` on, is
        through.

        After ``replace``: then nothing touches the old places of these bytes any more. What a queue has handed to
        Python does not count. TimeoutError after ``timeout`` seconds; OSError (EDEADLK) in the thread of a queue, which
        would wait for itself.
        """
        check(lib.um_drain(self.c, start, start + length, int(timeout * 1000)), "requests that are under way")

    def close(self) -> None:
        """Free it; OSError (EBUSY) while a queue reads it. Nobody else may use it any more. The files stay open.

        That of ``Target.map`` is closed by the daemon.
        """
        if self.c is not None:
            check(lib.um_exit(self.c), "map")
            self.c = None
            for memory in self._memories:
                ffi.release(memory)

    def _piece(self, e: Extent) -> tuple[int, int, int, int]:
        if e.start % SECTOR or e.length % SECTOR:
            raise ValueError(f"extent of {e.length} bytes at {e.start}: not multiples of {SECTOR}")
        if e.start < 0 or e.length <= 0 or e.end > self.size:
            raise ValueError(f"extent of {e.length} bytes at {e.start}: not within {self.size} bytes")
        if not 0 <= e.offset < 1 << 63:
            raise ValueError(f"extent at {e.start}: no file has an offset of {e.offset} bytes")
        for action in e.routing.places:
            if isinstance(action, Memory) and e.offset + e.length > action.length:
                raise ValueError(f"extent at {e.start} ends behind the {action.length} bytes of memory")
        known = self._ids.get(e.routing)
        return e.start, e.end, e.offset, self._add_routing(e.routing) if known is None else known

    def _add_routing(self, routing: Routing) -> int:
        c_routing = routing_to_c(routing, self.stats())
        with self._lock:
            if routing not in self._ids:
                id = check(lib.um_add_routing(self.c, c_routing), "routing of a map")
                self._routings[id] = routing
                self._ids[routing] = id
            return self._ids[routing]


def _check_size(size: int) -> None:
    if not 0 < size < 1 << 63 or size % SECTOR:
        raise ValueError(f"size of {size} bytes is not a positive multiple of {SECTOR}")


def _why_invalid(pieces: list[tuple[int, int, int, int]]) -> str:
    ordered = sorted(pieces)
    for (left, end, *_), (right, *_) in itertools.pairwise(ordered):
        if right < end:
            return f"extents at {left} and {right} overlap"
    return "an extent begins before the start of a file, or ends where no file can"
