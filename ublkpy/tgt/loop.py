"""loop: a file or block device as a block device, natively.

The bytes are reached with O_DIRECT where the backing allows it; block sizes
and discard limits are those of the backing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ublkpy.errors import ConfigError
from ublkpy.tgt.backing import Backing
from ublkpy.tgt.base import Geometry
from ublkpy.tgt.integrity import IntegrityTarget, open_metadata
from ublkpy.tgt.options import SECTOR, Offset, Size, option
from ublkpy.tgt.part import Part
from ublkpy.uring.integrity import Integrity, Metadata
from ublkpy.uring.map import Map, Routing, Sync


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
        self._part = Part(self.file, self.disk, offset=self.offset, size=self.size, direct=self.direct)
        geometry = self._part.geometry
        try:
            self._integrity = self._open_metadata(geometry.logical_block, geometry.size)
        except BaseException:
            self.close()
            raise
        if self._integrity is None:
            return geometry
        # What is discarded keeps its checksums, which would then be wrong; written zeroes get theirs.
        return replace(geometry, integrity=self._integrity, discard_granularity=0)

    def map(self, target_map: Map) -> None:
        data = self._part.add_to(target_map)
        files = [data.file]
        if self._metadata and self._integrity:
            files.append(target_map.add_file(self._metadata.fd))
            target_map.metadata = Metadata(self._integrity, files[1])
        target_map.fill(Routing.all(data), Sync(tuple(files)), self.offset)

    def resize(self, size: int) -> None:
        self._part.resize(size)
        self.size = Size(size)

    def close(self) -> None:
        self._part.close()
        if self._metadata:
            self._metadata.close()

    def backing(self) -> str:
        return str(self.file)

    def status(self) -> dict[str, object]:
        return {
            "backing_file": str(self.file),
            "direct_io": int(self._part.backing.direct),
            "offset": self.offset // SECTOR,
            **({"metadata_file": str(self.metadata)} if self.metadata else {}),
        }

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
                durable=self._part.durable,
            )
        return integrity
