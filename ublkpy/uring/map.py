"""The extent map: where each byte of a device lives, and what is done about it.

A target writes the map; the queues look each request up in it, without Python
and without a lock. Positions and lengths are in bytes, multiples of 512.

A map may have several spaces: the first is the device, and its extents may go on
in others, which are written by other targets.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    Space,
    Spaces,
    Stripe,
    Sync,
    Upcall,
    Zero,
    fault_to_c,
    flush_to_c,
    routing_to_c,
)
from ublkpy.uring.uapi import SECTOR

if TYPE_CHECKING:
    from ublkpy.uring.queue import Request

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
    "OpenFile",
    "Pattern",
    "Routing",
    "Space",
    "Spaces",
    "Stripe",
    "Sync",
    "Upcall",
    "Zero",
]

_BATCH = 256  # extents per call while the map is read back
_EVERYWHERE = (1 << 64) - 1

Answer = Callable[[Sequence["Request"]], None]
"""What is told of requests that a space leaves to Python: ``Target.upcall``."""


@dataclass(frozen=True)
class OpenFile:
    """A file as the map has to know it. It stays its owner's, and open for as long as the map."""

    fd: int
    """As it is open."""
    is_block_device: bool = False
    """Whether it is one, which is discarded by a command of its own (BLKDISCARD)."""
    in_memory: bool = False
    """Whether reading and writing it waits for no device, as on tmpfs: then queues do not have io_uring wait."""


class _Shared:
    """What all spaces of a map have in common."""

    def __init__(self, size: int) -> None:
        self.c: Any = ffi.new("struct um_map *")
        check(lib.um_init(self.c, size), "map")
        null = Routing.all(Null())
        self.lock = threading.Lock()  # of all that follows
        self.memories: list[Any] = []  # hold on to them
        self.routings = {0: null}
        self.ids = {null: 0}
        self.answers: dict[int, Answer] = {}


