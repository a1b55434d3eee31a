"""One queue of a device, as its threads drive it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from ublkpy.uring.ffi import check, ffi, lib
from ublkpy.uring.map import Map
from ublkpy.uring.mode import Mode
from ublkpy.uring.shmem import SharedBuffers
from ublkpy.uring.uapi import IO_DESC_SIZE, IoFlag, Op

# In the ring's table of buffers, which may have more than any queue needs (io_uring/rsrc.c: IORING_MAX_REG_BUFFERS).
_BUFFER_SLOTS = 16384


@dataclass(frozen=True)
class IoError:
    """A request that failed: its operation, place (512-byte sectors), errno, and how many have so far."""

    op: int
    start_sector: int
    errno: int
    count: int

    @property
    def op_name(self) -> str:
        return Op(self.op).name if self.op in Op.__members__.values() else f"op {self.op}"


class Request:
    """What the map leaves to Python: ``length`` bytes from ``offset`` on, of the device; a FLUSH has neither.

    ``buffer`` is where a WRITE's data is and a READ's is to be, until the answer. One answer each: ``done``,
    ``fail`` or ``retry``. In the queue's thread only.

    An ``early`` one is a WRITE whose data is still with the driver, and has no buffer. Its answer is ``receive``,
    ``fail`` or ``retry``.
    """

    def __init__(self, queue: Any, upcall: Any, received: dict[int, Any]) -> None:
        self._queue = queue
        self._received = received
        self._piece = upcall.piece
        self.op = Op(upcall.op_flags & 0xFF)
        self.flags = IoFlag(upcall.op_flags & ~0xFF)
        self.offset: int = upcall.pos
        self.length: int = upcall.len
        self.buffer = memoryview(ffi.buffer(upcall.buf, upcall.len) if upcall.buf else b"")
        if self.op is Op.WRITE and IoFlag.SHMEM_ZC in self.flags:  # the client's own memory, perhaps mapped to be read
            with self.buffer as whole:
                self.buffer = whole.toreadonly()
        self.early = bool(upcall.early)
        self.answered = False

    def receive(self, buffer: Any) -> None:
        """Have the data put into this (writable, ``length`` bytes): then it comes again, as a request with it.

        ValueError for one that is too short or read-only.
        """
        if not self.early:
            raise RuntimeError("the data of this request is there already")
        place = ffi.from_buffer(buffer, require_writable=True)
        if len(place) < self.length:
            raise ValueError(f"{len(place)} bytes are too few for a write of {self.length}")
        self._answer()
        self._received[self._piece] = place
        lib.uq_receive(self._queue, self._piece, place)

    def done(self) -> None:
        """All of it is done."""
        if self.early:
            raise RuntimeError("a write is not done before its data is received")
        self._answer()
        lib.uq_answer(self._queue, self._piece, 0)

    def fail(self, errno: int) -> None:
        """The whole request fails with this errno."""
        self._answer()
        lib.uq_answer(self._queue, self._piece, -errno)

    def retry(self) -> None:
        """The map has changed meanwhile: let it answer."""
        self._answer()
        lib.uq_retry(self._queue, self._piece)

    def _answer(self) -> None:
        if self.answered:
            raise RuntimeError("a request is answered once")
        with contextlib.suppress(BufferError):  # others still hold views of it
            self.buffer.release()
        self.answered = True


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

    def close(self) -> None:
        """Unmap it."""
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
        options = ffi.new("struct uq_options *", memory.options[0])
        options.thread = thread
        options.data, options.batch = mode.data, mode.batch
        options.slots = min(options.depth, _BUFFER_SLOTS)
        if target_map.metadata:
            options.metadata = target_map.metadata.to_c()
        options.shared = shared.c if shared else ffi.NULL
        check(lib.uq_init(self._queue, options, memory.c, target_map.c), f"set-up of queue {memory.q_id}")
        self._tags = int(self._queue.live)

    def run(self) -> IoError | list[Request] | None:
        """Serve requests with the GIL released. None: the driver took all tags back.

        Requests: what the map leaves to Python. An IoError tells of a request that failed (the first, second,
        fourth, eighth ...). Call it again after either. OSError: the driver refused a command, and the device
        must be torn down.
        """
        event = check(lib.uq_run(self._queue), "queue")
        if event == lib.UQ_STOPPED:
            return None
        if event == lib.UQ_UPCALLS:
            return self._requests()
        q = self._queue
        return IoError(q.error_op, q.error_sector, -q.error_res, q.errors)

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
        lib.uq_exit(self._queue)

    def _requests(self) -> list[Request]:
        found, upcall = [], ffi.new("struct uq_upcall *")
        while lib.uq_upcall(self._queue, upcall):
            found.append(Request(self._queue, upcall, self._received))
        return found
