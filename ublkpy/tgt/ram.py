"""ram: a disk in memory, natively."""

from __future__ import annotations

from ublkpy.tgt.base import Geometry, Target
from ublkpy.tgt.memory import DiskMemory
from ublkpy.tgt.options import Size, option
from ublkpy.uring.map import Map


class RamTarget(Target):
    """A disk in memory."""

    name = "ram"
    size: Size = option(..., help="size of the device", minimum=512, multiple=512)
    huge_pages: bool = option(False, help="take huge pages, of those that are set aside (vm.nr_hugepages)")

    def open(self) -> Geometry:
        self._memory = DiskMemory(self, self.size, huge_pages=self.huge_pages)
        return self._memory.geometry

    def start(self) -> None:
        self._memory.begin()

    def map(self, target_map: Map) -> None:
        target_map.fill(self._memory.add_to(target_map))

    def close(self) -> None:
        self._memory.close()

    def status(self) -> dict[str, object]:
        return {"huge_pages": self.huge_pages, **({} if self.segment is None else {"segment": self.segment})}
