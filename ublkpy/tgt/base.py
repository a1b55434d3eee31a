"""The contract between a target and the rest.

::

    in the command, before the fork           in the daemon
    ───────────────────────────────           ─────────────────────────────
    Target(options)   no I/O yet
        │
    open()            files, checks, sizes;
        │             UblkError reaches the
        │             user
        └─────────────── fork ───────────────▶ map()   what the engine serves
                                                 │     without Python
                                                 ▼
                                               upcall()  the rest, in the
                                                 │       queues' threads
                                                 ▼
                                               close() after the last request

``open`` runs in the foreground, so that whatever is wrong is told to the user.
``map`` and ``close`` run in the daemon's main thread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ublkpy.errors import UblkError
from ublkpy.tgt.disk import DiskOptions
from ublkpy.tgt.options import Configurable
from ublkpy.uring.integrity import Integrity
from ublkpy.uring.map import Map
from ublkpy.uring.queue import Request

MAX_DISCARD_BYTES = 4 * 1024**3 - 512
"""The most that one discard or write-zeroes request may cover: 32 bits of bytes."""


@dataclass(frozen=True)
class Geometry:
    """What a target's block device looks like. All sizes in bytes.

    ``write_cache``: what was written is durable only after a flush, so FLUSH requests arrive and FUA is
    honoured. A ``discard_granularity`` of 0 means that the target can neither discard nor write zeroes, a
    maximum of 0 that it cannot do the one. With ``integrity``, the map says where the metadata lives.
    """

    size: int
    logical_block: int = 512
    physical_block: int = 4096
    io_min: int = 4096
    io_opt: int = 4096
    read_only: bool = False
    rotational: bool = False
    write_cache: bool = True
    discard_granularity: int = 0
    max_discard_bytes: int = 0
    max_write_zeroes_bytes: int = 0
    integrity: Integrity | None = None


class Target(Configurable, ABC):
    """Base of all targets. The class docstring's first line is the target's help."""

    name: ClassVar[str]
    moves_data: ClassVar[bool] = True
    """Whether the data of a READ or WRITE matters to it; else it need not be copied."""
    disk: DiskOptions = DiskOptions()
    """What was said of the disk, known before ``open``."""

    def block_size(self, own: int) -> int:
        """The logical block of a disk whose backing takes blocks of ``own`` bytes."""
        return max(own, self.disk.logical_block_size or own)

    @property
    def has_metadata(self) -> bool:
        """Whether the options ask for metadata with each block."""
        return False

    @abstractmethod
    def open(self) -> Geometry:
        """Open what the target needs and say what the device looks like.

        Runs before the fork, in the user's command. Raises UblkError.
        """

    @abstractmethod
    def map(self, size: int) -> Map:
        """Where the ``size`` bytes of the device live. Runs in the daemon, after ``open``."""

    def resize(self, size: int) -> None:
        """Make what is behind the map fit a device of ``size`` bytes: before it grows, and after it has shrunk.

        Runs in the daemon's main thread. The map's end moves with it; after a shrink no request is behind it any
        more. Raises UblkError, as here, where a device of this target has to stay as it is.
        """
        raise UblkError(f"a device of target {self.name} keeps its size", "delete it, and add it anew")

    def upcall(self, requests: Sequence[Request]) -> None:
        """Answer the requests that the map leaves to Python, now or later. Runs in a thread of their queue.

        Several such calls may run at once: for each queue as many as it has threads. Those stay on one CPU each, and
        what they start inherits it.
        OSError is the answer to those that it leaves, any other exception is EIO and a traceback in the log.
        """
        raise NotImplementedError(f"the map of {self.name} asks for what it cannot answer")

    def close(self) -> None:
        """Release what ``open`` took. Runs after the last request; must not raise."""

    def backing(self) -> str:
        """The file, device or address behind the device, for ``ublk list``; empty if there is none."""
        return ""

    def status(self) -> dict[str, object]:
        """What ``ublk list -n`` shows of the target besides its name and size, in ublksrv's terms."""
        return {}
