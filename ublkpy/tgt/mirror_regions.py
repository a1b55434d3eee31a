"""The regions of a mirror as its map shows them to the queues."""

from __future__ import annotations

import errno
from collections.abc import Iterable

from ublkpy.tgt.mirror_label import nr_regions, region_of
from ublkpy.uring.map import Action, Error, Extent, File, Map, Mirror, Routing, Sync, Upcall

_CHUNK = 64 << 10  # so many bytes are read from one leg, the next from another
_DRAIN = 5.0  # seconds


class Regions:
    """What is known of each region, and how the map says it. One thread at a time; each array has a byte for each."""

    dirty: bytearray
    """1: the labels say that legs may differ here, so that a write is not to be asked about."""
    open: bytearray
    """1: writes go to the legs without asking. Only where it is dirty."""
    behind: bytearray
    """1: the first source alone is to be read, for others may differ."""

    def __init__(self, size: int, dirty: bytes) -> None:
        self.size = size
        self.region = region_of(size)
        self.count = nr_regions(size)
        self.dirty = bytearray(dirty)
        self.open = bytearray(dirty)
        self.behind = bytearray(self.count)
        self._map: Map | None = None
        self._legs: tuple[int, ...] = ()
        self._asks = False  # whether a flush that fails is asked about
        self._routings: dict[tuple[int, int], Routing] = {}  # by open and behind

    def of(self, offset: int, length: int) -> range:
        """Those that these bytes are in."""
        return range(offset // self.region, -(-(offset + length) // self.region))

    def begin(self, target_map: Map) -> None:
        """Show all of them in this map, once there are ``use``d legs."""
        self._map = target_map
        self.show(range(self.count))

    def use(self, sources: tuple[int, ...], others: tuple[int, ...]) -> None:
        """Files of the map, by their numbers, each one more than the one before it: those to read and write, and
        those that are only written.
        """
        self._legs, self._asks = sources + others, len(sources + others) > 1
        self._route(_one_or_more(sources), _one_or_more(sources, 1), Upcall(), _one_or_more(self._legs))

    def refuse(self, sources: tuple[int, ...]) -> None:
        """Have all writes fail until ``use``; these can be read."""
        self._legs, self._asks = sources, False
        self._route(_one_or_more(sources), _one_or_more(sources, 1), Error(errno.EIO), Error(errno.EIO))

    def _route(self, spread: Action, first: Action, closed: Action, opened: Action) -> None:
        for is_open, write in ((0, closed), (1, opened)):
            for is_behind, read in ((0, spread), (1, first)):
                self._routings[is_open, is_behind] = Routing(read, write, write, write)
        if self._map:
            self.show(range(self.count))

    def show(self, regions: Iterable[int]) -> None:
        """What has become of some, all at once."""
        extents: list[Extent] = []
        for region in sorted(regions):
            routing = self._routings[self.open[region], self.behind[region]]
            start, end = region * self.region, min((region + 1) * self.region, self.size)
            if extents and extents[-1].end == start and extents[-1].routing is routing:
                start = extents.pop().start
            extents.append(Extent(start, end - start, routing, start))
        self._replace(extents)

    def lock(self, offset: int, length: int) -> None:
        """Have writes there asked about, and wait until those under way are through. OSError (ETIMEDOUT)."""
        assert self._map
        self._replace([Extent(offset, length, self._routings[0, 1], offset)])
        self._map.drain(offset, length, _DRAIN)

    def _replace(self, extents: list[Extent]) -> None:
        assert self._map
        self._map.replace(extents, Sync(self._legs, asks=self._asks))


def _one_or_more(files: tuple[int, ...], count: int | None = None) -> Action:
    """The first ``count`` of these; where there is but one, its errors are the device's."""
    return Mirror(files[:count], _CHUNK) if len(files) > 1 else File(*files)
