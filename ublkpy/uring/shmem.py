"""Memory that clients share with a device, as its queues see it."""

from __future__ import annotations

import errno
import mmap
from typing import Any

from ublkpy.uring.ffi import check, ffi, lib

MAX_BUFFERS: int = lib.UQ_MAX_SHARED


class Mapping:
    """``length`` bytes of a file from its start, shared and never followed by a fork. OSError if that cannot be."""

    def __init__(self, fd: int, length: int, *, read_only: bool) -> None:
        self.length = length
        prot = mmap.PROT_READ if read_only else mmap.PROT_READ | mmap.PROT_WRITE
        try:
            self._mmap = mmap.mmap(fd, length, mmap.MAP_SHARED, prot)
        except ValueError as e:  # the file has become shorter
            raise OSError(errno.EINVAL, str(e)) from e
        self._mmap.madvise(mmap.MADV_DONTFORK)
        self.c: Any = ffi.from_buffer(self._mmap)

    @property
    def address(self) -> int:
        return int(ffi.cast("uintptr_t", self.c))

    def close(self) -> None:
        ffi.release(self.c)
        self._mmap.close()


class SharedBuffers:
    """The mappings of registered buffers, by the index that the driver gave them. For one thread at a time.

    Queues look into ``c`` meanwhile, without a lock. A buffer is put in right after the driver has registered it,
    with ``registering(True)`` from before until after that, and taken out when the driver has let go of it.
    """

    def __init__(self) -> None:
        self.c: Any = ffi.new("struct uq_shared *")
        self._mappings: dict[int, Mapping] = {}

    def registering(self, under_way: bool) -> None:
        """Whether the driver may have a buffer that is not here yet: queues then wait for one that they miss."""
        lib.uq_registering(self.c, under_way)

    def put(self, index: int, mapping: Mapping) -> None:
        """OSError (ENOSPC) for an index from MAX_BUFFERS on. From now on the mapping is ours."""
        check(lib.uq_share(self.c, index, mapping.c, mapping.length), "shared buffers")
        self._mappings[index] = mapping

    def remove(self, index: int) -> None:
        """Unmap a buffer that no request is in any more."""
        lib.uq_unshare(self.c, index)
        self._mappings.pop(index).close()

    def indices(self) -> list[int]:
        return sorted(self._mappings)
