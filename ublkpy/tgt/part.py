"""The part of a file or block device that is the whole of a device: which bytes, and the geometry that follows."""

from __future__ import annotations

from pathlib import Path

from ublkpy.errors import UblkError
from ublkpy.tgt.backing import Backing
from ublkpy.tgt.base import Geometry
from ublkpy.tgt.disk import DiskOptions
from ublkpy.tgt.options import exact_size
from ublkpy.uring.map import File, Map


class Part:
    """``size`` bytes of an open backing from ``offset`` on; without ``size``, up to its end. Owns it until ``close``.

    ``disk`` is what was said of the device. ``direct`` is as for a ``Backing``; None also gives O_DIRECT up where size
    or offset do not fit its blocks. All sizes are in bytes. Raises UblkError.
    """

    def __init__(
        self, path: Path, disk: DiskOptions, *, offset: int = 0, size: int | None = None, direct: bool | None = None
    ) -> None:
        self.offset = offset
        self._path = path
        self._disk = disk
        self._is_measured = size is None
        # Without a write cache nobody asks for a flush.
        self.durable = disk.write_cache is False
        self.backing = Backing(path, read_only=disk.read_only, direct=direct, durable=self.durable)
        try:
            self.size = self._find_size(size)
            self.geometry = self._measure(direct)
        except BaseException:
            self.close()
            raise

    def add_to(self, found: Map) -> File:
        """As an action for the whole of that map, whose extents begin at ``offset``."""
        self.size = found.size
        backing = self.backing
        return File(found.add_file(backing.fd, is_block_device=backing.is_block_device, in_memory=backing.in_memory))

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

    def _find_size(self, said: int | None) -> int:
        path, end = self._path, self.backing.end
        self.backing.check_content()
        if self.offset >= end:
            raise UblkError(f"offset {exact_size(self.offset)} is not inside {path}, which has {exact_size(end)}")
        size = end - self.offset if said is None else said
        if self.offset + size > end:
            raise UblkError(
                f"{path} has {exact_size(end)}: too short for {exact_size(size)} at offset {exact_size(self.offset)}",
                "" if self.backing.is_block_device else f"grow it with: truncate -s {self.offset + size} {path}",
            )
        return size

    def _check_blocks(self, own: int) -> None:
        path, larger = self._path, max(own, self._disk.logical_block_size or own)
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
