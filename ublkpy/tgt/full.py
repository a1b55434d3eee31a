"""full: an empty disk on which there is no space, as with /dev/full."""

from __future__ import annotations

import errno

from ublkpy.tgt.base import MAX_DISCARD_BYTES, Geometry, Target
from ublkpy.tgt.options import Size, option
from ublkpy.uring.map import Error, Map, Routing, Zero


class FullTarget(Target):
    """Reads give zeroes; writes fail with ENOSPC."""

    name = "full"
    size: Size = option("250G", help="size of the device", minimum=512, multiple=512)

    def open(self) -> Geometry:
        return Geometry(
            size=self.size,
            write_cache=self.disk.write_cache is not False,  # there is never anything to flush
            discard_granularity=4096,
            max_discard_bytes=MAX_DISCARD_BYTES,
            max_write_zeroes_bytes=MAX_DISCARD_BYTES,
        )

    def resize(self, size: int) -> None:
        self.size = Size(size)

    def map(self, target_map: Map) -> None:
        full = Error(errno.ENOSPC)
        target_map.fill(Routing(Zero(), full, Zero(), full))
