"""The contract between a target and the rest.

::

    in the command, before the fork           in the daemon
    ───────────────────────────────           ─────────────────────────────
    Target(options)   no I/O yet
        │
    open()            files, checks, sizes;
        │             UblkError reaches the
        │             user
        └─────────────── fork ───────────────▶ start()  threads, connections
                                                 │
                                               map()    what the engine serves
                                                 │      without Python
                                                 ▼
                                               start_thread()
                                                 │      in each queue's thread
                                                 ▼
                                               read() write() flush() ...
                                                 │      the rest, in the
                                                 ▼      queues' threads
                                               stop_thread()
                                                 ▼
                                               stop()   after the last request
    close()  ◀───────────────────────────────  close()

``open`` runs in the foreground, so that whatever is wrong is told to the user.
``start``, ``map``, ``stop`` and ``close`` run in the daemon's main thread.

A target that says nothing of ``map`` answers everything by its methods, and the
methods that it defines say what its device can do: without ``write`` it is
read-only, without ``flush`` it has no write cache, and so on.
"""

from __future__ import annotations

import errno
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ublkpy.errors import UblkError
from ublkpy.tgt.disk import DiskOptions
from ublkpy.tgt.options import Configurable
from ublkpy.uring.integrity import Integrity
from ublkpy.uring.map import Error, Map, Null, Routing, Upcall
from ublkpy.uring.queue import Request
from ublkpy.uring.zones import Zone, Zones

MAX_DISCARD_BYTES = 4 * 1024**3 - 512
"""The most that one discard or write-zeroes request may cover: 32 bits of bytes."""


@dataclass(frozen=True)
class Geometry:
    """What a target's block device looks like. All sizes in bytes, as ints; those of blocks are powers of two.

    The options of the disk may change it (``ublkpy.tgt.limits``), and what does not fit together is an error of ``ublk
    add``. Without a map of its own, what a target can do follows from its methods: without ``write`` it is read-only,
    ``write_cache`` is whether it has ``flush``, and a maximum here counts if it has ``discard`` or ``write_zeroes``.
    Most of this is what the kernel calls ``struct queue_limits`` (include/linux/blkdev.h).
    """

    size: int
    """A multiple of ``logical_block``, and not 0."""
    logical_block: int = 512
    """Smallest unit of a request, and what each offset and length is a multiple of: 512 to 4096."""
    physical_block: int = 4096
    """What is written without being read before; ``logical_block`` if that is more."""
    io_min: int = 4096
    """Smallest request that is worth it; ``physical_block`` if that is more."""
    io_opt: int = 4096
    """Size of requests that suits it best; ``io_min`` if that is more."""
    read_only: bool = False
    """Whether writes are refused."""
    rotational: bool = False
    """Whether to say that it spins, which file systems and schedulers look at."""
    write_cache: bool = True
    """Whether what was written is durable only after a flush: then FLUSH requests arrive, and writes with FUA. Else
    each write is durable before it is done.
    """
    discard_granularity: int = 0
    """Unit in which space is freed. 0: with methods for that, a logical block; with a map, it can neither discard nor
    write zeroes.
    """
    max_discard_bytes: int = 0
    """Largest discard, up to MAX_DISCARD_BYTES: 4 GiB without a sector. 0: with a ``discard`` method, that; with a map,
    none.
    """
    max_write_zeroes_bytes: int = 0
    """Largest request for zeroes; the same."""
    integrity: Integrity | None = None
    """Metadata with each block; the map says where it lives (``Map.metadata``)."""
    zones: Zones | None = None
    """Those of a zoned disk, which needs the methods for zones."""


@dataclass
class Progress:
    """How far something is that a daemon does while its device is used (``Target.progress``)."""

    total: int
    """Bytes."""
    done: int = 0
    """Bytes of them."""
    error: str = ""
    """Why it was given up."""
    hint: str = ""
    """What helps."""
    is_over: bool = False
    """Whether it has come to its end, this way or that."""


Later = Awaitable[None] | None
"""What a method of a target returns: None when it is done, or, from an ``async def``, what is awaited for that."""


