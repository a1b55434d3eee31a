"""The rules of zones: where a write may go, and what becomes of a zone's condition. No I/O, and no locks.

They are those of ZBC and ZAC, and of NVMe's Zoned Namespaces; where these differ, what the kernel's null_blk does
(drivers/block/null_blk/zoned.c). The errnos are those that the block layer knows (block/blk-core.c, blk_errors).

Places are in bytes from the begin of a zone. Several writes to a zone may be on their way: each takes its place first,
and moves the write pointer when its data is there.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ublkpy.errors import ConfigError
from ublkpy.tgt.options import exact_size
from ublkpy.uring.zones import Zone, ZoneCond, ZoneType

_log = logging.getLogger(__name__)

BLOCK = 4096
"""Bytes of a logical block."""
_OPEN = (ZoneCond.IMP_OPEN, ZoneCond.EXP_OPEN)
_ACTIVE = (*_OPEN, ZoneCond.CLOSED)


@dataclass(frozen=True)
class Layout:
    """What a zoned disk is like for good; sizes in bytes."""

    size: int
    zone_size: int
    zone_capacity: int
    conv_zones: int
    """So many are conventional, the first ones."""
    max_open: int
    """0: any number."""
    max_active: int
    """0: any number."""

    @property
    def zones(self) -> int:
        return self.size // self.zone_size

    def check(self) -> None:
        """ConfigError for what no disk can be."""
        if self.size % self.zone_size:
            below = self.size - self.size % self.zone_size
            near = [exact_size(size) for size in (below, below + self.zone_size) if size]
            raise ConfigError(
                f"size {exact_size(self.size)} is not a multiple of zone_size {exact_size(self.zone_size)}",
                f"{' and '.join(near)} {'are' if len(near) > 1 else 'is'}",
                ["size", "zone_size"],
            )
        if self.zone_capacity > self.zone_size:
            raise ConfigError(
                f"zone_capacity {exact_size(self.zone_capacity)} is more than zone_size {exact_size(self.zone_size)}",
                "lower it, or leave it out: then zones can be filled to their end",
                ["zone_capacity", "zone_size"],
            )
        if self.conv_zones >= self.zones:
            raise ConfigError(
                f"conv_zones {self.conv_zones} leaves no zone to be written in sequence: there are {self.zones}",
                "lower it, or raise the size; a disk that is written anywhere is one of loop",
                ["conv_zones", "size", "zone_size"],
            )
        for name in ("max_open", "max_active"):
            if getattr(self, name) > self.zones:
                raise ConfigError(
                    f"{name} {getattr(self, name)} is more than the disk has zones, {self.zones}",
                    "lower it, or leave it out: then any number may be",
                    [name],
                )
        if self.max_active and self.max_open > self.max_active:
            raise ConfigError(
                f"max_open {self.max_open} is more than max_active {self.max_active}: open zones are active, too",
                "lower max_open, or raise max_active",
                ["max_open", "max_active"],
            )


class State(NamedTuple):
    """That of a zone, as it is kept."""

    cond: ZoneCond
    wp: int = 0
    """Up to here all writes are done."""
    began: int = 0
    """Where the last of them began; ``wp`` if there is none that could be sent again."""


class Write(NamedTuple):
    """One that is on its way, and has its place in a zone."""

    zone: int
    start: int
    end: int
    is_repeated: bool = False
    """Whether its data is there already, of a daemon that died."""


@dataclass
class _Writes:
    """Those on their way to one zone."""

    next: int
    count: int = 0
    failed: dict[int, int] = field(default_factory=dict)
    """Ends and begins of those that failed before one that came after them has ended."""


def fresh(layout: Layout) -> list[State]:
    """The states of a disk that nobody has written to."""
    conventional = layout.conv_zones
    return [State(ZoneCond.NOT_WP)] * conventional + [State(ZoneCond.EMPTY)] * (layout.zones - conventional)


def settled(state: State) -> State:
    """What is left of a state when no write is on its way any more: an open zone with nothing in it is empty, unless
    it was opened explicitly.
    """
    is_bare = state.cond in (ZoneCond.IMP_OPEN, ZoneCond.CLOSED) and not state.wp
    return State(ZoneCond.EMPTY) if is_bare else state


def power_cycled(state: State) -> State:
    """What a drive that was without power knows: no zone is open, and no write is sent again."""
    cond = ZoneCond.CLOSED if state.cond in _OPEN else state.cond
    return settled(State(cond, state.wp, state.wp))


class Rules:
    """The zones of a disk that is in use. OSError for what they do not allow, with nothing changed then.

    ``save`` is told each new state before it counts; what it raises comes out.
    """

    def __init__(self, layout: Layout, states: Iterable[State], save: Callable[[int, State], None]) -> None:
        self._layout = layout
        self.states = list(states)
        self._save = save
        self._active: dict[ZoneCond, dict[int, None]] = {cond: {} for cond in _ACTIVE}  # the longest so first
        for zone, state in enumerate(self.states):
            if state.cond in self._active:
                self._active[state.cond][zone] = None
        self._writes: dict[int, _Writes] = {}
        self._held: set[int] = set()
        self._again = {
            zone: (state.began, state.wp) for zone, state in enumerate(self.states) if state.began < state.wp
        }

    def report(self, first: int, count: int) -> list[Zone]:
        """Those from ``first`` on, with places on the disk."""
        return [self._zone(zone) for zone in range(first, min(first + count, self._layout.zones))]

    # -- writes ----------------------------------------------------------------------------

    def take(self, zone: int, at: int | None, length: int) -> Write | None:
        """The place of a write of ``length`` bytes at ``at``, or of an append; None while the zone is held.

        ``done`` or ``failed`` follows. A write that a dead daemon had finished, but not answered, may be sent again:
        it gets its place once more.
        """
        if zone in self._held:
            return None
        state = self._sequential(zone)
        writes = self._writes.get(zone) or _Writes(state.wp)
        start = writes.next if at is None else at
        end = start + length
        is_repeated = at is not None and self._again.get(zone) == (start, end)
        if not is_repeated:
            if state.cond is ZoneCond.FULL:
                raise _refused(zone, "is full")
            if start != writes.next:
                raise _refused(zone, f"is written at {start}, but its write pointer is at {writes.next}")
            if end > self._layout.zone_capacity:
                raise _refused(zone, f"has no room for {length} bytes at {start}")
            if writes.failed:
                raise _refused(zone, "waits for what becomes of writes that follow one that failed")
            if state.cond not in _OPEN:
                self._make_room(zone)
                self._put(zone, state._replace(cond=ZoneCond.IMP_OPEN))
            writes.next = end
        writes.count += 1
        self._writes[zone] = writes
        return Write(zone, start, end, is_repeated)

    def done(self, write: Write) -> None:
        """Its data is there."""
        zone, start, end, _ = write
        state, writes = self.states[zone], self._writes[zone]
        if end > state.wp:
            is_full = end == self._layout.zone_capacity and state.cond in _ACTIVE
            self._put(zone, State(ZoneCond.FULL if is_full else state.cond, end, start))
        self._again.pop(zone, None)
        self._ended(zone, writes)

    def failed(self, write: Write) -> None:
        """Its data is not there, nor anything else in its place: the write pointer stays, or the zone is sealed,
        because data follows. One that is repeated changes nothing.
        """
        zone, start, end, is_repeated = write
        writes = self._writes[zone]
        if not is_repeated:
            writes.failed[end] = start
        while (begin := writes.failed.get(writes.next)) is not None and begin >= self.states[zone].wp:
            del writes.failed[writes.next]
            writes.next = begin
        self._ended(zone, writes)

    def seal(self, zone: int) -> None:
        """Make it read-only: it is not what its write pointer says."""
        state = self.states[zone]
        if state.cond is ZoneCond.READONLY:
            return
        _log.error("zone %d is read-only from now on: a part of it could not be written, or cleared", zone)
        self._put_anyway(zone, State(ZoneCond.READONLY, state.wp, state.wp))

    # -- what is done with zones -----------------------------------------------------------

    def hold(self, zones: Collection[int]) -> bool | None:
        """Have writes to these wait until ``release``; None while some are on their way, or others hold one."""
        if any(zone in self._held or zone in self._writes for zone in zones):
            return None
        self._held.update(zones)
        return True

    def release(self, zones: Collection[int]) -> None:
        self._held.difference_update(zones)

    def open(self, zone: int) -> None:
        """Explicitly."""
        state = self._sequential(zone)
        if state.cond is ZoneCond.FULL:
            raise _refused(zone, "is full, and cannot be opened")
        if state.cond not in _OPEN:
            self._make_room(zone)
        if state.cond is not ZoneCond.EXP_OPEN:
            self._put(zone, state._replace(cond=ZoneCond.EXP_OPEN))

    def close(self, zone: int) -> None:
        """One that is not open stays as it is (ZBC: it is no error)."""
        state = self._sequential(zone)
        if state.cond in _OPEN:
            is_bare = not state.wp and zone not in self._writes
            self._put(zone, State(ZoneCond.EMPTY) if is_bare else state._replace(cond=ZoneCond.CLOSED))

    def finish(self, zone: int) -> None:
        """Of one that is held."""
        state = self._sequential(zone)
        if state.cond is ZoneCond.FULL:
            return
        if state.cond not in _OPEN:
            self._make_room(zone)
        self._put(zone, State(ZoneCond.FULL, state.wp, state.wp))
        self._again.pop(zone, None)

    def reset(self, zone: int) -> int:
        """Of one that is held; so many bytes from its begin on are to be cleared before it is released."""
        state = self._sequential(zone)
        if state.cond is not ZoneCond.EMPTY:
            self._put(zone, State(ZoneCond.EMPTY))
            self._again.pop(zone, None)
        return state.wp

    def usable(self) -> Sequence[int]:
        """Those that a reset of all is about."""
        dead = (ZoneCond.NOT_WP, ZoneCond.READONLY, ZoneCond.OFFLINE)
        return [zone for zone, state in enumerate(self.states) if state.cond not in dead]

    # --------------------------------------------------------------------------------------

    def _sequential(self, zone: int) -> State:
        state = self.states[zone]
        if state.cond in (ZoneCond.NOT_WP, ZoneCond.READONLY, ZoneCond.OFFLINE):
            what = {ZoneCond.NOT_WP: "conventional", ZoneCond.READONLY: "read-only"}.get(state.cond, "offline")
            raise _refused(zone, f"is {what}")
        return state

    def _make_room(self, zone: int) -> None:
        """For one more that is open, and active."""
        layout, implicit = self._layout, self._active[ZoneCond.IMP_OPEN]
        active = sum(map(len, self._active.values()))
        if layout.max_active and self.states[zone].cond is ZoneCond.EMPTY and active >= layout.max_active:
            raise OSError(errno.EOVERFLOW, os.strerror(errno.EOVERFLOW))
        if layout.max_open and len(implicit) + len(self._active[ZoneCond.EXP_OPEN]) >= layout.max_open:
            if not implicit:
                raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))
            self.close(next(iter(implicit)))

    def _ended(self, zone: int, writes: _Writes) -> None:
        """One of its writes has."""
        writes.count -= 1
        if not writes.count:
            del self._writes[zone]
        state = self.states[zone]
        if any(start < state.wp for start in writes.failed.values()):
            writes.failed.clear()
            self.seal(zone)
        elif not writes.count and settled(state) != state:
            self._put_anyway(zone, settled(state))

    def _put(self, zone: int, state: State) -> None:
        self._save(zone, state)
        self._note(zone, state)

    def _put_anyway(self, zone: int, state: State) -> None:
        """What is true also when it cannot be saved."""
        self._note(zone, state)
        self._save(zone, state)

    def _note(self, zone: int, state: State) -> None:
        before = self.states[zone].cond
        self.states[zone] = state
        if state.cond is not before:
            self._active.get(before, {}).pop(zone, None)
            if state.cond in self._active:
                self._active[state.cond][zone] = None

    def _zone(self, zone: int) -> Zone:
        layout, state = self._layout, self.states[zone]
        start = zone * layout.zone_size
        if state.cond is ZoneCond.NOT_WP:
            return Zone(start, layout.zone_size, start, layout.zone_size, state.cond, ZoneType.CONVENTIONAL)
        writes = self._writes.get(zone)
        wp = layout.zone_size if state.cond is ZoneCond.FULL else writes.next if writes else state.wp
        return Zone(start, layout.zone_size, start + wp, layout.zone_capacity, state.cond)


def _refused(zone: int, why: str) -> OSError:
    return OSError(errno.EIO, f"zone {zone} {why}")
