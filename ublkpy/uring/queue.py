"""One queue of a device, as its threads drive it."""

from __future__ import annotations

import contextlib
import errno
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from ublkpy.uring.ffi import check, ffi, lib
from ublkpy.uring.map import Answer, Map
from ublkpy.uring.mode import Mode
from ublkpy.uring.shmem import SharedBuffers
from ublkpy.uring.uapi import IO_DESC_SIZE, SECTOR, IoFlag, Op

# In the ring's table of buffers, which may have more than any queue needs (io_uring/rsrc.c: IORING_MAX_REG_BUFFERS).
_BUFFER_SLOTS = 16384
_CALL = struct.Struct("=QQQIII4x")  # struct uq_upcall
_SHORT_CALL = struct.Struct("=QQQI12x")
_WHOLE_CALL = struct.Struct("=QQQIIIHH")
assert _SHORT_CALL.size == _WHOLE_CALL.size == _CALL.size == ffi.sizeof("struct uq_upcall")

_SPACE_SHIFT: int = lib.UQ_SPACE_SHIFT

LATER: int = lib.UQ_LATER
"""The result of a call that is answered later."""


class Event(IntEnum):
    """What ``Queue.run`` came back for."""

    STOPPED = lib.UQ_STOPPED
    IO_ERROR = lib.UQ_IO_ERROR
    UPCALLS = lib.UQ_UPCALLS
    WOKEN = lib.UQ_WOKEN
    FILE_OPS = lib.UQ_FILE_OPS
    NOTHING = lib.UQ_NOTHING


_EVENTS = tuple(Event)

IS_FUA: int = lib.UQ_IS_FUA
IS_EARLY: int = lib.UQ_IS_EARLY
IS_ELSEWHERE: int = lib.UQ_IS_ELSEWHERE
HAS_FAILED: int = lib.UQ_HAS_FAILED

ShortCall = tuple[int, int, int, int]
"""What Python is asked, for who answers at once: offset and length in bytes; where the data is in ``Queue.buffers``; an
Op, with IS_FUA, IS_EARLY (a WRITE whose data is still with the driver) and IS_ELSEWHERE (see ``Queue.data``)."""

Call = tuple[int, int, int, int, int, int]
"""The same for who answers later: also the number for the answer, and IoFlag."""


FileOp = tuple[int, int, int, int, int, int]
"""As in the SQE (linux/io_uring.h): opcode, fd, addr, len, off, and its flags."""


@dataclass(frozen=True)
class IoError:
    """A request that failed: its operation, place (512-byte sectors), errno, and how many have so far; how many of them
    by faults of the map.
    """

    op: int
    start_sector: int
    errno: int
    count: int
    injected: int = 0

    @property
    def op_name(self) -> str:
        return Op(self.op).name if self.op in Op.__members__.values() else f"op {self.op}"


@dataclass(frozen=True)
class Failure:
    """Which file of the map failed, by its number, and the errno."""

    file: int
    errno: int


_ONCE = "a request is answered once"


