"""What a call asks of a target's methods, for who waits for them in his own way."""

from __future__ import annotations

import errno
import inspect
from collections.abc import Generator
from typing import Any, Protocol

from ublkpy.tgt.base import Target
from ublkpy.uring import zones
from ublkpy.uring.queue import HAS_FAILED, IS_EARLY, IS_FUA, LATER, Call
from ublkpy.uring.uapi import IoFlag, Op

_READ, _WRITE, _FLUSH, _DISCARD, _WRITE_ZEROES, _APPEND, _REPORT, _RESET_ALL = map(
    int, (Op.READ, Op.WRITE, Op.FLUSH, Op.DISCARD, Op.WRITE_ZEROES, Op.ZONE_APPEND, Op.REPORT_ZONES, Op.ZONE_RESET_ALL)
)
_ZONE_METHODS = {
    int(Op.ZONE_OPEN): "zone_open",
    int(Op.ZONE_CLOSE): "zone_close",
    int(Op.ZONE_FINISH): "zone_finish",
    int(Op.ZONE_RESET): "zone_reset",
}

Steps = Generator[Any, Any, None]
"""Yields what a method returned, and is sent what came of it: the same, or what was awaited."""


class Desk(Protocol):
    """What is needed of a queue."""

    def data(self, place: int, length: int, what: int) -> memoryview: ...

    def receive(self, piece: int, buffer: Any, length: int) -> None: ...

    def appended(self, piece: int, offset: int) -> None: ...

    def let_go(self, piece: int) -> None: ...


def serve(queue: Desk, target: Target, call: Call) -> int:
    """Calls plain methods: 0, or LATER for what is not here yet. What they raise comes out here."""
    steps = _steps(queue, target, call)
    found = None
    try:
        while True:
            found = steps.send(found)
    except StopIteration:
        return LATER if call[3] & IS_EARLY else 0


async def serve_later(queue: Desk, target: Target, call: Call) -> int:
    """The same with methods that are ``async``, or not."""
    steps = _steps(queue, target, call)
    found = None
    try:
        while True:
            found = steps.send(found)
            if inspect.isawaitable(found):
                found = await found
    except StopIteration:
        return LATER if call[3] & IS_EARLY else 0
    finally:
        steps.close()  # and lets go of the data


def returned(name: str) -> TypeError:
    """What is wrong with a method that returns something."""
    return TypeError(
        f"{name}() returned something: it is done when it returns, all of it, or raises; one that returns an awaitable"
        " has to be an async def"
    )


def _steps(queue: Desk, target: Target, call: Call) -> Steps:
    """Calls one method after the other. An early write is answered, with its buffer; all others the caller answers."""
    offset, length, place, what, piece, flags = call
    op = what & 0xFF
    if what & HAS_FAILED:
        raise OSError(errno.EIO, "a file of the map failed")
    if what & IS_EARLY:
        queue.receive(piece, target.write_buffer(offset, length), length)
    elif op in (_READ, _WRITE):
        with queue.data(place, length, what) as buf:
            if op == _READ:
                yield from _do("read", target.read(offset, buf))
            elif what & IS_FUA and "write_fua" in target.methods():
                yield from _do("write_fua", target.write_fua(offset, buf))
                what &= ~IS_FUA
            else:
                yield from _do("write", target.write(offset, buf))
        queue.let_go(piece)
    elif op == _FLUSH:
        yield from _do("flush", target.flush())
    elif op == _DISCARD:
        yield from _do("discard", target.discard(offset, length))
    elif op == _WRITE_ZEROES:
        if not flags & IoFlag.NOUNMAP and "punch_hole" in target.methods():
            yield from _do("punch_hole", target.punch_hole(offset, length))
        else:
            yield from _do("write_zeroes", target.write_zeroes(offset, length))
    elif op == _APPEND:
        with queue.data(place, length, what) as buf:
            where = yield target.zone_append(offset, buf)
        queue.appended(piece, where)
    elif op == _REPORT:
        found = yield target.report_zones(offset, length // zones.ZONE_BYTES)
        with queue.data(place, length, what) as buf:
            zones.report(found, buf)
    elif op == _RESET_ALL:
        yield from _do("zone_reset_all", target.zone_reset_all())
    else:
        name = _ZONE_METHODS[op]
        yield from _do(name, getattr(target, name)(offset))
    if what & IS_FUA and not what & IS_EARLY and op != _READ and "flush" in target.methods():
        yield from _do("flush", target.flush())


def _do(name: str, later: Any) -> Steps:
    """A method that was called, and returns nothing."""
    if (yield later) is not None:
        raise returned(name)
