"""The file that keeps the states of zones: what a daemon's death, and the machine's, leave of them.

::

    0      header   magic, version, checksum, layout
    512    boot     the boot of the machine in which the live records were written
    4096   live     a record of each zone, written with each change
           kept     the same, as it was when the data up to the write pointers was durable

What is written to a file is there for the next process, whatever became of this one: in the same boot the live records
are right. After another boot nobody knows which of them, and what of the data, had reached the disk: then the kept ones
are. A record is written in one piece, and lies in one sector.

Numbers are little-endian, places in blocks. Nothing here locks, or waits for a disk.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import NamedTuple

from ublkpy.errors import UblkError
from ublkpy.tgt.zone_rules import BLOCK, Layout, State, fresh, power_cycled, settled
from ublkpy.uring.zones import ZoneCond

_MAGIC = b"ublkzone"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQQQIII")
_BOOT = struct.Struct("<36s")
_BOOT_AT = 512
_LIVE_AT = 4096
_FIELDS = struct.Struct("<IIB3x")  # write pointer, begin of the last write, condition
_RECORD = struct.Struct(f"<{_FIELDS.size}sI")  # these, and a checksum


class Change(NamedTuple):
    """A new state of a zone; of two, that with the higher number came later."""

    zone: int
    number: int
    record: bytes


class Found(NamedTuple):
    """What a file says of a disk."""

    layout: Layout
    states: list[State]


class Table:
    """Writes a table that is open as ``fd``. OSError as from the system calls."""

    def __init__(self, fd: int, layout: Layout) -> None:
        self._fd = fd
        self._kept_at = _LIVE_AT + _area(layout.zones)
        self._number = 0
        self._kept = [0] * layout.zones  # the numbers of the changes that are in the kept records
        self._changed: dict[int, Change] = {}  # what may not be durable yet

    def begin(self, states: Sequence[State]) -> None:
        """Let these be right from now on, in this boot; what of them is not among the kept ones has changed."""
        records = _records(states)
        _write(self._fd, records, _LIVE_AT)
        _write(self._fd, _BOOT.pack(boot_id()), _BOOT_AT)
        kept = os.pread(self._fd, len(records), self._kept_at)
        for zone in range(len(states)):
            place = slice(zone * _RECORD.size, (zone + 1) * _RECORD.size)
            if records[place] != kept[place]:
                self._add(zone, records[place])

    def end(self, states: Iterable[State]) -> None:
        """Let these be right, in this boot and another one: all is durable, and no write can come again."""
        records = _records(State(cond, wp, wp) for cond, wp, _ in states)
        _write(self._fd, records, _LIVE_AT)
        _write(self._fd, records, self._kept_at)

    def save(self, zone: int, state: State) -> None:
        """Have a daemon that follows know this."""
        record = _pack(zone, state)
        _write(self._fd, record, _LIVE_AT + zone * _RECORD.size)
        self._add(zone, record)

    def changes(self, zones: Iterable[int] | None = None) -> list[Change]:
        """What of these, or of all, may not be durable yet."""
        found = self._changed.values() if zones is None else map(self._changed.get, zones)
        return [change for change in found if change]

    def keep(self, changes: Iterable[Change]) -> None:
        """Have them, now that the data they tell of is durable, among the kept records, for another boot to find once
        the file is synced. Older ones do not come over newer ones.
        """
        for change in changes:
            if change.number > self._kept[change.zone]:
                _write(self._fd, change.record, self._kept_at + change.zone * _RECORD.size)
                self._kept[change.zone] = change.number

    def forget(self, changes: Iterable[Change]) -> None:
        """They are durable."""
        for change in changes:
            if self._changed.get(change.zone) == change:
                del self._changed[change.zone]

    def _add(self, zone: int, record: bytes) -> None:
        self._number += 1
        self._changed[zone] = Change(zone, self._number, record)


def create(fd: int, layout: Layout) -> None:
    """Make the table of a new disk in an empty file. OSError."""
    header = _HEADER.pack(_MAGIC, _VERSION, 0, *astuple(layout))
    header = _HEADER.pack(_MAGIC, _VERSION, zlib.crc32(header), *astuple(layout))
    records = _records(fresh(layout)).ljust(_area(layout.zones), b"\0")
    _write(fd, header.ljust(_LIVE_AT, b"\0") + records * 2, 0)


def read(fd: int, path: Path) -> Found:
    """What the table in this file says. UblkError, with the check that failed, for one that is damaged or none."""
    start = os.pread(fd, _LIVE_AT, 0)
    if len(start) < _LIVE_AT:
        raise _damaged(path, f"it has {len(start)} bytes, which are fewer than a header takes")
    magic, version, checksum, *numbers = _HEADER.unpack_from(start)
    if magic != _MAGIC:
        raise _damaged(path, "it does not begin as a table of zones does")
    if version != _VERSION:
        raise UblkError(
            f"{path} has version {version} of the table of zones, and this ublkpy knows version {_VERSION}",
            "serve this disk with the ublkpy that made it, or a later one",
        )
    if checksum != zlib.crc32(_HEADER.pack(magic, version, 0, *numbers)):
        raise _damaged(path, "the checksum of its header is wrong")
    layout = Layout(*numbers)
    area, length = _area(layout.zones), os.fstat(fd).st_size
    if length != _LIVE_AT + 2 * area:
        raise _damaged(path, f"it has {length} bytes, and {_LIVE_AT + 2 * area} are right for {layout.zones} zones")
    is_this_boot = _BOOT.unpack_from(start, _BOOT_AT)[0] == boot_id()
    records = os.pread(fd, layout.zones * _RECORD.size, _LIVE_AT if is_this_boot else _LIVE_AT + area)
    states = _states(records, layout, path)
    return Found(layout, list(map(settled if is_this_boot else power_cycled, states)))


def boot_id() -> bytes:
    """Of the running machine; another one after each boot (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()


def _states(records: bytes, layout: Layout, path: Path) -> list[State]:
    found = []
    for zone, (fields, checksum) in enumerate(_RECORD.iter_unpack(records)):
        if checksum != _checksum(zone, fields):
            raise _damaged(path, f"the checksum of zone {zone} is wrong")
        wp, began, cond = _FIELDS.unpack(fields)
        is_conventional = zone < layout.conv_zones
        if (
            cond not in ZoneCond.__members__.values()
            or (cond == ZoneCond.NOT_WP) != is_conventional
            or not began <= wp <= layout.zone_capacity // BLOCK
        ):
            raise _damaged(path, f"zone {zone} is in a state that there is not: condition {cond}, block {wp}")
        found.append(State(ZoneCond(cond), wp * BLOCK, began * BLOCK))
    return found


def _damaged(path: Path, why: str) -> UblkError:
    return UblkError(
        f"{path} is damaged: {why}",
        f"bring back {path.parent} from a copy; without one, nobody knows what is in its zones: remove it, and the"
        " disk is made anew",
    )


def _area(zones: int) -> int:
    """Bytes of the records of so many: whole pages."""
    return -(-zones * _RECORD.size // _LIVE_AT) * _LIVE_AT


def _records(states: Iterable[State]) -> bytes:
    return b"".join(_pack(zone, state) for zone, state in enumerate(states))


def _pack(zone: int, state: State) -> bytes:
    fields = _FIELDS.pack(state.wp // BLOCK, state.began // BLOCK, state.cond)
    return _RECORD.pack(fields, _checksum(zone, fields))


def _checksum(zone: int, fields: bytes) -> int:
    return zlib.crc32(fields, zone)


def _write(fd: int, data: bytes, offset: int) -> None:
    if os.pwrite(fd, data, offset) != len(data):
        raise OSError(errno.ENOSPC, "the table of zones takes no more")
