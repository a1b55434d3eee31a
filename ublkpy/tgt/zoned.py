"""zoned: a host-managed zoned disk, in memory or in a folder.

Reads, and all that is done to conventional zones, go by the map. Writes to the others, and what is done with zones, are
calls of methods: on the asyncio loops of all queues, under one lock that nobody holds while a disk works.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from ublkpy import io
from ublkpy.errors import ConfigError, UblkError
from ublkpy.tgt import zone_store
from ublkpy.tgt.base import MAX_DISCARD_BYTES, Geometry, Target
from ublkpy.tgt.memory import check_fits
from ublkpy.tgt.options import Size, exact_size, option
from ublkpy.tgt.zone_rules import BLOCK, Layout, Rules, fresh
from ublkpy.tgt.zone_store import Store
from ublkpy.tgt.zone_table import Change, Table
from ublkpy.uring.map import Error, Extent, File, Map, Null, Routing, Upcall, Zero
from ublkpy.uring.zones import Zone, ZoneCond, Zones

_log = logging.getLogger(__name__)

_SOON = 0.001  # seconds
_ZONE_SIZE = 64 << 20

T = TypeVar("T")


class ZonedTarget(Target):
    """A host-managed zoned disk, in memory or in a folder."""

    name = "zoned"
    folder: Path | None = option(
        None, "-f", help="folder that keeps the disk, made if it is not there; default: in memory"
    )
    size: Size | None = option(
        None, help="size of the disk, a multiple of zone_size; a folder knows that of its disk", minimum=BLOCK
    )
    zone_size: Size | None = option(
        None, help="size of each zone; default: 64M", minimum=64 << 10, maximum=1 << 40, power_of_two=True
    )
    zone_capacity: Size | None = option(
        None, help="how much each zone takes; default: zone_size", minimum=BLOCK, multiple=BLOCK
    )
    conv_zones: int | None = option(None, help="so many zones, the first ones, are conventional; default: 0", minimum=0)
    max_open: int | None = option(
        None, help="so many zones may be open at the same time; default: 0, any number", minimum=0
    )
    max_active: int | None = option(
        None, help="so many may be open or closed at the same time; default: 0, any number", minimum=0
    )

    @property
    def outlives_daemon(self) -> bool:
        return self.folder is not None

    def open(self) -> Geometry:
        self._store: Store | None = None
        self._lock = threading.Lock()  # of rules and table: for no longer than it takes to write to a cached file
        found = self.folder and zone_store.open_folder(self.folder, read_only=self.disk.read_only)
        if found:
            self._store, (self._layout, self._states) = found
            try:
                self._check_same(self._layout)
            except BaseException:
                self.close()
                raise
        else:
            self._layout = self._new_layout()
            self._states = fresh(self._layout)
        layout = self._layout
        return Geometry(
            layout.size,
            logical_block=BLOCK,
            read_only=self.disk.read_only,
            write_cache=self.folder is not None,
            discard_granularity=BLOCK if layout.conv_zones else 0,
            max_discard_bytes=MAX_DISCARD_BYTES if layout.conv_zones else 0,
            zones=Zones(layout.zone_size, layout.max_open, layout.max_active),
        )

    def start(self) -> None:
        """A disk is made, and one that is there changed, only now: ``ublk check`` opens it, too."""
        layout = self._layout
        is_new = self._store is None
        if self._store is None:
            self._store = zone_store.make_folder(self.folder, layout) if self.folder else zone_store.in_memory(layout)
        self._table = Table(self._store.table, layout)
        self._rules = Rules(layout, self._states, self._table.save)
        if self.disk.read_only:
            return
        try:
            if not is_new:
                self._store.clear(layout, self._states)
            self._table.begin(self._states)
            os.fdatasync(self._store.table)
        except OSError as e:
            raise UblkError(
                f"cannot write to {self.folder}: {os.strerror(e.errno or 0)}", "see what is wrong with its disk"
            ) from e

    def map(self, target_map: Map) -> None:
        assert self._store
        layout = self._layout
        data = File(target_map.add_file(self._store.data, in_memory=self._store.in_memory))
        sequential = Routing(data, Upcall(), Null(), Error(errno.EOPNOTSUPP))
        begin = layout.conv_zones * layout.zone_size
        extents = [Extent(begin, target_map.size - begin, sequential, begin)]
        if begin:
            extents.append(Extent(0, begin, Routing.all(data)))
        target_map.replace(extents, Upcall() if self.folder else Null())
        target_map.replace(self._exceptions())

    def stop(self) -> None:
        if self._store and not self.disk.read_only:
            os.fdatasync(self._store.data)
            self._table.end(self._rules.states)
            os.fdatasync(self._store.table)

    def close(self) -> None:
        if self._store:
            self._store.close()
            self._store = None

    def backing(self) -> str:
        return str(self.folder or "")

    def status(self) -> dict[str, object]:
        kept = {"folder": str(self.folder)} if self.folder else {}
        return {**kept, "zones": self._layout.zones, **asdict(self._layout)}

    # -- its requests, in the threads of all queues ----------------------------------------

    async def write(self, offset: int, buf: memoryview) -> None:
        await self._write(offset, offset % self._layout.zone_size, buf)

    async def zone_append(self, offset: int, buf: memoryview) -> int:
        return await self._write(offset, None, buf)

    async def flush(self) -> None:
        with self._lock:
            changes = self._table.changes()
        await io.fsync(self._files.data)
        await self._keep(changes)

    def report_zones(self, offset: int, count: int) -> Iterable[Zone]:
        with self._lock:
            return self._rules.report(self._zone(offset), count)

    def zone_open(self, offset: int) -> None:
        with self._lock:
            self._rules.open(self._zone(offset))

    def zone_close(self, offset: int) -> None:
        with self._lock:
            self._rules.close(self._zone(offset))

    async def zone_finish(self, offset: int) -> None:
        zone = self._zone(offset)
        async with self._held([zone]):
            with self._lock:
                self._rules.finish(zone)
        await self.flush()

    async def zone_reset(self, offset: int) -> None:
        await self._reset([self._zone(offset)])

    async def zone_reset_all(self) -> None:
        with self._lock:
            zones = self._rules.usable()
        await self._reset(zones)

    async def _write(self, offset: int, at: int | None, buf: memoryview) -> int:
        zone, length = self._zone(offset), len(buf)
        write = await self._when_free(lambda: self._rules.take(zone, at, length))
        place = zone * self._layout.zone_size + write.start
        try:
            # Copying takes less than to wait for who copies.
            if not (self._files.in_memory and os.pwrite(self._files.data, buf, place) == length):
                await io.write(self._files.data, buf, place)
            with self._lock:
                self._rules.done(write)
        except OSError:
            if not write.is_repeated:
                await self._clear(zone, write.start, write.end)
            with self._lock:
                self._rules.failed(write)
            raise
        return place

    async def _reset(self, zones: Collection[int]) -> None:
        async with self._held(zones):
            with self._lock:
                left = {zone: self._rules.reset(zone) for zone in zones}
                changes = self._table.changes(zones)
            try:
                await self._keep(changes)
            finally:
                for zone, length in left.items():
                    await self._clear(zone, 0, length)

    async def _keep(self, changes: Collection[Change]) -> None:
        """Have these survive a loss of power."""
        if changes:
            with self._lock:
                self._table.keep(changes)
            await io.fsync(self._files.table)
            with self._lock:
                self._table.forget(changes)

    async def _clear(self, zone: int, start: int, end: int) -> None:
        """Have zeroes there, or no more writes to a zone that lacks them."""
        if start == end:
            return
        try:
            await io.punch_hole(self._files.data, zone * self._layout.zone_size + start, end - start)
        except OSError as e:
            _log.error("zone %d cannot be cleared: %s", zone, e)
            with self._lock:
                self._rules.seal(zone)

    @contextlib.asynccontextmanager
    async def _held(self, zones: Collection[int]) -> AsyncIterator[None]:
        """Without writes on their way there; those that come wait."""
        await self._when_free(lambda: self._rules.hold(zones))
        try:
            yield
        finally:
            with self._lock:
                self._rules.release(zones)

    async def _when_free(self, attempt: Callable[[], T | None]) -> T:
        """Again until it succeeds: seldom, for who resets a zone writes to it before or after that. The others may be
        on another loop, so that nothing of asyncio's could wake this one.
        """
        while True:
            with self._lock:
                if (found := attempt()) is not None:
                    return found
            await asyncio.sleep(_SOON)

    @property
    def _files(self) -> Store:
        assert self._store
        return self._store

    def _zone(self, offset: int) -> int:
        return offset // self._layout.zone_size

    # -- what it is like -------------------------------------------------------------------

    def _new_layout(self) -> Layout:
        """Of a disk that is to be made."""
        if self.size is None:
            raise ConfigError(
                "no size given: a disk in memory needs --size"
                if self.folder is None
                else f"no size given, and there is no disk in {self.folder} yet",
                "say how large it is to be: --size 1G",
                ["size"],
            )
        zone_size = self.zone_size or _ZONE_SIZE
        layout = Layout(
            self.size,
            zone_size,
            self.zone_capacity or zone_size,
            self.conv_zones or 0,
            self.max_open or 0,
            self.max_active or 0,
        )
        layout.check()
        if self.folder:
            zone_store.check_new(self.folder, layout)
        else:
            check_fits(layout.size, "keep it in a folder: --folder FOLDER")
        return layout

    def _check_same(self, layout: Layout) -> None:
        """What was said of a disk that there is has to be true."""
        wrong = [
            f"{key} {_shown(key, found)}, not {_shown(key, said)}"
            for key, found in asdict(layout).items()
            if (said := getattr(self, key)) not in (None, found)
        ]
        if wrong:
            raise UblkError(
                f"the disk in {self.folder} has {', '.join(wrong)}",
                "leave that out to have the disk as it is, or name another folder",
            )

    def _exceptions(self) -> Iterable[Extent]:
        """Zones that cannot be read; and, where nothing could be cleared, what is above write pointers."""
        size = self._layout.zone_size
        for zone, state in enumerate(self._states):
            start, above = zone * size, zone * size + state.wp
            if state.cond is ZoneCond.OFFLINE:
                yield Extent(start, size, Routing.all(Error(errno.EIO)))
            elif self.disk.read_only and state.cond is not ZoneCond.NOT_WP and state.wp < size:
                yield Extent(above, start + size - above, Routing.all(Zero()))


def _shown(key: str, value: int) -> str:
    return str(value) if key in ("conv_zones", "max_open", "max_active") else exact_size(value)
