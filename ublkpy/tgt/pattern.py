"""pattern: each 8 bytes hold their own place on the disk, natively.

What nbdkit's pattern plugin has, byte for byte: to see where data comes from,
and whether it arrives where it belongs.
"""

from __future__ import annotations

from ublkpy.tgt.base import Geometry, Target
from ublkpy.tgt.options import Size, option
from ublkpy.uring.map import Map, Pattern, Routing


class PatternTarget(Target):
    """Each 8 bytes hold their own offset; writes of anything else fail."""

    name = "pattern"
    size: Size = option("250G", help="size of the device", minimum=512, multiple=512)

    def open(self) -> Geometry:
        return Geometry(size=self.size, write_cache=self.disk.write_cache is not False)

    def resize(self, size: int) -> None:
        self.size = Size(size)

    def map(self, target_map: Map) -> None:
        target_map.fill(Routing.all(Pattern()))
