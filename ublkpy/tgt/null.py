"""null: requests succeed and move nothing. The template for a new target."""

from __future__ import annotations

from ublkpy.tgt.base import MAX_DISCARD_BYTES, Geometry, Target
from ublkpy.tgt.options import Size, option
from ublkpy.uring.map import Map


class NullTarget(Target):
    """Completes every request at once and moves no data: for measuring."""

    name = "null"
    size: Size = option("250G", help="size of the device", minimum=512, multiple=512)

    def open(self) -> Geometry:
        return Geometry(
            size=self.size,
            discard_granularity=4096,
            max_discard_bytes=MAX_DISCARD_BYTES,
            max_write_zeroes_bytes=MAX_DISCARD_BYTES,
        )

    def map(self, size: int) -> Map:
        return Map(size)  # of Null()
