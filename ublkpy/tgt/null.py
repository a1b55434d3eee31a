"""null: requests succeed and move nothing. The template for a new target."""

from __future__ import annotations

from ublkpy.tgt.base import MAX_DISCARD_BYTES, Geometry
from ublkpy.tgt.integrity import IntegrityTarget
from ublkpy.tgt.options import Size, option
from ublkpy.uring.integrity import Metadata
from ublkpy.uring.map import Map

_BLOCK = 512


class NullTarget(IntegrityTarget):
    """Completes every request at once and moves no data: for measuring."""

    name = "null"
    moves_data = False
    size: Size = option("250G", help="size of the device", minimum=512, multiple=512)

    def open(self) -> Geometry:
        return Geometry(
            size=self.size,
            logical_block=_BLOCK,
            write_cache=self.disk.write_cache is not False,  # what is forgotten need not be durable
            discard_granularity=4096,
            max_discard_bytes=MAX_DISCARD_BYTES,
            max_write_zeroes_bytes=MAX_DISCARD_BYTES,
            integrity=self.integrity(self.block_size(_BLOCK)),
        )

    def resize(self, size: int) -> None:
        self.size = Size(size)

    def map(self, target_map: Map) -> None:
        # That nothing is done is what it says already.
        integrity = self.integrity(self.block_size(_BLOCK))
        target_map.metadata = Metadata(integrity) if integrity else None
