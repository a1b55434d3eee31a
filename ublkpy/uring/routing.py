"""The words of a map: what is done with the bytes of an extent. And what C calls it."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
class Space:
    """What another space of the map says of these bytes."""

    space: int
    """``Map.space`` of one that was added after that of the extent; else ValueError, when the map gets it."""
    shift: int = 0
    """So many bytes behind the ``offset`` of the extent; may be negative. What is behind its end fails with EIO."""


@dataclass(frozen=True)
class Spaces:
    """Chunks, in turns in several spaces of the map."""

    spaces: tuple[int, ...]
    """As ``Space.space``, each one more than the one before."""
    chunk: int
    """Bytes: a power of two, 512 to 2⁴⁰."""


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


@dataclass(frozen=True)
class Fault:
    """What befalls requests before anything is done about them: they are late, and some of them fail.

    What each of them meets is drawn when it comes, part by part where it goes to several places. Delays and errors
    repeat with the order in which requests come to each thread of a queue.
    """

    delay: int = 0
    """Nanoseconds, 0 to 3600 * 10⁹; of the distributions other than constant, the mean. None is longer than an hour."""
    distribution: Literal["constant", "uniform", "exponential"] = "constant"
    """``uniform`` is from 0 to twice the mean."""
    error_rate: float = 0.0
    """The share that fails, after its delay, and does nothing: 0 to 1."""
    errno: int = errno.EIO
    """What it fails with, as in the module of that name, 1 to 4095."""
    while_file: Path | None = None
    """Only while there is something by this name, an absolute one, which is looked at for each request."""
    seed: int = 0
    """Of the random numbers, 0 to 2⁶⁴ - 1."""


@dataclass(frozen=True)
class Faulty:
    """An action, or a flush, that comes after a fault. Metadata is not part of that: it comes and goes at once."""

    action: Null | Zero | Upcall | Pattern | Memory | File | Stripe | Mirror | Sync
    """What is done with a request, once it is through. No data of it is taken before."""
    fault: int
    """A number from ``Map.add_fault``. ValueError, when the map gets it, for one that it has not."""


Action = Null | Zero | Error | Upcall | Pattern | Memory | File | Stripe | Mirror | Space | Spaces | Faulty
"""What can be done with the bytes of an extent."""
Flush = Null | Upcall | Sync | Faulty
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
    def places(self) -> tuple[Action | Sync, ...]:
        """The same without the faults that come before them."""
        return tuple(action.action if isinstance(action, Faulty) else action for action in self.actions)

    @property
    def is_placed(self) -> bool:
        """Whether the ``offset`` of an extent means anything."""
        placed = Pattern | Memory | File | Stripe | Mirror | Space | Spaces
        return any(isinstance(action, placed) for action in self.places)


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
    """Where its first byte is in the file, stripe, mirror, pattern, memory or spaces of the routing."""

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.start + self.length


_DISTRIBUTIONS = {"constant": lib.UM_CONSTANT, "uniform": lib.UM_UNIFORM, "exponential": lib.UM_EXPONENTIAL}


def fault_to_c(fault: Fault) -> Any:
    """struct um_fault without its path. ValueError for what has no meaning."""
    if not 0 <= fault.delay <= lib.UM_MAX_DELAY:
        raise ValueError(f"a delay of {fault.delay} ns is not from 0 to an hour")
    if fault.distribution not in _DISTRIBUTIONS:
        raise ValueError(f"distribution {fault.distribution!r} is not one of: {', '.join(_DISTRIBUTIONS)}")
    if not 0 <= fault.error_rate <= 1:
        raise ValueError(f"an error rate of {fault.error_rate} is not from 0 to 1")
    if not 0 <= fault.seed < 1 << 64:
        raise ValueError(f"seed {fault.seed} does not fit into 64 bits")
    if fault.while_file is not None and not fault.while_file.is_absolute():
        raise ValueError(f"while_file {fault.while_file} is not absolute: the daemon has another working folder")
    said = {
        "delay": fault.delay,
        "distribution": _DISTRIBUTIONS[fault.distribution],
        "error_rate": fault.error_rate,
        "error": _errno(fault.errno),
        "seed": fault.seed,
    }
    return ffi.new("struct um_fault *", said)


def routing_to_c(routing: Routing, has: Any) -> Any:
    """struct um_routing, for a map that has so many files and faults (struct um_stats). ValueError for what has no
    meaning.
    """
    return ffi.new("struct um_routing *", {"actions": [_action(action, has) for action in routing.actions]})


def _action(action: Action | Sync, has: Any) -> dict[str, int]:
    match action:
        case Sync():
            raise ValueError("to sync files is no action of an extent, but a flush")
        case Faulty(Error() | Faulty() | Space() | Spaces() as inner):
            raise ValueError(f"a fault cannot come before {inner}, which says for itself what fails")
        case Faulty(inner, fault):
            return _action(inner, has) | {"error": _fault(fault, has)}
        case Null():
            return {"kind": lib.UM_NULL}
        case Zero():
            return {"kind": lib.UM_ZERO}
        case Upcall(early):
            return {"kind": lib.UM_UPCALL_EARLY if early else lib.UM_UPCALL}
        case Memory(address):
            return {"kind": lib.UM_MEMORY, "shift": address}
        case Error(number):
            return {"kind": lib.UM_ERROR, "error": _errno(number)}
        case File(file, shift):
            return {"kind": lib.UM_FILE, "slot": _slots([file], has)[0], "shift": _shift(shift)}
        case Pattern():
            return {"kind": lib.UM_PATTERN}
        case Stripe(files, chunk, shift):
            return {"kind": lib.UM_STRIPE} | _legs("files", _slots(files, has), chunk, shift)
        case Mirror(files, chunk, shift):
            return {"kind": lib.UM_MIRROR} | _legs("files", _slots(files, has), chunk, shift)
        case Space(space, shift):
            return {"kind": lib.UM_SPACES} | _legs("spaces", _spaces([space], has), _MAX_CHUNK, shift)
        case Spaces(spaces, chunk):
            return {"kind": lib.UM_SPACES} | _legs("spaces", _spaces(spaces, has), chunk, 0)


def _legs(what: str, slots: Sequence[int], chunk: int, shift: int) -> dict[str, int]:
    if not 0 < len(slots) < 256 or list(slots) != list(range(slots[0], slots[0] + len(slots))):
        raise ValueError(f"{what} {slots} are not 1 to 255 that were added one after the other")
    if not SECTOR <= chunk <= _MAX_CHUNK or chunk & (chunk - 1):
        raise ValueError(f"chunk of {chunk} bytes is not a power of two from {SECTOR} on")
    return {
        "slot": slots[0],
        "nr_legs": len(slots),
        "chunk_shift": chunk.bit_length() - 1,
        "shift": _shift(shift),
    }


def flush_to_c(flush: Flush, has: Any) -> Any:
    """struct um_flush, likewise."""
    match flush:
        case Null() | Sync(()):
            return ffi.new("struct um_flush *", {"kind": lib.UM_NULL, "slots": []})
        case Upcall():
            return ffi.new("struct um_flush *", {"kind": lib.UM_UPCALL, "slots": []})
        case Sync(files, asks):
            slots = sorted(set(_slots(files, has)))
            return ffi.new("struct um_flush *", {"kind": lib.UM_FILE, "asks": asks, "nr": len(slots), "slots": slots})
        case Faulty(Null() | Upcall() | Sync() as inner, fault):
            made = flush_to_c(inner, has)
            made.error = _fault(fault, has)
            return made
    raise ValueError(f"{flush} is no flush")


def _slots(files: Sequence[int], has: Any) -> Sequence[int]:
    for file in files:
        if not 0 <= file < has.nr_files:
            raise ValueError(f"file {file} was not added to the map, which has {has.nr_files}")
    return files


def _spaces(spaces: Sequence[int], has: Any) -> Sequence[int]:
    for space in spaces:
        if not 0 < space < has.nr_spaces:
            raise ValueError(f"space {space} was not added to the map, which has {has.nr_spaces}")
    return spaces


def _fault(number: int, has: Any) -> int:
    if not 0 <= number < has.nr_faults:
        raise ValueError(f"fault {number} was not added to the map, which has {has.nr_faults}")
    return int(lib.UM_FIRST_FAULT + number)


def _errno(number: int) -> int:
    if not 0 < number <= lib.UM_MAX_ERRNO:
        raise ValueError(f"{number} is not an errno")
    return number


def _shift(shift: int) -> int:
    if not -(1 << 63) < shift < 1 << 63:
        raise ValueError(f"no file is that large: shift of {shift} bytes")
    return shift
