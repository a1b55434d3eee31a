"""error: each request fails, as with device-mapper's target of that name."""

from __future__ import annotations

import errno as numbers

from ublkpy.tgt.base import MAX_DISCARD_BYTES, Geometry, Target
from ublkpy.tgt.options import Errno, Size, option
from ublkpy.uring.map import Error, Map, Routing


class ErrorTarget(Target):
    """Each request fails."""

    name = "error"
    moves_data = False
    size: Size = option("250G", help="size of the device", minimum=512, multiple=512)
    errno: Errno = option("EIO", help="what requests fail with: a name or a number")

    def open(self) -> Geometry:
        return Geometry(
            size=self.size,
            write_cache=False,  # there is never anything to flush
            discard_granularity=4096,
            max_discard_bytes=MAX_DISCARD_BYTES,
            max_write_zeroes_bytes=MAX_DISCARD_BYTES,
        )

    def resize(self, size: int) -> None:
        self.size = Size(size)

    def map(self, target_map: Map) -> None:
        target_map.fill(Routing.all(Error(self.errno)))

    def status(self) -> dict[str, object]:
        return {"errno": numbers.errorcode.get(self.errno, str(self.errno))}