class Request:
    """What the map leaves to Python, as ``Target.upcall`` gets it; it may be a part of what a program asked for.

    It wants one answer, from any thread: ``done``, ``fail`` or ``retry``, for an ``early`` one ``receive``, ``fail`` or
    ``retry``. RuntimeError for a second one, also when two threads answer at the same time.
    """

    op: Op
    """What is to be done."""
    flags: IoFlag
    """And how."""
    space: int
    """Which space of the map leaves it to Python (``Map.space``)."""
    offset: int
    """The first byte in that, on the device where that is all of it; of a FLUSH 0."""
    length: int
    """Bytes; of a FLUSH 0."""
    buffer: memoryview
    """Where the data of a WRITE or ZONE_APPEND is, and that of a READ or REPORT_ZONES is to be: ``length`` bytes, until
    the answer; who uses it later gets a ValueError. Empty for others. Read-only for a WRITE from memory that a client
    shares.
    """
    early: bool
    """Whether it is a WRITE whose data is still with the driver (UBLK_F_NEED_GET_DATA), and has no buffer."""
    failure: Failure | None
    """Why a ``Mirror``, or a ``Sync`` that asks, could not do it; such a request has no buffer, and wants ``retry`` or
    ``fail``. For all others, None.
    """

    def __init__(self, queue: Queue, call: Sequence[int]) -> None:
        offset, length, place, what, piece, flags, error, file = call
        self._queue = queue
        self._unanswered = [piece]  # of several threads that answer, one gets it
        self.op = Op(what & 0xFF)
        self.space = what >> _SPACE_SHIFT
        self.flags = IoFlag(flags)
        self.offset = offset
        self.length = length
        self.early = bool(what & IS_EARLY)
        self.failure = Failure(file, error) if what & HAS_FAILED else None
        moves_data = self.op in (Op.READ, Op.WRITE, Op.ZONE_APPEND, Op.REPORT_ZONES)
        has_data = moves_data and not self.early and not self.failure
        self.buffer = queue.data(place, length, what) if has_data else memoryview(b"")

    @property
    def answered(self) -> bool:
        """Whether it has had its answer."""
        return not self._unanswered

    def receive(self, buffer: Any) -> None:
        """Have the data of an ``early`` one put into ``buffer``: writable, ``length`` bytes or more.

        The request comes to ``Target.upcall`` again with it, and until that is answered ``buffer`` stays in use.
        ValueError for one that is too short or read-only, TypeError for what is no buffer; RuntimeError for a request
        whose data is there.
        """
        if not self.early:
            raise RuntimeError("the data of this request is there already")
        if self.answered:
            raise RuntimeError(_ONCE)
        place = writable(buffer, self.length)
        self._queue.receive(self._answer(), place, self.length)

    def done(self, appended: int = 0) -> None:
        """All of it is done, with ``buffer`` filled if it is a READ or a report; ``appended`` is where the data of a
        ZONE_APPEND went, in bytes. RuntimeError for an ``early`` one, and after a ``failure``.
        """
        if self.early:
            raise RuntimeError("a write is not done before its data is received")
        if self.failure:
            raise RuntimeError("what a file failed to do is not done: it is to be tried again, or fails")
        where = disk_place(appended)
        piece = self._answer()
        self._queue.let_go(piece)
        if self.op is Op.ZONE_APPEND:
            self._queue.appended(piece, where)
        self._queue.answer(piece, 0)

    def fail(self, errno: int) -> None:
        """The whole request fails with this errno, a positive number; ValueError for others."""
        if errno <= 0:
            raise ValueError(f"{errno} is not an errno")
        piece = self._answer()
        self._queue.let_go(piece)
        self._queue.answer(piece, -errno)

    def retry(self) -> None:
        """The map has changed meanwhile: let it answer. If it still says ``Upcall``, the request comes again."""
        self._queue.retry(self._answer())

    def _answer(self) -> int:
        """The call's number, once."""
        try:
            piece = self._unanswered.pop()
        except IndexError:
            raise RuntimeError(_ONCE) from None
        with contextlib.suppress(BufferError):  # others still hold views of it
            self.buffer.release()
        return piece


def disk_place(offset: int) -> int:
    """``offset``, if that can be a place on a disk. ValueError if not; TypeError for what is no number."""
    if not 0 <= offset < 1 << 63 or offset % SECTOR:
        raise ValueError(f"{offset} is no place on a disk")
    return int(offset)


def writable(buffer: Any, length: int) -> memoryview:
    """The bytes of a buffer that takes so many. ValueError for one that is too short or read-only; TypeError for what
    is none.
    """
    place = memoryview(buffer).cast("B")
    if place.readonly:
        raise ValueError(f"{type(buffer).__name__} is read-only")
    if len(place) < length:
        raise ValueError(f"{len(place)} bytes are too few for a write of {length}")
    return place


def _cut(_queue: Any) -> None:
    raise OSError(errno.ECANCELED, "cut off")


class Memory:
    """What the threads of one hardware queue share: the driver's descriptors, and a buffer for each tag.

    Made before the first of them, closed after the last has ended, by any thread. OSError when there is no
    memory, or ``cdev_fd`` is no such device.
    """

    def __init__(
        self,
        cdev_fd: int,
        q_id: int,
        depth: int,
        buf_bytes: int,
        threads: int = 1,
        iod_bytes: int = IO_DESC_SIZE,
    ) -> None:
        self.q_id = q_id
        self.c = ffi.new("struct uq_memory *")
        options = self.options = ffi.new("struct uq_options *")
        options.cdev_fd, options.q_id, options.depth, options.buf_bytes = cdev_fd, q_id, depth, buf_bytes
        options.threads = threads
        options.iod_bytes = iod_bytes
        check(lib.uq_map_memory(self.c, options), f"memory of queue {q_id}")

    def close(self, *, leave_buffers: bool = False) -> None:
        """Unmap it. ``leave_buffers``: all but those, where requests may yet write that were cut off."""
        if leave_buffers:
            self.c.bufs = ffi.NULL
        lib.uq_unmap_memory(self.c)


