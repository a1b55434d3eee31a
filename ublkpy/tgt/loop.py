"""loop: a file or block device as a block device, natively.

The bytes are reached with O_DIRECT where the backing allows it; block sizes
and discard limits are those of the backing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ublkpy.errors import ConfigError, UblkError
from ublkpy.tgt.backing import Backing
from ublkpy.tgt.base import Geometry
from ublkpy.tgt.integrity import IntegrityTarget, open_metadata
from ublkpy.tgt.options import SECTOR, Offset, Size, exact_size, option
from ublkpy.uring.integrity import Integrity, Metadata
from ublkpy.uring.map import Extent, File, Map, Routing, Sync


class LoopTarget(IntegrityTarget):
    """A file or block device as a block device."""

    name = "loop"
    file: Path = option(..., "-f", help="backing file or block device")
    offset: Offset = option(
        0, "-o", help="where the device starts in the file: 512-byte sectors, or bytes with a unit (1M)", multiple=512
    )
    size: Size | None = option(
        None, help="size of the device; default: up to the end of the file", minimum=512, multiple=512
    )
    direct: bool | None = option(
        None,
        help="O_DIRECT or an error; default: O_DIRECT where the file allows it",
        off_flags=("--buffered_io", "--buffered-io"),
    )
    metadata: Path | None = option(None, help="file or block device that keeps the metadata")

    def open(self) -> Geometry:
        self._metadata: Backing | None = None
        # Without a write cache nobody asks for a flush.
        self._durable = self.disk.write_cache is False
        self._backing = Backing(self.file, read_only=self.disk.read_only, direct=self.direct, durable=self._durable)
        try:
            self._geometry = self._measure()
            return self._geometry
        except BaseException:
            self.close()
            raise

    def map(self, size: int) -> Map:
        found = Map(size)
        self._geometry = replace(self._geometry, size=size)
        backing, metadata, integrity = self._backing, self._metadata, self._geometry.integrity
        files = [found.add_file(backing.fd, is_block_device=backing.is_block_device, in_memory=backing.in_memory)]
        if metadata and integrity:
            files.append(found.add_file(metadata.fd))
            found.metadata = Metadata(integrity, files[1])
        found.replace([Extent(0, size, Routing.all(File(files[0])), self.offset)], Sync(tuple(files)))
        return found

    def resize(self, size: int) -> None:
        # What lies behind the device in the file is not ours to cut off.
        whole = self._backing.end == self.offset + self._geometry.size
        self._backing.fit(self.offset + size, cut=whole and size < self._geometry.size)
        self._geometry = replace(self._geometry, size=size)
        self.size = Size(size)

    def close(self) -> None:
        self._backing.close()
        if self._metadata:
            self._metadata.close()

    def backing(self) -> str:
        return str(self.file)

    def status(self) -> dict[str, object]:
        return {
            "backing_file": str(self.file),
            "direct_io": int(self._backing.direct),
            "offset": self.offset // SECTOR,
            **({"metadata_file": str(self.metadata)} if self.metadata else {}),
        }

    def _measure(self) -> Geometry:
        size = self._size()
        limits = self._backing.limits()
        self._backing.settle_direct(
            limits, self.disk.logical_block_size, size, self.offset, demanded=self.direct is True
        )
        self._backing.check_space()
        block = limits.direct_block if self._backing.direct else limits.logical_block
        self._check_blocks(block, size)
        integrity = self._open_metadata(block, size)
        # What is discarded keeps its checksums, which would then be wrong; written zeroes get theirs.
        granularity = 0 if integrity else limits.discard_granularity
        return Geometry(
            size=size,
            logical_block=block,
            physical_block=limits.physical_block,
            io_min=limits.io_min,
            io_opt=limits.io_opt,
            rotational=limits.rotational,
            write_cache=not self._durable,
            discard_granularity=granularity,
            max_discard_bytes=limits.max_discard_bytes,
            # Of fallocate() nobody promises that it is durable when it is done.
            max_write_zeroes_bytes=0 if self._durable else limits.max_write_zeroes_bytes,
            integrity=integrity,
        )

    def _open_metadata(self, block: int, size: int) -> Integrity | None:
        integrity = self.integrity(self.block_size(block))
        if integrity and not self.metadata:
            raise ConfigError("metadata_size: no file to keep the metadata in", "name one with --metadata FILE")
        if self.metadata and not integrity:
            raise ConfigError(
                f"metadata {self.metadata}: no size of the metadata given", "say how many bytes, with --metadata_size"
            )
        if self.metadata and integrity:
            self._metadata = open_metadata(
                self.metadata,
                self.file,
                size,
                integrity,
                read_only=self.disk.read_only,
                durable=self._durable,
            )
        return integrity

    def _size(self) -> int:
        end = self._backing.end
        self._backing.check_content()
        if self.offset >= end:
            raise UblkError(f"offset {exact_size(self.offset)} is not inside {self.file}, which has {exact_size(end)}")
        size = end - self.offset if self.size is None else self.size
        if self.offset + size > end:
            raise UblkError(
                f"{self.file} has {exact_size(end)}: too short for {exact_size(size)} at offset"
                f" {exact_size(self.offset)}",
                "" if self._backing.is_block_device else f"grow it with: truncate -s {self.offset + size} {self.file}",
            )
        return size

    def _check_blocks(self, own: int, size: int) -> None:
        for what, value, block in (("offset", self.offset, own), ("size", size, self.block_size(own))):
            if value % block:
                good = -(-value // block) * block
                grown = what == "size" and self.size is None and not self._backing.is_block_device
                raise UblkError(
                    f"{what} {value} of {self.file} is not a multiple of the block size {block}",
                    f"grow the file with: truncate -s {self.offset + good} {self.file}"
                    if grown
                    else f"the next multiple is --{what} {good}B",
                )
