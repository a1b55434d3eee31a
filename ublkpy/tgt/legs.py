"""Several files, block devices or targets behind one: opening them, and what they can do together."""

from __future__ import annotations

import stat
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ublkpy.errors import ConfigError, UblkError
from ublkpy.tgt import handlers
from ublkpy.tgt.base import Geometry, Progress, Target
from ublkpy.tgt.disk import DiskOptions
from ublkpy.tgt.nested import Nested, Source, as_target, paths
from ublkpy.tgt.options import option
from ublkpy.tgt.part import Part
from ublkpy.uring.map import File, Map, Space, Spaces, Stripe, Sync

FILES_HELP = "backing files or block devices, in their order; repeatable; in YAML, one may be a target"
Leg = Part | Nested


@dataclass(frozen=True)
class Places:
    """Where the legs are in a map: files, or spaces of it, by their numbers, which follow each other."""

    numbers: tuple[int, ...]
    are_spaces: bool

    def each(self) -> Sequence[File | Space]:
        """As one action each."""
        return [Space(number) if self.are_spaces else File(number) for number in self.numbers]

    def in_turns(self, chunk: int) -> Stripe | Spaces:
        """As one action, so many bytes in each."""
        return Spaces(self.numbers, chunk) if self.are_spaces else Stripe(self.numbers, chunk)

    def sync(self) -> Sync:
        """All that the space of the device has to do for a flush: others have one of their own."""
        return Sync(() if self.are_spaces else self.numbers)


class Legs:
    """Open files and block devices, or, where one of them is a target, open targets, in their order. Owns them until
    ``close``.

    ``direct`` is as for ``Backing``; without it, each has O_DIRECT or not for itself. Of each, whole units of ``unit``
    bytes are used. ``disk`` says whether they are only read, whether each write is durable when it is done, and which
    blocks the device is to have. Raises UblkError; nothing is open then.
    """

    def __init__(self, sources: Sequence[Source], disk: DiskOptions, *, direct: bool | None, unit: int = 1) -> None:
        check_different(paths(sources))
        self._parts: list[Part] = []
        self.nested: list[Nested] = []
        try:
            if any(isinstance(source, Target) for source in sources):
                for source in sources:
                    self.nested.append(Nested(as_target(source, {"direct": direct}), disk, unit=unit))
            else:
                for path in paths(sources):
                    self._parts.append(Part(path, disk, direct=direct, unit=unit))
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[Leg]:
        return iter([*self._parts, *self.nested])

    def close(self) -> None:
        """Close them all."""
        for leg in self:
            leg.close()

    def add_to(self, target_map: Map) -> Places:
        """All of them, as a map has them."""
        if not self.nested:
            return Places(target_map.add_files([part.open_file for part in self._parts]), are_spaces=False)
        spaces = [leg.add_to(target_map) for leg in self.nested]
        for leg, space in zip(self.nested, spaces, strict=True):
            handlers.fill_map(leg.target, space)
        return Places(tuple(space.space for space in spaces), are_spaces=True)

    def backing(self) -> str:
        """All of them, for ``Target.backing``."""
        return ", ".join([*(str(part.path) for part in self._parts), *(leg.backing() for leg in self.nested)])

    def status(self) -> dict[str, object]:
        """What ``Target.status`` shows of them."""
        if self.nested:
            return {"parts": [leg.status() for leg in self.nested]}
        return {
            "files": [str(part.path) for part in self._parts],
            "direct_io": [int(part.backing.direct) for part in self._parts],
        }


class JoinedTarget(Target):
    """Base of the targets that have several files, block devices or targets behind them, and no requests of their own.

    They lead the lives of those.
    """

    files: tuple[Source, ...] = option(..., "-f", "--file", help=FILES_HELP, minimum=1)
    direct: bool | None = option(
        None,
        help="O_DIRECT or an error; default: O_DIRECT where a file allows it",
        off_flags=("--buffered_io", "--buffered-io"),
    )
    _legs: Legs

    @property
    def unit(self) -> int:
        """Of each leg, whole units of so many bytes are used."""
        return 1

    @abstractmethod
    def join(self, legs: Sequence[Leg]) -> Geometry:
        """The disk that these make. Raises UblkError."""

    def open(self) -> Geometry:
        self._legs = Legs(self.files, self.disk, direct=self.direct, unit=self.unit)
        try:
            return self.join(list(self._legs))
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        for leg in self._legs.nested:
            handlers.start(leg.target, self.end_device, self.tell_changed)

    def start_thread(self) -> None:
        for leg in self._legs.nested:
            handlers.start_thread(leg.target)

    def stop_thread(self) -> None:
        for leg in self._legs.nested:
            handlers.stop_thread(leg.target)

    def stop(self) -> None:
        for leg in self._legs.nested:
            handlers.stop(leg.target, was_cut=self.was_cut)

    def close(self) -> None:
        self._legs.close()

    def resync(self, *, force: bool) -> None:
        """Of all that can be brought back; UblkError if nothing can."""
        refused: list[UblkError] = []
        for leg in self._legs.nested:
            try:
                leg.target.resync(force=force)
            except UblkError as e:
                refused.append(e)
        if not self._legs.nested:
            super().resync(force=force)
        if len(refused) == len(self._legs.nested):
            raise refused[0]

    def progress(self) -> Progress | None:
        every = [found for leg in self._legs.nested if (found := leg.target.progress())]
        if not every:
            return None
        return Progress(
            total=sum(one.total for one in every),
            done=sum(one.done for one in every),
            error="; ".join(one.error for one in every if one.error),
            is_over=all(one.is_over for one in every),
        )

    def paths(self) -> list[Path]:
        return paths(self.files)

    def segments(self) -> list[int]:
        return [segment for one in self.files if isinstance(one, Target) for segment in one.segments()]

    def backing(self) -> str:
        return self._legs.backing()

    def status(self) -> dict[str, object]:
        return self._legs.status()


def geometry(legs: Sequence[Leg], size: int) -> Geometry:
    """A disk of ``size`` bytes with all of these behind it: it can do what each of them can."""
    every = [leg.geometry for leg in legs]

    def least(of: Callable[[Geometry], int]) -> int:
        return min(map(of, every))

    def most(of: Callable[[Geometry], int]) -> int:
        return max(map(of, every))

    can_discard = all(one.discard_granularity for one in every)
    return Geometry(
        size=size,
        logical_block=most(lambda one: one.logical_block),
        physical_block=most(lambda one: one.physical_block),
        io_min=most(lambda one: one.io_min),
        io_opt=most(lambda one: one.io_opt),
        read_only=any(one.read_only for one in every),
        rotational=any(one.rotational for one in every),
        write_cache=any(one.write_cache for one in every),
        discard_granularity=most(lambda one: one.discard_granularity) if can_discard else 0,
        max_discard_bytes=least(lambda one: one.max_discard_bytes),
        max_write_zeroes_bytes=least(lambda one: one.max_write_zeroes_bytes),
    )


def check_different(files: Sequence[Path]) -> None:
    """ConfigError for one that is there twice, by whatever names: each would overwrite the other."""
    seen: dict[tuple[bool, int, int], Path] = {}
    for path in files:
        try:
            found = path.stat()
        except OSError:
            continue  # opening it says more
        is_device = stat.S_ISBLK(found.st_mode)
        what = (is_device, found.st_rdev, 0) if is_device else (is_device, found.st_dev, found.st_ino)
        if what in seen:
            same = f"{path} is there twice" if seen[what] == path else f"{path} and {seen[what]} are the same"
            raise ConfigError(f"files: {same}", "name different files", ["files"])
        seen[what] = path