class Target(Configurable, ABC):
    """Base of all targets: a class of yours with ``open``, and then ``read`` and others of its like, or ``map``.

    The first line of your class's docstring is its help, its options are class attributes (see ``option``). Its object
    has the options as attributes. ``values`` are theirs, checked before, sizes in bytes; ValueError where a required
    one is missing. It opens nothing yet.
    """

    name: ClassVar[str]
    """What people call it; that of the class if nothing is said."""
    blocking: bool = False
    """Whether its methods wait for something, without ``async def``: then threads of a pool call them. With an ``async
    def`` among them, it is of no meaning.
    """
    moves_data: ClassVar[bool] = True
    """Whether the data of a READ or WRITE matters to it; else it need not be copied."""
    disk: DiskOptions = DiskOptions()
    """What was said of the disk, known before ``open``. What nobody said is None, or False."""
    segment: int | None = None
    """The shared memory segment that its disk is in, if that outlives the daemon: the next one's target has it before
    ``open``, and who deletes the device removes it.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in vars(cls):
            cls.name = re.sub(
                r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__.removesuffix("Target") or cls.__name__
            ).lower()

    @classmethod
    def text(cls) -> str:
        """What the class says that it is; its first line is the short form."""
        return inspect.cleandoc(cls.__doc__ or "") or "a target"

    def block_size(self, own: int) -> int:
        """The bytes of a logical block, where the backing takes blocks of ``own`` bytes: as said, but not less."""
        return max(own, self.disk.logical_block_size or own)

    def paths(self) -> list[Path]:
        """The files that the options name, and the daemon may open: of disks that hold none of them it sees only
        what is open already. Runs in the daemon, after ``open``.
        """
        said = (getattr(self, name) for name, opt in self.options.items() if opt.kind.is_path)
        return [path for value in said if value for path in (value if isinstance(value, tuple) else (value,))]

    def segments(self) -> list[int]:
        """That of its own, and those of its parts."""
        return [] if self.segment is None else [self.segment]

    was_cut: bool = False
    """In ``stop``: whether requests were given up without an answer, which may yet write to its files."""

    @property
    def has_metadata(self) -> bool:
        """Whether the options ask for metadata with each block (``Geometry.integrity``)."""
        return False

    @property
    def outlives_daemon(self) -> bool:
        """Whether what was written to it is there for another daemon: else ``recovery`` is refused."""
        return True

    # -- its life --------------------------------------------------------------------------

    @abstractmethod
    def open(self) -> Geometry:
        """Open what the target needs and say what the device looks like.

        Runs before the fork, in the command's main thread. Raises UblkError, which the user is shown; anything else is
        shown with its traceback.
        """

    def start(self) -> Later:
        """Begin what a fork would not survive: threads, connections.

        Runs in the daemon's main thread, before ``map``; as ``async def`` on the loop of each queue's thread, before
        its first request. What it raises ends the daemon, and is shown as from ``open``.
        """
        return None

    def map(self, target_map: Map) -> None:
        """Say where the bytes of the device live: in ``target_map``, which has its size, and of which nothing is said
        yet. Runs in the daemon's main thread, after ``start``, once.

        Here: with the methods of this target, all of them. The map is good until ``stop`` has returned.
        """
        methods = self.methods()

        def way(name: str, otherwise: int) -> Upcall | Error:
            return Upcall() if name in methods else Error(otherwise)

        write = Upcall(early=True) if "write_buffer" in methods else way("write", errno.EROFS)
        routing = Routing(
            way("read", errno.EOPNOTSUPP),
            write,
            way("discard", errno.EOPNOTSUPP),
            way("write_zeroes", errno.EOPNOTSUPP),
        )
        target_map.fill(routing, Upcall() if "flush" in methods else Null())

    def resize(self, size: int) -> None:
        """Make what is behind the map fit a device of ``size`` bytes: before it grows, and after it has shrunk.

        Runs in the daemon's main thread. The map's end moves with it; after a shrink no request is behind it any
        more. Raises UblkError, as here, where a device of this target has to stay as it is.
        """
        raise UblkError(f"a device of target {self.name} keeps its size", "delete it, and add it anew")

    def resync(self, *, force: bool) -> None:
        """Begin to bring back what had failed; ``progress`` says what becomes of it. ``force``: whatever is lost by
        that.

        Runs in the daemon's main thread, and returns at once. Raises UblkError, as here, where there is nothing that
        could be brought back.
        """
        raise UblkError(f"a device of target {self.name} has no legs to bring back", "ublk resync is for mirrors")

    def progress(self) -> Progress | None:
        """How far ``resync`` is; None if there was none. Runs in the daemon's main thread."""
        return None

    def start_thread(self) -> None:
        """Begin what belongs to one thread, such as a connection to a database.

        Runs in each thread of a queue, before its first request; with ``blocking``, too, not in those of the pool. What
        it raises ends the daemon, as with ``start``.
        """

    def stop_thread(self) -> None:
        """End what ``start_thread`` began. Runs in the same thread, after its last request; errors are logged."""

    def stop(self) -> Later:
        """End what ``start`` began. Runs where that did, after the last request; what it raises is logged."""
        return None

    def close(self) -> None:
        """Release what ``open`` took. Runs in the main threads of command and daemon, as the last; must not raise."""

    # -- its requests ----------------------------------------------------------------------

    @classmethod
    def own_methods(cls) -> frozenset[str]:
        """Which of the methods for requests (``read`` to ``punch_hole``) this class defines."""
        return frozenset(name for name in METHODS if getattr(cls, name) is not getattr(Target, name))

    def methods(self) -> frozenset[str]:
        """Which of them this target has, once it is open: what its device can do. Here, those of its class."""
        return self.own_methods()

    def read(self, offset: int, buf: memoryview) -> Later:
        """Fill ``buf`` with the bytes of the device from ``offset`` on.

        For all of these up to ``punch_hole``: OSError with an errno is the answer to the request; any other exception
        is EIO, and a traceback in the log. Offset and length are in bytes, multiples of the logical block, and within
        the device.

        It runs in a thread of a queue, one call after the other: with several queues, or threads of a queue, several
        run at once. As ``async def`` it runs on an asyncio loop in that thread, many at a time, and with ``blocking``
        in up to 32 threads that belong to it. One that is not ``async def``, and returns something to await, is EIO.

        ``buf`` (bytes, ``len(buf)`` of them) is the very memory that the kernel takes the data from; it is released
        with the return, and whoever uses it later gets a ValueError. Parts of it (``buf[:512]``) are not released, and
        must not be kept: they are then another request's. A thread that fills it is to be awaited before this returns
        or raises.
        """
        raise OSError(errno.EOPNOTSUPP, "read")

    def write(self, offset: int, buf: memoryview) -> Later:
        """Take the bytes of ``buf`` as those from ``offset`` on. Threads, errors and life of ``buf`` as with ``read``.

        Where ``buf`` is memory that a client shares, it is read-only, and the client may still write to it. A write
        that has to be durable at once (UBLK_IO_F_FUA) is followed by a ``flush``, unless there is a ``write_fua``.
        """
        raise OSError(errno.EOPNOTSUPP, "write")

    def write_fua(self, offset: int, buf: memoryview) -> Later:
        """The same for a write that has to be durable when it returns (UBLK_IO_F_FUA). Needs a ``flush`` beside it:
        a disk without a write cache gets no such writes.
        """
        raise OSError(errno.EOPNOTSUPP, "write_fua")

    def write_buffer(self, offset: int, length: int) -> Any:
        """Where the ``length`` bytes for a ``write`` to come are to go: a writable buffer of yours, of that length or
        more, which is then the ``buf`` of that (and ``buf.obj`` what it is a part of). It is in use until that returns.
        Without a ``write``, it is never called, and an error of ``open``.

        Plain also in a target of ``async def``; else threads and errors as with ``read``, and one that is read-only or
        too short is EIO. Needs ``mode: get-data`` (UBLK_F_NEED_GET_DATA).
        """
        raise OSError(errno.EOPNOTSUPP, "write_buffer")

    def flush(self) -> Later:
        """Make durable what was written before: all writes that have returned. Threads and errors as with ``read``."""
        raise OSError(errno.EOPNOTSUPP, "flush")

    def discard(self, offset: int, length: int) -> Later:
        """Forget ``length`` bytes from ``offset`` on: nobody needs them any more, and what is read there is yours to
        choose. At most ``Geometry.max_discard_bytes``; threads and errors as with ``read``.
        """
        raise OSError(errno.EOPNOTSUPP, "discard")

    def write_zeroes(self, offset: int, length: int) -> Later:
        """Write ``length`` zero bytes from ``offset`` on, at most ``Geometry.max_write_zeroes_bytes``.

        Where there is a ``punch_hole``, these are to keep their space (UBLK_IO_F_NOUNMAP). Threads and errors as with
        ``read``.
        """
        raise OSError(errno.EOPNOTSUPP, "write_zeroes")

    def punch_hole(self, offset: int, length: int) -> Later:
        """The same for zero bytes that need no space. Without it, they come as ``write_zeroes``, too; it needs that
        one beside it.
        """
        raise OSError(errno.EOPNOTSUPP, "punch_hole")

    # -- its zones, if it has some ---------------------------------------------------------

    def report_zones(self, offset: int, count: int) -> Iterable[Zone] | Awaitable[Iterable[Zone]]:
        """The zones from the one that begins at ``offset`` on; at least ``count`` of them, unless there are fewer."""
        raise OSError(errno.EOPNOTSUPP, "report_zones")

    def zone_append(self, offset: int, buf: memoryview) -> int | Awaitable[int]:
        """Write ``buf`` at the write pointer of the zone that begins at ``offset``; returns where that is.

        A write that is not at the write pointer of its zone is ``write``'s to refuse, with EIO.
        """
        raise OSError(errno.EOPNOTSUPP, "zone_append")

    def zone_open(self, offset: int) -> Later:
        """Open the zone that begins at ``offset``, explicitly. ETOOMANYREFS if too many are, EOVERFLOW if too many are
        active (block/blk-core.c)."""
        raise OSError(errno.EOPNOTSUPP, "zone_open")

    def zone_close(self, offset: int) -> Later:
        """Close it."""
        raise OSError(errno.EOPNOTSUPP, "zone_close")

    def zone_finish(self, offset: int) -> Later:
        """Make it full."""
        raise OSError(errno.EOPNOTSUPP, "zone_finish")

    def zone_reset(self, offset: int) -> Later:
        """Make it empty."""
        raise OSError(errno.EOPNOTSUPP, "zone_reset")

    def zone_reset_all(self) -> Later:
        """Make all of them empty."""
        raise OSError(errno.EOPNOTSUPP, "zone_reset_all")

    def upcall(self, requests: Sequence[Request]) -> None:
        """Answer the requests that the map leaves to Python, now or later, from any thread: in the place of ``read``
        and its like, which are then not called.

        Runs in a thread of their queue. Several such calls may run at once: for each queue as many as it has threads.
        Those stay on one CPU each, and what they start inherits it.
        OSError is the answer to those that it leaves, any other exception is EIO and a traceback in the log.
        """
        raise OSError(errno.EIO, f"the map of {self.name} asks for what it cannot answer")

    _end_device: Callable[[], None] | None = None  # once there is one
    _tell_changed: Callable[[], None] | None = None

    def tell_changed(self) -> None:
        """Have ``backing`` and ``status`` asked again, for ``ublk list``. Any thread; before ``start``, and after
        ``stop``, nothing.
        """
        if self._tell_changed:
            self._tell_changed()

    def end_device(self) -> None:
        """Have its device deleted, as ``kill`` of the daemon would: not while it is mounted or held. Any thread, from
        ``start`` on; RuntimeError before that. Returns at once.
        """
        if self._end_device is None:
            raise RuntimeError(f"there is no device of target {self.name} yet")
        self._end_device()

    # -- what is shown of it ---------------------------------------------------------------

    def backing(self) -> str:
        """The file, device or address behind the device, for ``ublk list``; empty if there is none. After ``open``."""
        return ""

    def status(self) -> dict[str, object]:
        """What ``ublk list -n`` shows of the target besides its name and size, in ublksrv's terms; values fit for JSON.
        Runs in the daemon's main thread.
        """
        return {}


ZONE_METHODS = ("report_zones", "zone_append", "zone_open", "zone_close", "zone_finish", "zone_reset", "zone_reset_all")
METHODS = (
    *("read", "write", "write_fua", "write_buffer", "flush", "discard", "write_zeroes", "punch_hole"),
    *ZONE_METHODS,
)
