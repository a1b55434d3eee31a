"""The part of a file or block device that a device, or a leg of one, is: which bytes, and the geometry that follows."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from ublkpy.errors import UblkError
from ublkpy.tgt.backing import Backing
from ublkpy.tgt.base import Geometry
from ublkpy.tgt.disk import DiskOptions
from ublkpy.tgt.options import exact_size
from ublkpy.uring.map import File, Map, OpenFile


class Part:
    """``size`` bytes of an open backing from ``offset`` on; without ``size``, as many whole ``unit`` as there are up to
    its end. Owns it until ``close``.

    ``disk`` is what was said of the device. ``direct`` is as for a ``Backing``; None also gives O_DIRECT up where size
    or offset do not fit its blocks. All sizes are in bytes. Raises UblkError.
    """

    def __init__(
        self,
        path: Path,
        disk: DiskOptions,
        *,
        offset: int = 0,
        size: int | None = None,
        direct: bool | None = None,
        unit: int = 1,
    ) -> None:
        self.path = path
        self.offset = offset
        self._disk = disk
        self._is_measured = size is None
        # Without a write cache nobody asks for a flush.
        self.durable = disk.write_cache is False
        self.backing = Backing(path, read_only=disk.read_only, direct=direct, durable=self.durable)
        try:
            self.size = self._find_size(size, unit)
            self.geometry = self._measure(direct)
        except BaseException:
            self.close()
            raise

    @property
    def open_file(self) -> OpenFile:
        """As a map has to know it."""
        return OpenFile(self.backing.fd, self.backing.is_block_device, self.backing.in_memory)

    def add_to(self, target_map: Map) -> File:
        """As an action for the whole of that map, whose extents begin at ``offset``."""
        self.size = target_map.size
        return File(target_map.add_files([self.open_file])[0])

    def is_current(self) -> bool:
        """Whether that file is still what the path leads to, and can be read."""
        try:
            now, opened = self.path.stat(), os.fstat(self.backing.fd)
            with mmap.mmap(-1, 4096) as buffer, memoryview(buffer) as view:
                os.preadv(self.backing.fd, [view], 0)
        except OSError:
            return False
        return (now.st_dev, now.st_ino, now.st_rdev) == (opened.st_dev, opened.st_ino, opened.st_rdev)

    @property
    def name(self) -> str:
        """For messages."""
        return str(self.path)

    def how_to_fit(self, size: int) -> str:
        """How it gets so many bytes."""
        if self.backing.is_block_device:
            return "take a partition of that size"
        return f"truncate -s {self.offset + size} {self.path}"

    def resize(self, size: int) -> None:
        """Have the backing long enough for ``size`` bytes, and no longer if it was not. Raises UblkError."""
        # What lies behind the device in the file is not ours to cut off.
        whole = self.backing.end == self.offset + self.size
        self.backing.fit(self.offset + size, cut=whole and size < self.size)
        self.size = size

    def close(self) -> None:
        self.backing.close()

    def _measure(self, direct: bool | None) -> Geometry:
        limits = self.backing.limits()
        said = self._disk.logical_block_size
        self.backing.settle_direct(limits, said, self.size, self.offset, demanded=direct is True)
        self.backing.check_space()
        block = limits.direct_block if self.backing.direct else limits.logical_block
        self._check_blocks(block)
        return Geometry(
            size=self.size,
            logical_block=block,
            physical_block=limits.physical_block,
            io_min=limits.io_min,
            io_opt=limits.io_opt,
            rotational=limits.rotational,
            write_cache=not self.durable,
            discard_granularity=limits.discard_granularity,
            max_discard_bytes=limits.max_discard_bytes,
            # Of fallocate() nobody promises that it is durable when it is done.
            max_write_zeroes_bytes=0 if self.durable else limits.max_write_zeroes_bytes,
        )

    def _find_size(self, said: int | None, unit: int) -> int:
        path, end = self.path, self.backing.end
        self.backing.check_content()
        if self.offset >= end:
            raise UblkError(f"offset {exact_size(self.offset)} is not inside {path}, which has {exact_size(end)}")
        size = end - self.offset
        size = size - size % unit if said is None else said
        if self.offset + size > end:
            raise UblkError(
                f"{path} has {exact_size(end)}: too short for {exact_size(size)} at offset {exact_size(self.offset)}",
                "" if self.backing.is_block_device else f"grow it with: truncate -s {self.offset + size} {path}",
            )
        return size

    def _check_blocks(self, own: int) -> None:
        path, larger = self.path, max(own, self._disk.logical_block_size or own)
        for what, value, block in (("offset", self.offset, own), ("size", self.size, larger)):
            if value % block:
                good = -(-value // block) * block
                grown = what == "size" and self._is_measured and not self.backing.is_block_device
                raise UblkError(
                    f"{what} {value} of {path} is not a multiple of the block size {block}",
                    f"grow the file with: truncate -s {self.offset + good} {path}"
                    if grown
                    else f"the next multiple is --{what} {good}B",
                )
