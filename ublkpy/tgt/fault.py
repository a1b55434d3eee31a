"""fault: a file, or memory, that is slow and fails where, when and as often as it was told, natively.

What befalls a request is a ``Fault`` of the map: no Python runs for it.
"""

from __future__ import annotations

import errno
import itertools
from pathlib import Path
from typing import Any, Literal, get_args

from ublkpy.errors import ConfigError, UblkError
from ublkpy.tgt.base import Geometry, Target
from ublkpy.tgt.memory import DiskMemory
from ublkpy.tgt.options import Duration, Errno, Range, Rate, Size, exact_size, option
from ublkpy.tgt.part import Part
from ublkpy.uring.map import Error, Extent, Fault, Faulty, Map, Null, Routing, Sync

Op = Literal["read", "write", "flush", "discard", "write_zeroes"]

_HOUR = 3600 * 10**9


class FaultTarget(Target):
    """A file or memory that is slow, and fails, on purpose: for tests."""

    name = "fault"
    file: Path | None = option(None, "-f", help="backing file or block device")
    size: Size | None = option(None, help="in its place, so much memory", minimum=512, multiple=512)
    delay: Duration | None = option(None, help="how late each request is", maximum=_HOUR)
    delay_read: Duration | None = option(None, help="the same for reads", maximum=_HOUR)
    delay_write: Duration | None = option(None, help="the same for writes", maximum=_HOUR)
    distribution: Literal["constant", "uniform", "exponential"] | None = option(
        None, help="how delays are spread around what was said; default: constant"
    )
    error_rate: Rate | None = option(None, help="share of the requests that fail")
    errno: Errno | None = option(None, help="what they fail with; default: EIO")
    ops: tuple[Op, ...] | None = option(None, help="which of them fail; default: all", minimum=1)
    ranges: tuple[Range, ...] | None = option(
        None, help="where they are late and fail, START-END or START+LENGTH; default: everywhere", minimum=1
    )
    while_file: Path | None = option(None, help="they are late and fail only while this file exists")
    seed: int = option(
        0, help="of the random numbers: the same requests meet the same again", minimum=0, maximum=2**64 - 1
    )

    def open(self) -> Geometry:
        self._check_words()
        self._backing: Part | DiskMemory
        if self.file is not None:
            self._backing = Part(self.file, self.disk)
        else:
            self._backing = DiskMemory(self, self.size or 0)
        geometry = self._backing.geometry
        try:
            self._check_ranges(geometry.size, self.block_size(geometry.logical_block))
        except BaseException:
            self.close()
            raise
        return geometry

    def start(self) -> None:
        if isinstance(self._backing, DiskMemory):
            self._backing.begin()

    def map(self, target_map: Map) -> None:
        whole: Routing
        flush: Null | Sync
        if isinstance(self._backing, Part):
            file = self._backing.add_to(target_map)
            whole, flush = Routing.all(file), Sync((file.file,))
        else:
            whole, flush = self._backing.add_to(target_map), Null()
        faulty = Routing(
            read=self._after_fault(target_map, "read", whole.read),
            write=self._after_fault(target_map, "write", whole.write),
            discard=self._after_fault(target_map, "discard", whole.discard),
            write_zeroes=self._after_fault(target_map, "write_zeroes", whole.write_zeroes),
        )
        if self.ranges:  # a flush is in none of them
            target_map.fill(whole, flush)
        else:
            target_map.set_flush(self._after_fault(target_map, "flush", flush))
        everywhere = [Range(0, target_map.size)]
        target_map.replace(Extent(one.start, one.length, faulty, one.start) for one in self.ranges or everywhere)

    def resize(self, size: int) -> None:
        if not isinstance(self._backing, Part):
            super().resize(size)
            return
        for one in self.ranges or ():
            if one.end > size or one.end == self._backing.size:
                raise UblkError(
                    f"range {one} ends behind the new end of the device, or moves with it",
                    "delete the device, and add it anew",
                )
        self._backing.resize(size)

    def close(self) -> None:
        self._backing.close()

    def backing(self) -> str:
        return str(self.file or "")

    def status(self) -> dict[str, object]:
        return {"backing_file": str(self.file)} if self.file else {}

    def _after_fault(self, found: Map, op: Op, action: Any) -> Any:
        """The action, and before it what befalls such requests, if anything does."""
        own = {"read": self.delay_read, "write": self.delay_write}.get(op)
        delay = (self.delay if own is None else own) or 0
        rate = (self.error_rate or 0.0) if op in (self.ops or get_args(Op)) else 0.0
        if isinstance(action, Error) or (not delay and not rate):
            return action
        number = self.errno or errno.EIO
        fault = Fault(delay, self.distribution or "constant", rate, number, self.while_file, self.seed)
        return Faulty(action, found.add_fault(fault))

    # -- what was said ---------------------------------------------------------------------

    def _check_words(self) -> None:
        """What does not go together, whatever the backing."""
        if self.file is None and self.size is None:
            raise ConfigError(
                "neither a file nor a size is given", "name a file with --file FILE, or take memory with --size SIZE"
            )
        if self.file is not None and self.size is not None:
            raise ConfigError("a file has its own size, and size is for memory", "leave one of the two out")
        is_late = any((self.delay, self.delay_read, self.delay_write))
        self._refuse(not is_late, ("distribution",), "nothing is late", "delay, such as 10ms")
        self._refuse(self.error_rate is None, ("errno", "ops"), "nothing fails", "error_rate, such as 1%")
        self._refuse(
            not is_late and self.error_rate is None,
            ("ranges", "while_file"),
            "nothing is late, and nothing fails",
            "delay or error_rate",
        )
        if self.ranges and "flush" in (self.ops or ()):
            raise ConfigError(
                "ops and ranges: a flush is about the whole disk, and in no range", "leave flush out, or ranges"
            )
        if self.while_file and not self.while_file.parent.is_dir():
            folder = self.while_file.parent
            raise UblkError(f"there is no folder {folder} for while_file", f"make it with: mkdir -p {folder}")

    def _refuse(self, is_in_vain: bool, names: tuple[str, ...], why: str, missing: str) -> None:
        said = [name for name in names if getattr(self, name) is not None]
        if is_in_vain and said:
            raise ConfigError(f"{' and '.join(said)}: {why}", f"say {missing}, too")

    def _check_ranges(self, size: int, block: int) -> None:
        ranges = sorted(self.ranges or ())
        for one in ranges:
            if one.end > size:
                raise UblkError(f"range {one} is not within the device, which has {exact_size(size)}")
            if one.start % block or one.end % block:
                raise UblkError(f"range {one} does not begin and end with a block of the device, {block} bytes")
        for left, right in itertools.pairwise(ranges):
            if right.start < left.end:
                raise ConfigError(f"ranges {left} and {right} overlap", "make one of them")
