"""How the methods of a target want to be called, and what follows from them for its disk."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import logging
import operator
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any

from ublkpy.errors import UblkError
from ublkpy.tgt.base import MAX_DISCARD_BYTES, METHODS, ZONE_METHODS, Geometry, Target
from ublkpy.tgt.options import SECTOR
from ublkpy.uring.map import Map
from ublkpy.uring.zones import Zones

_log = logging.getLogger(__name__)


_BESIDE = {"write_buffer": "write", "write_fua": "write", "punch_hole": "write_zeroes"}


@dataclass(frozen=True)
class _Rule:
    holds: Callable[[int], bool]
    text: str


_BLOCK = _Rule(lambda n: n >= SECTOR and not n & (n - 1), f"a power of two, {SECTOR} or more")
_MAXIMUM = _Rule(lambda n: 0 <= n <= MAX_DISCARD_BYTES, f"0 to {MAX_DISCARD_BYTES} bytes")
_RULES = {
    "size": _Rule(lambda n: 0 < n < 1 << 63, "more than 0 bytes, and less than 8 EiB"),
    "logical_block": _Rule(lambda n: n in (512, 1024, 2048, 4096), "512, 1024, 2048 or 4096 bytes"),
    "physical_block": _BLOCK,
    "io_min": _BLOCK,
    "io_opt": _BLOCK,
    "discard_granularity": _MAXIMUM,
    "max_discard_bytes": _MAXIMUM,
    "max_write_zeroes_bytes": _MAXIMUM,
}
"""What each size of a Geometry has to be."""


class Way(Enum):
    """How a target answers what its map leaves to Python."""

    RAW = auto()
    """With ``upcall``, or not at all."""
    PLAIN = auto()
    """With methods that are called in the queue's thread, one after the other."""
    BLOCKING = auto()
    """With methods that threads of a pool call."""
    ASYNC = auto()
    """With at least one ``async def``, or an ``async`` start: on an asyncio loop in the queue's thread."""


def way(target: Target) -> Way:
    methods = target.methods()
    if not methods or type(target).upcall is not Target.upcall:
        return Way.RAW
    if any(inspect.iscoroutinefunction(getattr(target, name)) for name in (*methods, "start", "stop")):
        return Way.ASYNC
    return Way.BLOCKING if target.blocking else Way.PLAIN


def fit(target: Target, found: Geometry) -> Geometry:
    """The disk of a target that opened as ``found``: without a map of its own, it can do what it has methods for.
    UblkError for what no disk can be.
    """
    _check_calls(target)
    _warn_of_names(target)
    methods = target.methods()
    found = _checked(target, found)
    if found.zones:
        _check_zones(target, found, found.zones)
    if way(target) is Way.RAW:
        _check_plain(target)
    if type(target).map is not Target.map:
        return found
    if "read" not in methods:
        raise UblkError(f"target {target.name} has neither a read method nor a map", "docs/write-a-target.md has both")
    for name, beside in _BESIDE.items():
        if name in methods and beside not in methods:
            raise UblkError(
                f"target {target.name} has {name}, which is never called without {beside}", f"define {beside}, too"
            )
    discards = "discard" in methods or "write_zeroes" in methods
    return replace(
        found,
        read_only=found.read_only or "write" not in methods,
        write_cache="flush" in methods,
        discard_granularity=(found.discard_granularity or found.logical_block) if discards else 0,
        max_discard_bytes=(found.max_discard_bytes or MAX_DISCARD_BYTES) if "discard" in methods else 0,
        max_write_zeroes_bytes=(found.max_write_zeroes_bytes or MAX_DISCARD_BYTES) if "write_zeroes" in methods else 0,
    )


def _checked(target: Target, found: Geometry) -> Geometry:
    """With plain numbers, each of which the driver and the block layer take as it is."""
    numbers: dict[str, Any] = {}
    for name, rule in _RULES.items():
        value = getattr(found, name)
        try:
            numbers[name] = operator.index(value)
        except TypeError as e:
            raise _mistake(target, name, value, "it is a whole number of bytes, an int") from e
        if not rule.holds(numbers[name]):
            raise _mistake(target, name, value, f"it is {rule.text}")
    if numbers["size"] % numbers["logical_block"]:
        below = numbers["size"] - numbers["size"] % numbers["logical_block"]
        raise _mistake(
            target,
            "size",
            found.size,
            f"it is a multiple of logical_block, {found.logical_block}, such as"
            f" {' or '.join(str(size) for size in (below, below + numbers['logical_block']) if size)}",
        )
    return replace(found, **numbers)


def _mistake(target: Target, name: str, value: object, rule: str) -> UblkError:
    return UblkError(f"target {target.name} opened with a Geometry of {name} {value!r}", rule)


