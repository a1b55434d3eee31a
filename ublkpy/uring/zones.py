"""Zoned disks: what they say of themselves, and of each zone. All sizes and places in bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

from ublkpy.uring.ffi import lib

_SECTOR = 512
_ZONE = struct.Struct("=QQQBB6xQ24x")  # struct blk_zone (linux/blkzoned.h), in sectors
ZONE_BYTES = _ZONE.size


class ZoneType(IntEnum):
    """BLK_ZONE_TYPE_* (linux/blkzoned.h)."""

    CONVENTIONAL = 1
    """Anywhere; it has no write pointer."""
    SEQWRITE_REQ = 2
    """At the write pointer alone."""


class ZoneCond(IntEnum):
    """BLK_ZONE_COND_* (linux/blkzoned.h)."""

    NOT_WP = 0
    """Of a conventional one."""
    EMPTY = 1
    """Nothing was written since its reset."""
    IMP_OPEN = 2
    """Written to."""
    EXP_OPEN = 3
    """Opened by ``zone_open``."""
    CLOSED = 4
    """Written to, and closed."""
    READONLY = 13
    """Of a disk that wears out: it takes no more."""
    FULL = 14
    """To its capacity, or finished."""
    OFFLINE = 15
    """Nor can it be read."""


@dataclass
class Zone:
    """One zone, as ``blkzone report`` shows it (``struct blk_zone``)."""

    start: int
    """Where it begins on the disk."""
    length: int
    """From its start to that of the next one: the ``size`` of ``Zones``."""
    wp: int
    """Its write pointer, a place on the disk: where the next write goes."""
    capacity: int
    """How much it takes, from its start on; at most ``length``."""
    cond: ZoneCond = ZoneCond.EMPTY
    """Its condition."""
    type: ZoneType = ZoneType.SEQWRITE_REQ
    """Where it may be written."""


@dataclass(frozen=True)
class Zones:
    """What the zones of a disk have in common."""

    size: int
    """Of each, a power of two; that of the disk is a multiple."""
    max_open: int = 0
    """How many may be open at the same time; 0: any number."""
    max_active: int = 0
    """How many may be open or closed at the same time; 0: any number."""
    max_append: int = 0
    """Largest append; 0: as any request."""

    def within(self, max_io_bytes: int) -> Zones:
        """The same where no request is larger than that."""
        return replace(self, max_append=min(self.max_append or self.size, self.size, max_io_bytes))

    def fill(self, params: Any) -> None:
        """Into a ``struct ublk_params``."""
        params.types |= lib.UBLK_PARAM_TYPE_ZONED
        zoned = params.zoned
        params.basic.chunk_sectors = self.size // _SECTOR
        zoned.max_open_zones, zoned.max_active_zones = self.max_open, self.max_active
        zoned.max_zone_append_sectors = self.max_append // _SECTOR

    @classmethod
    def found(cls, params: Any) -> Zones | None:
        """Those in a ``struct ublk_params``, if it has some."""
        zoned = params.zoned
        if not params.types & lib.UBLK_PARAM_TYPE_ZONED:
            return None
        return cls(
            params.basic.chunk_sectors * _SECTOR,
            zoned.max_open_zones,
            zoned.max_active_zones,
            zoned.max_zone_append_sectors * _SECTOR,
        )


def report(zones: Iterable[Zone], place: memoryview) -> None:
    """Write them as the driver wants them, as many as there is room for; ``place`` is all zero."""
    for zone, at in zip(zones, range(0, len(place), ZONE_BYTES), strict=False):
        start, length, wp, capacity = (n // _SECTOR for n in (zone.start, zone.length, zone.wp, zone.capacity))
        _ZONE.pack_into(place, at, start, length, wp, zone.type, zone.cond, capacity)