class Queue:
    """The queue engine. Made, run and closed by one thread: the driver binds each tag to it.

    The constructor sends FETCH for every tag, or, as number ``thread`` of several, for its own; in batch mode the
    first, 0, has to be made before the others. OSError when the driver or io_uring refuses. ``close`` only after
    ``run`` returned None: until then the kernel may write to the buffers. Memory and map outlive the queue; of shared
    buffers, those that the driver knows do.
    """

    def __init__(
        self,
        memory: Memory,
        mode: Mode,
        target_map: Map,
        thread: int = 0,
        shared: SharedBuffers | None = None,
    ) -> None:
        self._queue = ffi.new("struct uq_queue *")
        self._memory = memory
        self._map = target_map
        self._shared = shared
        self._received: dict[int, Any] = {}  # by tag: must outlive the request
        self._given: dict[int, memoryview] = {}  # the same by address, until its data is there
        self._thread = threading.get_ident()
        self._said: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._open = threading.Lock()  # while others wake it
        options = ffi.new("struct uq_options *", memory.options[0])
        options.thread = thread
        options.data, options.batch = mode.data, mode.batch
        options.slots = min(options.depth, _BUFFER_SLOTS)
        if target_map.metadata:
            options.metadata = target_map.metadata.to_c()
        options.shared = shared.c if shared else ffi.NULL
        check(lib.uq_init(self._queue, options, memory.c, target_map.c), f"set-up of queue {memory.q_id}")
        self._tags = int(self._queue.live)
        self._first = ffi.cast("unsigned char *", memory.c.bufs)
        self.buffers = memoryview(ffi.buffer(self._first, memory.c.bufs_len))
        nr = self._queue.nr_pieces
        self._calls = memoryview(ffi.buffer(self._queue.calls, nr * _CALL.size))

    def run(self) -> Event:
        """Serve requests with the GIL released, until there is something for Python; then call it again.

        STOPPED: the driver took all tags back. UPCALLS: what the map leaves to Python is in ``calls``, and its results
        belong into ``finish``. IO_ERROR: ``error`` tells of a request that failed (the first, second, fourth, eighth
        ...). WOKEN: another thread has said something. FILE_OPS: ``ended`` has some. OSError: the driver refused a
        command, and the device must be torn down.
        """
        if self._said:
            self._take_said()
        event = lib.uq_run(self._queue)
        return _EVENTS[event if event >= 0 else check(event, "queue")]

    def poll(self) -> Event:
        """The same without waiting, for who waits for other things, too (``listen``): NOTHING when that was all."""
        if self._said:
            self._take_said()
        event = lib.uq_poll(self._queue)
        return _EVENTS[event if event >= 0 else check(event, "queue")]

    def listen(self) -> int:
        """An eventfd that tells when ``poll`` has something to do; read it before that. The queue's own. OSError."""
        return check(lib.uq_listen(self._queue), "queue")

    @property
    def error(self) -> IoError:
        """After IO_ERROR."""
        q = self._queue
        return IoError(q.error_op, q.error_sector, -q.error_res, q.errors, q.injected)

    def short_calls(self) -> Iterator[ShortCall]:
        """After UPCALLS: what Python is asked. The results go into ``finish`` before the next ``run``."""
        return _SHORT_CALL.iter_unpack(self._calls[: self._queue.nr_calls * _CALL.size])

    def finish(self, failed: Mapping[int, int] | None = None) -> None:
        """All of ``short_calls`` are done, but for ``failed``: by their place among them, a negative errno, or LATER.

        Without this, all of them fail with EIO.
        """
        lib.uq_done(self._queue)
        if failed:
            for n, result in failed.items():
                self._queue.results[n] = result

    def calls(self) -> list[Call]:
        """After UPCALLS: what Python is asked. Each is answered later, with ``answer``, ``retry`` or ``receive``."""
        lib.uq_defer(self._queue)
        return list(_CALL.iter_unpack(self._calls[: self._queue.nr_calls * _CALL.size]))

    def who_answers(self, space: int) -> Answer | None:
        """``Map.answer``."""
        return self._map.answer(space)

    def requests(self) -> list[Request]:
        """The same as objects."""
        lib.uq_defer(self._queue)
        calls = self._calls[: self._queue.nr_calls * _CALL.size]
        return [Request(self, call) for call in _WHOLE_CALL.iter_unpack(calls)]

    def call(self, nth: int) -> Call:
        """All of one of ``short_calls``."""
        return _CALL.unpack_from(self._calls, nth * _CALL.size)

    def data(self, place: int, length: int, what: int) -> memoryview:
        """The data of a call: in the very buffer that it was received in; read-only where it is a client's memory.

        Any thread: it is no slice of ``buffers``, because CPython without a GIL loses count of the slices of a
        memoryview that threads take and release at the same time (python/cpython#127716).
        """
        if not what & IS_ELSEWHERE:
            return memoryview(ffi.buffer(self._first + place, length))
        if given := self._given.pop(place, None):
            return given[:length]
        found = memoryview(ffi.buffer(ffi.cast("unsigned char *", place), length))
        if what & 0xFF == Op.WRITE:  # perhaps mapped to be read
            return found.toreadonly()
        return found

    def fileno(self) -> int:
        """The ring's. Any thread, and a forked child."""
        return int(lib.uq_ring_fd(self._queue))

    # -- results that come later, from any thread ------------------------------------------

    def answer(self, piece: int, result: int) -> None:
        """The result of a call, by its number: 0 or a negative errno."""
        self._say(lib.uq_answer, piece, result)

    def answer_here(self, piece: int, result: int) -> None:
        """The same in the queue's thread."""
        lib.uq_answer(self._queue, piece, result)

    def appended(self, piece: int, offset: int) -> None:
        """Where the data of a ZONE_APPEND went, before its answer. ValueError, TypeError for what is no place."""
        self._say(lib.uq_appended, piece, disk_place(offset))

    def retry(self, piece: int) -> None:
        """The map has changed, and is to be asked again."""
        self._say(lib.uq_retry, piece)

    def receive(self, piece: int, buffer: Any, length: int) -> None:
        """Where the data of an early one is to go (writable); stays in use until it is answered.

        ValueError for one that is too short or read-only.
        """
        place = writable(buffer, length)
        self._say(self._receive, piece, place)

    def _receive(self, queue: Any, piece: int, place: memoryview) -> None:
        memory = self._received[piece] = ffi.from_buffer(place, require_writable=True)
        self._given[int(ffi.cast("uintptr_t", memory))] = place
        lib.uq_receive(queue, piece, memory)

    def let_go(self, piece: int) -> None:
        """Of the buffer that the data of this one was received in."""
        self._received.pop(piece, None)

    def cut(self) -> None:
        """Have ``run`` or ``poll`` raise OSError (ECANCELED), whatever requests there are."""
        self._say(_cut)

    def _say(self, what: Callable[..., None], *args: Any) -> None:
        if threading.get_ident() == self._thread:
            what(self._queue, *args)
            return
        self._said.append((what, args))
        with self._open:
            if self._queue.results:  # else the queue has ended, and nobody waits for it
                check(lib.uq_wake(self._queue), "waking a queue")

    def _take_said(self) -> None:
        while self._said:
            what, args = self._said.popleft()
            what(self._queue, *args)

    # -- operations on files, in the queue's thread ----------------------------------------

    @property
    def max_file_ops(self) -> int:
        """So many at the same time."""
        return int(self._queue.max_file_ops)

    def file_op(self, number: int, op: FileOp) -> None:
        """Begin one on the queue's ring: ``ended`` has its number, below ``max_file_ops``, once it is through.

        The caller keeps its memory until then.
        """
        check(lib.uq_file_op(self._queue, number, *op), "an operation on a file")

    def ended(self) -> list[tuple[int, int]]:
        """After FILE_OPS: numbers and results, which are as those of the system call, or a negative errno."""
        queue = self._queue
        found = [(int(one.id), int(one.res)) for one in queue.ended[0 : queue.nr_ended]]
        queue.nr_ended = 0
        return found

    @property
    def upcalls(self) -> int:
        """How many requests, or parts of them, were handed to Python so far."""
        return int(self._queue.upcalls)

    def is_waiting(self) -> bool:
        """Whether there are requests without an answer. Any thread; not after ``close``."""
        return bool(lib.uq_is_waiting(self._queue))

    def has_lost_tags(self) -> bool:
        """Whether the driver has taken some back. Any thread."""
        return int(self._queue.live) < self._tags

    def close(self) -> None:
        """Release the ring."""
        with self._open:
            self._thread = 0  # another thread may have the number by now
            self._said.clear()
            lib.uq_exit(self._queue)
