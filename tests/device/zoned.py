"""A zoned disk in memory, as somebody would write it with the methods of a target."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterable

from ublkpy import Geometry, Size, Target, Zone, ZoneCond, Zones, ZoneType, option

OPEN = (ZoneCond.IMP_OPEN, ZoneCond.EXP_OPEN)


class ZonedRam(Target):
    """A zoned disk in memory; the first zone is conventional."""

    size: Size = option("256M", help="size of the disk")
    zone_size: Size = option("4M", help="of each zone", power_of_two=True)
    max_open: int = option(8, help="so many zones may be open explicitly; btrfs wants that many")

    def open(self) -> Geometry:
        self.data = memoryview(mmap.mmap(-1, self.size))  # of which little is used
        self.zones = [Zone(at, self.zone_size, at, self.zone_size) for at in range(0, self.size, self.zone_size)]
        self.zones[0].type, self.zones[0].cond = ZoneType.CONVENTIONAL, ZoneCond.NOT_WP
        return Geometry(self.size, logical_block=4096, zones=Zones(self.zone_size, max_open=self.max_open))

    def zone(self, offset: int) -> Zone:
        return self.zones[offset // self.zone_size]

    def read(self, offset: int, buf: memoryview) -> None:
        buf[:] = self.data[offset : offset + len(buf)]

    def write(self, offset: int, buf: memoryview) -> None:
        zone = self.zone(offset)
        if zone.type is ZoneType.SEQWRITE_REQ:
            if offset != zone.wp:
                raise OSError(errno.EIO, "not at the write pointer")
            zone.wp += len(buf)
            if zone.cond not in OPEN:
                zone.cond = ZoneCond.IMP_OPEN
            if zone.wp == zone.start + zone.capacity:
                zone.cond = ZoneCond.FULL
        self.data[offset : offset + len(buf)] = buf

    def flush(self) -> None:
        pass

    def report_zones(self, offset: int, count: int) -> Iterable[Zone]:
        return self.zones[offset // self.zone_size :][:count]

    def zone_append(self, offset: int, buf: memoryview) -> int:
        where = self.zone(offset).wp
        self.write(where, buf)
        return where

    def zone_open(self, offset: int) -> None:
        if sum(zone.cond is ZoneCond.EXP_OPEN for zone in self.zones) == self.max_open:
            raise OSError(errno.ETOOMANYREFS, "too many open zones")
        self.zone(offset).cond = ZoneCond.EXP_OPEN

    def zone_close(self, offset: int) -> None:
        zone = self.zone(offset)
        zone.cond = ZoneCond.EMPTY if zone.wp == zone.start else ZoneCond.CLOSED

    def zone_finish(self, offset: int) -> None:
        zone = self.zone(offset)
        zone.wp, zone.cond = zone.start + zone.length, ZoneCond.FULL

    def zone_reset(self, offset: int) -> None:
        zone = self.zone(offset)
        zone.wp, zone.cond = zone.start, ZoneCond.EMPTY

    def zone_reset_all(self) -> None:
        for zone in self.zones[1:]:
            self.zone_reset(zone.start)


class AsyncZonedRam(ZonedRam):
    """The same on an event loop."""

    async def report_zones(self, offset: int, count: int) -> Iterable[Zone]:  # type: ignore[override]
        return super().report_zones(offset, count)

    async def zone_append(self, offset: int, buf: memoryview) -> int:  # type: ignore[override]
        return super().zone_append(offset, buf)

    async def zone_reset(self, offset: int) -> None:  # type: ignore[override]
        super().zone_reset(offset)


class BlockingZonedRam(ZonedRam):
    """The same in threads."""

    blocking = True
