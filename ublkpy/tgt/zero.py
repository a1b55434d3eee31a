"""zero: reads give zeroes, and what is written is forgotten, as with /dev/zero."""

from __future__ import annotations

from ublkpy.tgt.base import MAX_DISCARD_BYTES, Geometry, Target
from ublkpy.tgt.options import Size, option
from ublkpy.uring.map import Map, Routing, Zero


class ZeroTarget(Target):
    """Reads give zeroes; what is written is forgotten."""

    name = "zero"
    size: Size = option("250G", help="size of the device", minimum=512, multiple=512)

    def open(self) -> Geometry:
        return Geometry(
            size=self.size,
            write_cache=self.disk.write_cache is not False,  # what is forgotten need not be durable
            discard_granularity=4096,
            max_discard_bytes=MAX_DISCARD_BYTES,
            max_write_zeroes_bytes=MAX_DISCARD_BYTES,
        )

    def resize(self, size: int) -> None:
        self.size = Size(size)

    def map(self, target_map: Map) -> None:
        target_map.fill(Routing.all(Zero()))
