"""What a mirror writes down at the end of each leg: which mirror it is, who is in sync, and where legs may differ.

::

    leg   [ data ........................ | record A | record B ]
                                            32 KiB     32 KiB, up to the end of the leg, in units of 4 KiB

A record is a header of 4 KiB and a bitmap with a bit for each region, set while the region may differ from leg to
leg. It is written to A and B in turns, durably, so that one of them is whole whenever the machine stops. The one with
the higher ``event`` counts; of several legs, that of the leg with the highest.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from dataclasses import dataclass, replace

from ublkpy.errors import UblkError

RECORD = 32 << 10
"""Bytes of one."""
ROOM = 2 * RECORD
"""Bytes that they take at the end of a leg."""
BLOCK = 4096
"""Whatever is read and written here is a multiple of it, in place and length."""
MAX_LEGS = 64

_MAGIC = b"ublkpy mirror\0\0\0"
_VERSION = 1
_HEADER = struct.Struct("<16sII16sQQQHH")  # magic, version, checksum, uuid, event, size, region, legs, which of them
_CHECKSUM_AT = 20
_STATES_AT = 128  # a byte for each leg: whether it is in sync
_MAX_REGIONS = (RECORD - BLOCK) * 8
_MIN_REGION = 1 << 20


@dataclass(frozen=True)
class Label:
    """One record."""

    uuid: bytes
    """16 bytes, the same on each leg."""
    event: int
    """Grows with each record."""
    size: int
    """Bytes of data of each leg."""
    in_sync: tuple[bool, ...]
    """Of each leg, whether it has all that was written."""
    index: int
    """Which leg this is."""
    dirty: bytes
    """A byte for each region: 1 where legs may differ."""

    @property
    def region(self) -> int:
        """Bytes of a region, a power of two."""
        return region_of(self.size)

    def of(self, index: int) -> Label:
        """The same for another leg."""
        return replace(self, index=index)


def region_of(size: int) -> int:
    """The bytes of a region of legs with so many bytes of data."""
    return max(_MIN_REGION, 1 << (-(-size // _MAX_REGIONS) - 1).bit_length())


def nr_regions(size: int) -> int:
    """How many regions these have."""
    return -(-size // region_of(size))


def room_at(end: int) -> int:
    """Where the records begin on a leg that ends at ``end``: so many bytes of it are for data. 0 or less: none."""
    return end // BLOCK * BLOCK - ROOM


def write(fd: int, end: int, label: Label) -> None:
    """Write it, durably, in the place of the older one. OSError. ``fd`` may have O_DIRECT."""
    packed = _pack(label)
    with mmap.mmap(-1, len(packed)) as buffer:
        buffer[:] = packed
        with memoryview(buffer) as view:
            at = room_at(end) + label.event % 2 * RECORD
            if os.pwritev(fd, [view], at, os.RWF_DSYNC) != len(packed):
                raise OSError(5, "a short write")


def read(fd: int, end: int) -> Label | None:
    """The latest one; None where there is none. UblkError for one of a version that is not known; OSError."""
    if room_at(end) <= 0:
        return None
    with mmap.mmap(-1, ROOM) as buffer:
        with memoryview(buffer) as view:
            if os.preadv(fd, [view], room_at(end)) != ROOM:
                return None
        found = [_unpack(buffer[at : at + RECORD]) for at in (0, RECORD)]
    return max(filter(None, found), key=lambda label: label.event, default=None)


def _pack(label: Label) -> bytes:
    packed = bytearray(BLOCK)
    region = region_of(label.size)
    _HEADER.pack_into(
        packed,
        0,
        _MAGIC,
        _VERSION,
        0,
        label.uuid,
        label.event,
        label.size,
        region,
        len(label.in_sync),
        label.index,
    )
    packed[_STATES_AT : _STATES_AT + len(label.in_sync)] = bytes(label.in_sync)
    bits = int("".join("01"[flag] for flag in reversed(label.dirty)) or "0", 2)
    packed += bits.to_bytes(-(-len(label.dirty) // 8), "little")
    packed += bytes(-len(packed) % BLOCK)
    struct.pack_into("<I", packed, _CHECKSUM_AT, zlib.crc32(packed))
    return bytes(packed)


def _unpack(raw: bytes) -> Label | None:
    magic, version, checksum, uuid, event, size, region, nr_legs, index = _HEADER.unpack_from(raw)
    if magic != _MAGIC:
        return None
    if version != _VERSION:
        raise UblkError(
            f"a leg has a label of version {version}, and this program knows {_VERSION}", "use a newer ublkpy"
        )
    count = nr_regions(size) if size else 0
    length = BLOCK + (count + 8 * BLOCK - 1) // (8 * BLOCK) * BLOCK
    if not 0 < nr_legs <= MAX_LEGS or index >= nr_legs or not count or length > RECORD or region != region_of(size):
        return None
    packed = bytearray(raw[:length])
    struct.pack_into("<I", packed, _CHECKSUM_AT, 0)
    if zlib.crc32(packed) != checksum:
        return None  # it was being written when the machine stopped
    bits = int.from_bytes(packed[BLOCK:], "little")
    dirty = bytes(b == "1" for b in reversed(f"{bits:0{count}b}"))
    in_sync = tuple(bool(flag) for flag in packed[_STATES_AT : _STATES_AT + nr_legs])
    return Label(uuid, event, size, in_sync, index, dirty)
