"""The words of a map: what is done with the bytes of an extent. And what C calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ublkpy.uring.ffi import ffi, lib
from ublkpy.uring.uapi import SECTOR

_MAX_CHUNK = 1 << 40


@dataclass(frozen=True)
class Null:
    """Requests succeed and move nothing. As a flush: there is nothing to flush."""


@dataclass(frozen=True)
class Zero:
    """Reads give zeroes; what is written or discarded is forgotten."""


@dataclass(frozen=True)
class Error:
    """Requests fail."""

    errno: int
    """As in the module of that name, 1 to 4095. ValueError, when the map gets it, for others."""


@dataclass(frozen=True)
class Upcall:
    """Python decides: the target's methods, or its ``upcall``. As a flush, too."""

    early: bool = False
    """Whether in mode get-data Python also says where the data of a WRITE goes (``Request.early``)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of the daemon's own memory, as ``Map.add_memory`` returned it. A discard there leaves zeroes."""

    address: int
    """Where it begins."""
    length: int
    """Bytes."""


@dataclass(frozen=True)
class File:
    """Bytes of one file. A discard frees its space."""

    file: int
    """A number from ``Map.add_file``. ValueError, when the map gets it, for one that it has not."""
    shift: int = 0
    """So many bytes behind the ``offset`` of the extent; may be negative."""


@dataclass(frozen=True)
class Stripe:
    """Chunks, in turns in several files."""

    files: tuple[int, ...]
    """Numbers from ``Map.add_file``, each one more than the one before; else ValueError, when the map gets it."""
    chunk: int
    """Bytes: a power of two, 512 to 2⁴⁰."""
    shift: int = 0
    """So many bytes behind, in each file; may be negative."""


@dataclass(frozen=True)
class Mirror:
    """The same bytes in each of several files. Where one of them fails, Python is asked (``Request.failure``)."""

    files: tuple[int, ...]
    """Numbers from ``Map.add_file``, each one more than the one before; else ValueError, when the map gets it."""
    chunk: int
    """So many bytes are read from one, the next from another: a power of two, 512 to 2⁴⁰."""
    shift: int = 0
    """So many bytes behind, in each file; may be negative."""


@dataclass(frozen=True)
class Pattern:
    """Each 8 bytes hold their offset, which is that of the extent for its first, big-endian; writes of anything else,
    and requests without data, fail."""


@dataclass(frozen=True)
class Sync:
    """As a flush: fsync these files, at the same time."""

    files: tuple[int, ...]
    """Numbers from ``Map.add_file``."""
    asks: bool = False
    """Whether Python is asked where one of them fails (``Request.failure``)."""


Action = Null | Zero | Error | Upcall | Pattern | Memory | File | Stripe | Mirror
"""What can be done with the bytes of an extent."""
Flush = Null | Upcall | Sync
"""What a flush can do."""


@dataclass(frozen=True)
class Routing:
    """What is done for each operation."""

    read: Action
    """For UBLK_IO_OP_READ."""
    write: Action
    """For UBLK_IO_OP_WRITE."""
    discard: Action
    """For UBLK_IO_OP_DISCARD."""
    write_zeroes: Action
    """For UBLK_IO_OP_WRITE_ZEROES."""

    @classmethod
    def all(cls, action: Action) -> Routing:
        """The same for each operation."""
        return cls(action, action, action, action)

    @property
    def actions(self) -> tuple[Action, Action, Action, Action]:
        """All four, in this order."""
        return self.read, self.write, self.discard, self.write_zeroes

    @property
    def is_placed(self) -> bool:
        """Whether the ``offset`` of an extent means anything."""
        return any(isinstance(action, Pattern | Memory | File | Stripe | Mirror) for action in self.actions)


@dataclass(frozen=True)
class Extent:
    """A part of the device, and where it lives: all in bytes, ``start`` and ``length`` multiples of 512."""

    start: int
    """Its first byte."""
    length: int
    """More than 0."""
    routing: Routing
    """What is done with it."""
    offset: int = 0
    """Where its first byte is in the file, stripe, mirror, pattern or memory of the routing."""

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.start + self.length


def routing_to_c(routing: Routing, nr_files: int) -> Any:
    """struct um_routing, for a map with that many files. ValueError for what has no meaning."""
    return ffi.new("struct um_routing *", {"actions": [_action(action, nr_files) for action in routing.actions]})


def _action(action: Action, nr_files: int) -> dict[str, int]:
    match action:
        case Null():
            return {"kind": lib.UM_NULL}
        case Zero():
            return {"kind": lib.UM_ZERO}
        case Upcall(early):
            return {"kind": lib.UM_UPCALL_EARLY if early else lib.UM_UPCALL}
        case Memory(address):
            return {"kind": lib.UM_MEMORY, "shift": address}
        case Error(number):
            if not 0 < number < 4096:
                raise ValueError(f"{number} is not an errno")
            return {"kind": lib.UM_ERROR, "error": number}
        case File(file, shift):
            return {"kind": lib.UM_FILE, "slot": _slots([file], nr_files)[0], "shift": _shift(shift)}
        case Pattern():
            return {"kind": lib.UM_PATTERN}
        case Stripe(files, chunk, shift):
            return {"kind": lib.UM_STRIPE} | _legs(files, chunk, shift, nr_files)
        case Mirror(files, chunk, shift):
            return {"kind": lib.UM_MIRROR} | _legs(files, chunk, shift, nr_files)


def _legs(files: tuple[int, ...], chunk: int, shift: int, nr_files: int) -> dict[str, int]:
    slots = _slots(files, nr_files)
    if not 0 < len(slots) < 256 or list(slots) != list(range(slots[0], slots[0] + len(slots))):
        raise ValueError(f"files {slots} are not 1 to 255 that were added one after the other")
    if not SECTOR <= chunk <= _MAX_CHUNK or chunk & (chunk - 1):
        raise ValueError(f"chunk of {chunk} bytes is not a power of two from {SECTOR} on")
    return {
        "slot": slots[0],
        "nr_legs": len(slots),
        "chunk_shift": chunk.bit_length() - 1,
        "shift": _shift(shift),
    }


def flush_to_c(flush: Flush, nr_files: int) -> Any:
    """struct um_flush, likewise."""
    match flush:
        case Null():
            return ffi.new("struct um_flush *", {"kind": lib.UM_NULL, "slots": []})
        case Upcall():
            return ffi.new("struct um_flush *", {"kind": lib.UM_UPCALL, "slots": []})
        case Sync(files, asks):
            slots = sorted(set(_slots(files, nr_files)))
            return ffi.new("struct um_flush *", {"kind": lib.UM_FILE, "asks": asks, "nr": len(slots), "slots": slots})


def _slots(files: Sequence[int], nr_files: int) -> Sequence[int]:
    for file in files:
        if not 0 <= file < nr_files:
            raise ValueError(f"file {file} was not added to the map, which has {nr_files}")
    return files


def _shift(shift: int) -> int:
    if not -(1 << 63) < shift < 1 << 63:
        raise ValueError(f"no file is that large: shift of {shift} bytes")
    return shift
