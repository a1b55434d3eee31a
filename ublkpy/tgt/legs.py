"""Several files or block devices behind one target: opening them, and what they can do together."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ublkpy.errors import ConfigError
from ublkpy.tgt.backing import Backing, Limits
from ublkpy.tgt.base import Geometry
from ublkpy.tgt.disk import DiskOptions
from ublkpy.uring.map import Map


@dataclass(frozen=True)
class Leg:
    """One that is open. Owns its file until ``close``."""

    path: Path
    backing: Backing
    limits: Limits
    size: int
    """The bytes of it that are used."""

    @classmethod
    def open(cls, path: Path, disk: DiskOptions, *, direct: bool | None, unit: int = 1) -> Leg:
        """As ``Legs`` opens each."""
        backing = Backing(path, read_only=disk.read_only, direct=direct, durable=is_durable(disk))
        try:
            backing.check_content()
            size = backing.end - backing.end % unit
            limits = backing.limits()
            backing.settle_direct(limits, disk.logical_block_size, size, demanded=direct is True)
            backing.check_space()
        except BaseException:
            backing.close()
            raise
        return cls(path, backing, limits, size)

    @property
    def block(self) -> int:
        """The smallest unit, in bytes, in which it is read and written."""
        return self.limits.direct_block if self.backing.direct else self.limits.logical_block

    def add_to(self, target_map: Map) -> int:
        """Its number as a file of a map."""
        backing = self.backing
        return target_map.add_file(backing.fd, is_block_device=backing.is_block_device, in_memory=backing.in_memory)

    def is_current(self) -> bool:
        """Whether that file is still what the path leads to, and can be read."""
        try:
            now, opened = self.path.stat(), os.fstat(self.backing.fd)
            with mmap.mmap(-1, 4096) as buffer, memoryview(buffer) as view:
                os.preadv(self.backing.fd, [view], 0)
        except OSError:
            return False
        return (now.st_dev, now.st_ino, now.st_rdev) == (opened.st_dev, opened.st_ino, opened.st_rdev)

    def close(self) -> None:
        """Let go of the file."""
        self.backing.close()


class Legs:
    """Open files and block devices, in their order. Owns them until ``close``.

    ``direct`` is as for ``Backing``; without it, each has O_DIRECT or not for itself. Of each, whole units of ``unit``
    bytes are used. ``disk`` says whether they are only read, whether each write is durable when it is done, and which
    blocks the device is to have. Raises UblkError; nothing is open then.
    """

    def __init__(self, paths: Sequence[Path], disk: DiskOptions, *, direct: bool | None, unit: int = 1) -> None:
        check_different(paths)
        self._legs: list[Leg] = []
        self._disk = disk
        try:
            for path in paths:
                self._legs.append(Leg.open(path, disk, direct=direct, unit=unit))
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[Leg]:
        return iter(self._legs)

    def close(self) -> None:
        """Close them all."""
        for leg in self._legs:
            leg.close()

    def geometry(self, size: int) -> Geometry:
        """A disk of ``size`` bytes that they are behind."""
        return geometry(self._legs, self._disk, size)

    def add_to(self, target_map: Map) -> tuple[int, ...]:
        """Their numbers as files of a map, one after the other."""
        return tuple(leg.add_to(target_map) for leg in self._legs)

    def backing(self) -> str:
        """All of them, for ``Target.backing``."""
        return ", ".join(str(leg.path) for leg in self._legs)

    def status(self) -> dict[str, object]:
        """What ``Target.status`` shows of them."""
        return {
            "files": [str(leg.path) for leg in self._legs],
            "direct_io": [int(leg.backing.direct) for leg in self._legs],
        }


def is_durable(disk: DiskOptions) -> bool:
    """Whether each write has to be durable when it is done: nobody asks for a flush then."""
    return disk.write_cache is False


def geometry(legs: Sequence[Leg], disk: DiskOptions, size: int) -> Geometry:
    """A disk of ``size`` bytes with all of these behind it: it can do what each of them can."""
    every = [leg.limits for leg in legs]
    discards = all(limits.discard_granularity for limits in every)
    durable = is_durable(disk)
    return Geometry(
        size=size,
        logical_block=max(leg.block for leg in legs),
        physical_block=max(limits.physical_block for limits in every),
        io_min=max(limits.io_min for limits in every),
        io_opt=max(limits.io_opt for limits in every),
        rotational=any(limits.rotational for limits in every),
        write_cache=not durable,
        discard_granularity=max(limits.discard_granularity for limits in every) if discards else 0,
        max_discard_bytes=min(limits.max_discard_bytes for limits in every),
        # Of fallocate() nobody promises that it is durable when it is done.
        max_write_zeroes_bytes=0 if durable else min(limits.max_write_zeroes_bytes for limits in every),
    )


def check_different(paths: Sequence[Path]) -> None:
    """ConfigError for one that is there twice, by whatever names: each would overwrite the other."""
    seen: dict[tuple[bool, int, int], Path] = {}
    for path in paths:
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
