"""One queue of a device, as its thread drives it."""

from __future__ import annotations

from dataclasses import dataclass

from ublkpy.uring.ffi import check, ffi, lib
from ublkpy.uring.mode import Mode
from ublkpy.uring.uapi import Op

# In the ring's table of buffers, which may have more than any queue needs (io_uring/rsrc.c: IORING_MAX_REG_BUFFERS).
_BUFFER_SLOTS = 16384


@dataclass(frozen=True)
class Null:
    """The device's bytes live nowhere: each request succeeds and moves nothing."""


@dataclass(frozen=True)
class Linear:
    """The device's bytes live in one open file or block device, from ``offset`` (bytes) on."""

    fd: int
    offset: int = 0
    is_block_device: bool = False


Map = Null | Linear
"""Where a device's bytes live; what the engine serves without Python."""


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


class Queue:
    """The queue engine. Made, run and closed by one thread: the driver binds each tag to it.

    The constructor sends FETCH for every tag; OSError when the driver or io_uring refuses. ``close`` only
    after ``run`` returned None: until then the kernel may write to the buffers.
    """

    def __init__(self, cdev_fd: int, q_id: int, depth: int, buf_bytes: int, mode: Mode, target_map: Map) -> None:
        self._queue = ffi.new("struct uq_queue *")
        options = ffi.new("struct uq_options *")
        options.cdev_fd, options.q_id, options.depth, options.buf_bytes = cdev_fd, q_id, depth, buf_bytes
        options.data, options.batch = mode.data, mode.batch
        options.slots = min(depth, _BUFFER_SLOTS)
        check(lib.uq_init(self._queue, options, _to_c(target_map)), f"set-up of queue {q_id}")

    def run(self) -> IoError | None:
        """Serve requests with the GIL released. None: the driver took all tags back.

        An IoError tells of a request that failed (the first, second, fourth, eighth ...); call it again.
        OSError: the driver refused a command, and the device must be torn down.
        """
        event = check(lib.uq_run(self._queue), "queue")
        if event == lib.UQ_STOPPED:
            return None
        q = self._queue
        return IoError(q.error_op, q.error_sector, -q.error_res, q.errors)

    def close(self) -> None:
        """Release the ring, the descriptors and the buffers."""
        lib.uq_exit(self._queue)


def _to_c(target_map: Map) -> object:
    c_map = ffi.new("struct uq_map *")
    match target_map:
        case Null():
            c_map.route = lib.UQ_NULL
        case Linear(fd, offset, is_block_device):
            c_map.route = lib.UQ_LINEAR
            c_map.fd = fd
            c_map.offset = offset
            c_map.is_block_device = is_block_device
    return c_map