def _check_calls(target: Target) -> None:
    """That its methods take what they are called with: else each request would fail, the first of them unseen."""
    for name in target.methods():
        expected = list(inspect.signature(getattr(Target, name)).parameters)[1:]
        try:
            inspect.signature(getattr(target, name)).bind(*expected)
        except TypeError as e:
            raise UblkError(
                f"{name}() of target {target.name} cannot be called: {e}",
                f"def {name}({', '.join(['self', *expected])})",
            ) from e
        except ValueError:  # of a function in C, nobody knows
            continue


def _check_plain(target: Target) -> None:
    """Where no method answers requests, there is no loop that an ``async def`` would run on."""
    for name in ("start", "stop"):
        if inspect.iscoroutinefunction(getattr(target, name)):
            raise UblkError(
                f"{name}() of target {target.name} is async, and nobody would run it: none of its methods for requests"
                " would be called",
                f"def {name}(self)",
            )


def _warn_of_names(target: Target) -> None:
    """A method that is misspelt is not missed by anybody else: the disk just cannot do it."""
    own = target.methods()
    for name in vars(type(target)).keys() - vars(Target).keys() - target.options.keys():
        for meant in difflib.get_close_matches(name, METHODS, n=1, cutoff=0.8):
            if meant not in own and callable(getattr(target, name)):
                _log.warning("target %s has no %s(); is its %s() meant to be that?", target.name, meant, name)


def _check_zones(target: Target, found: Geometry, zones: Zones) -> None:
    """What the driver would refuse without saying why (ublk_drv.c, ublk_validate_params; block/blk-zoned.c)."""
    missing = set(ZONE_METHODS) - target.methods()
    if missing and type(target).upcall is Target.upcall:
        raise UblkError(
            f"target {target.name} has zones, but no {', '.join(sorted(missing))}",
            "a zoned disk needs all of these methods; docs/write-a-target.md has them",
        )
    if zones.size < found.logical_block or zones.size & (zones.size - 1):
        raise UblkError(
            f"target {target.name} has zones of {zones.size} bytes",
            "their size is a power of two, and at least a logical block; their capacity need not be",
        )
    if not found.size or found.size % zones.size:
        raise UblkError(
            f"target {target.name} has {found.size} bytes, and zones of {zones.size}", "a disk has whole zones"
        )


def open_target(target: Target) -> Geometry:
    """``Target.open``. Raises UblkError, also for what it raised that is no answer; nothing is open then."""
    with told(target, "open"):
        found = target.open()
        if not isinstance(found, Geometry):
            _end(target, target.close)
            raise UblkError(
                f"open() of target {target.name} returned {found!r}",
                "it is a plain method, and returns what the disk is like: Geometry(size)",
            )
        return found


def start(target: Target, end_device: Callable[[], None], tell_changed: Callable[[], None]) -> None:
    """``Target.start``; an ``async`` one runs on the loops of the queues. Raises UblkError."""
    target._end_device, target._tell_changed, target.was_cut = end_device, tell_changed, False
    if not inspect.iscoroutinefunction(target.start):
        with told(target, "start"):
            target.start()


def make_map(target: Target, size: int) -> Map:
    """``Target.map``, with a map for it. Raises UblkError."""
    made = Map(size)
    try:
        fill_map(target, made)
    except BaseException:
        made.close()
        raise
    return made


def fill_map(target: Target, target_map: Map) -> None:
    """``Target.map``. Raises UblkError."""
    fill: Callable[[Map], object] = target.map
    with told(target, "map"):
        if fill(target_map) is not None:
            raise TypeError("map() returned something: it says what there is in the map that it is given")


def start_thread(target: Target) -> None:
    """``Target.start_thread``. Raises UblkError."""
    with told(target, "start_thread"):
        target.start_thread()


def backing(target: Target) -> str:
    """``Target.backing``. Raises UblkError."""
    with told(target, "backing"):
        return target.backing()


def status(target: Target) -> dict[str, object]:
    """``Target.status``. Raises UblkError, also for what JSON cannot hold."""
    with told(target, "status"):
        found = target.status()
        json.dumps(found)
        return found


def stop(target: Target, *, was_cut: bool) -> None:
    """``Target.stop``, which must not keep a daemon from its end."""
    target._tell_changed, target.was_cut = None, was_cut
    if not inspect.iscoroutinefunction(target.stop):
        _end(target, target.stop)


def stop_thread(target: Target) -> None:
    """``Target.stop_thread``, which must not either."""
    _end(target, target.stop_thread)


def _end(target: Target, what: Callable[[], object]) -> None:
    try:
        what()
    except Exception:
        _log.exception("target %s failed in %s()", target.name, what.__name__)


@contextlib.contextmanager
def told(target: Target, where: str) -> Iterator[None]:
    """Makes an UblkError of what a method of the target raises, with the traceback from that method on."""
    try:
        yield
    except UblkError:
        raise
    except Exception as e:
        frames = traceback.TracebackException.from_exception(e)
        frames.stack[:] = [frame for frame in frames.stack if frame.filename != __file__] or frames.stack
        raise UblkError(f"target {target.name} failed in {where}()", "".join(frames.format()).rstrip()) from e
