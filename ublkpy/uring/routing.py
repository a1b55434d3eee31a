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
    """Requests fail with this errno."""

    errno: int


@dataclass(frozen=True)
class Upcall:
    """Python decides; if ``early``, in mode get-data also where the data of a WRITE goes."""

    early: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes of our own memory, as ``Map.add_memory`` returned it."""

    address: int
    length: int


@dataclass(frozen=True)
class File:
    """Bytes of one file (a number from ``Map.add_file``), ``shift`` bytes behind where the extent says."""

    file: int
    shift: int = 0


@dataclass(frozen=True)
class Stripe:
    """Chunks of ``chunk`` bytes (a power of two), in turns in files that were added one after the other."""

    files: tuple[int, ...]
    chunk: int
    shift: int = 0


@dataclass(frozen=True)
class Sync:
    """As a flush: fsync these files."""

    files: tuple[int, ...]


Action = Null | Zero | Error | Upcall | Memory | File | Stripe
Flush = Null | Upcall | Sync


@dataclass(frozen=True)
class Routing:
    """What is done for each operation."""

    read: Action
    write: Action
    discard: Action
    write_zeroes: Action

    @classmethod
    def all(cls, action: Action) -> Routing:
        """The same for each operation."""
        return cls(action, action, action, action)

    @property
    def actions(self) -> tuple[Action, Action, Action, Action]:
        """In the order of ``enum um_op``."""
        return self.read, self.write, self.discard, self.write_zeroes

    @property
    def is_placed(self) -> bool:
        """Whether an extent's offset means anything."""
        return any(isinstance(action, Memory | File | Stripe) for action in self.actions)


@dataclass(frozen=True)
class Extent:
    """``length`` bytes from ``start`` on. Its first byte is at ``offset`` (bytes) in the files of the routing."""

    start: int
    length: int
    routing: Routing
    offset: int = 0

    @property
    def end(self) -> int:
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
        case Stripe(files, chunk, shift):
            slots = _slots(files, nr_files)
            if not slots or list(slots) != list(range(slots[0], slots[0] + len(slots))):
                raise ValueError(f"files {slots} were not added one after the other")
            if not SECTOR <= chunk <= _MAX_CHUNK or chunk & (chunk - 1):
                raise ValueError(f"chunk of {chunk} bytes is not a power of two from {SECTOR} on")
            legs = {"kind": lib.UM_STRIPE, "slot": slots[0], "nr_legs": len(slots)}
            return legs | {"chunk_shift": chunk.bit_length() - 1, "shift": _shift(shift)}


def flush_to_c(flush: Flush, nr_files: int) -> Any:
    """struct um_flush, likewise."""
    match flush:
        case Null():
            return ffi.new("struct um_flush *", {"kind": lib.UM_NULL, "slots": []})
        case Upcall():
            return ffi.new("struct um_flush *", {"kind": lib.UM_UPCALL, "slots": []})
        case Sync(files):
            slots = sorted(set(_slots(files, nr_files)))
            return ffi.new("struct um_flush *", {"kind": lib.UM_FILE, "nr": len(slots), "slots": slots})


def _slots(files: Sequence[int], nr_files: int) -> Sequence[int]:
    for file in files:
        if not 0 <= file < nr_files:
            raise ValueError(f"file {file} was not added to the map, which has {nr_files}")
    return files


def _shift(shift: int) -> int:
    if not -(1 << 63) < shift < 1 << 63:
        raise ValueError(f"no file is that large: shift of {shift} bytes")
    return shift