class Map:
    """A map of ``size`` bytes, at first one extent of ``Null``; or another space of one (``add_space``).

    Any thread may use it, also while queues look requests up in it; ``c`` is what they are given. ValueError for what
    has no meaning, such as a position that is not a multiple of 512, OSError (ENOMEM, ENOSPC) when there is no memory
    or room; then everything is as it was. Files, memory and faults that are added to it are those of all its spaces.
    """

    size: int
    """Bytes, a multiple of 512."""
    space: int
    """The number of this space in the map; 0 is the device."""
    metadata: Metadata | None
    """Where the metadata of each block lives, for ``Geometry.integrity``; for queues that are made from now on."""

    def __init__(self, size: int) -> None:
        _check_size(size)
        self._begin(_Shared(size), 0, size)

    def _begin(self, shared: _Shared, space: int, size: int) -> None:
        self._shared = shared
        self.space = space
        self.size = size
        self.metadata = None

    def add_space(self, size: int, answer: Answer | None = None) -> Map:
        """One more space, of ``size`` bytes, for ``Space`` and ``Spaces`` of this one: likewise a map, which is closed
        with this one. At most 4095, OSError (ENOSPC) beyond. What it leaves to Python is for ``answer``.
        """
        _check_size(size)
        added = Map.__new__(Map)
        with self._shared.lock:
            number = check(lib.um_add_space(self.c, size), "space of a map")
            if answer:
                self._shared.answers[number] = answer
        added._begin(self._shared, number, size)
        return added

    @property
    def c(self) -> Any:
        """``struct um_map *`` of ublkpy/uring/map.h, for queues; None once it is closed."""
        return self._shared.c

    def answer(self, space: int) -> Answer | None:
        """Who answers what that space leaves to Python; None for 0."""
        return self._shared.answers.get(space)

    def add_file(self, fd: int, *, is_block_device: bool = False, in_memory: bool = False) -> int:
        """The number, in this map, of the file that is open as ``fd``; see ``OpenFile``. The first is 0, and at most
        65535 can be added, OSError (ENOSPC) beyond.
        """
        return self.add_files([OpenFile(fd, is_block_device, in_memory)])[0]

    def add_files(self, files: Sequence[OpenFile]) -> tuple[int, ...]:
        """The same for several, whose numbers follow each other: for legs."""
        with self._shared.lock:
            return tuple(
                check(
                    lib.um_add_file(self.c, ffi.new("struct um_file *", (f.fd, f.is_block_device, f.in_memory))),
                    "file for a map",
                )
                for f in files
            )

    def add_memory(self, memory: Any) -> Memory:
        """The bytes of something with a writable buffer (bytearray, mmap), as an action: ``offset`` of an extent counts
        from its begin. The map holds on to it until ``close``; BufferError for what is read-only.
        """
        buffer = ffi.from_buffer(memory, require_writable=True)
        self._shared.memories.append(buffer)
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
        res = lib.um_replace(self.c, self.space, ffi.new("struct um_extent[]", pieces), len(pieces), c_flush)
        if res == -errno.EINVAL:
            raise ValueError(_why_invalid(pieces, self.space))
        check(res, "map")

    def fill(self, routing: Routing, flush: Flush | None = None, offset: int = 0) -> None:
        """The same with one extent for all of it."""
        self.replace([Extent(0, self.size, routing, offset)], flush)

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
        res = lib.um_resize(self.c, self.space, size)
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
            for e in batch[0 : lib.um_walk(self.c, self.space, start, batch, _BATCH)]:
                if start >= end:
                    break
                routing = self._shared.routings[e.routing]
                offset = e.offset + start - e.start if routing.is_placed else 0
                stop = min(e.end, end)
                yield Extent(start, stop - start, routing, offset)
                start = stop

    @property
    def count(self) -> int:
        """How many extents there are: neighbours that continue each other are one."""
        return int(self.stats().nr_extents)

    def stats(self) -> Any:
        """``struct um_stats`` of ublkpy/uring/map.h, as numbers: extents and levels of this space, and what the whole
        map has of nodes, routings, files, faults and spaces.
        """
        stats = ffi.new("struct um_stats *")
        lib.um_get_stats(self.c, self.space, stats)
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

        In a space other than the device, it waits for all of it: nobody keeps book of what came through which spaces.
        """
        end = start + length
        if self.space:
            start, end = 0, _EVERYWHERE
        check(lib.um_drain(self.c, start, end, int(timeout * 1000)), "requests that are under way")

    def close(self) -> None:
        """Free it, with all its spaces; OSError (EBUSY) while a queue reads it. Nobody else may use it any more. The
        files stay open.

        That of ``Target.map`` is the daemon's to close.
        """
        if self.c is not None:
            check(lib.um_exit(self.c), "map")
            self._shared.c = None
            for memory in self._shared.memories:
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
        known = self._shared.ids.get(e.routing)
        return e.start, e.end, e.offset, self._add_routing(e.routing) if known is None else known

    def _add_routing(self, routing: Routing) -> int:
        c_routing = routing_to_c(routing, self.stats())
        shared = self._shared
        with shared.lock:
            if routing not in shared.ids:
                id = check(lib.um_add_routing(self.c, c_routing), "routing of a map")
                shared.routings[id] = routing
                shared.ids[routing] = id
            return shared.ids[routing]


def _check_size(size: int) -> None:
    if not 0 < size < 1 << 63 or size % SECTOR:
        raise ValueError(f"size of {size} bytes is not a positive multiple of {SECTOR}")


def _why_invalid(pieces: list[tuple[int, int, int, int]], space: int) -> str:
    ordered = sorted(pieces)
    for (left, end, *_), (right, *_) in itertools.pairwise(ordered):
        if right < end:
            return f"extents at {left} and {right} overlap"
    why = "an extent begins before the start of a file, or ends where no file can"
    return why + (f", or goes on in a space that was added before this one, {space}" if space else "")
