"""Several files or block devices behind one target: opening them, and what they can do together."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

from ublkpy.errors import ConfigError
from ublkpy.tgt.backing import Backing, Limits
from ublkpy.tgt.base import Geometry
from ublkpy.tgt.disk import DiskOptions
from ublkpy.uring.map import Map


class Legs:
    """Open files and block devices, in their order. Owns them until ``close``.

    ``direct`` is as for ``Backing``; without it, each has O_DIRECT or not for itself. Of each, whole units of ``unit``
    bytes are used. ``disk`` says whether they are only read, whether each write is durable when it is done, and which
    blocks the device is to have. Raises UblkError; nothing is open then.
    """

    sizes: list[int]
    """How many bytes of each are used."""

    def __init__(self, paths: Sequence[Path], disk: DiskOptions, *, direct: bool | None, unit: int = 1) -> None:
        _check_different(paths)
        self.paths = paths
        self.backings: list[Backing] = []
        self.sizes = []
        self._limits: list[Limits] = []
        self._disk = disk
        try:
            for path in paths:
                self._open(path, direct, unit)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close them all."""
        for backing in self.backings:
            backing.close()

    @property
    def block(self) -> int:
        """The bytes of a block that suits all of them."""
        return max(
            limits.direct_block if backing.direct else limits.logical_block
            for backing, limits in zip(self.backings, self._limits, strict=True)
        )

    def geometry(self, size: int) -> Geometry:
        """A disk of ``size`` bytes that all of them are behind: it can do what each of them can."""
        every = self._limits
        discards = all(limits.discard_granularity for limits in every)
        return Geometry(
            size=size,
            logical_block=self.block,
            physical_block=max(limits.physical_block for limits in every),
            io_min=max(limits.io_min for limits in every),
            io_opt=max(limits.io_opt for limits in every),
            rotational=any(limits.rotational for limits in every),
            write_cache=not self._durable,
            discard_granularity=max(limits.discard_granularity for limits in every) if discards else 0,
            max_discard_bytes=min(limits.max_discard_bytes for limits in every),
            # Of fallocate() nobody promises that it is durable when it is done.
            max_write_zeroes_bytes=0 if self._durable else min(limits.max_write_zeroes_bytes for limits in every),
        )

    def add_to(self, target_map: Map) -> tuple[int, ...]:
        """Their numbers as files of a map, one after the other."""
        return tuple(
            target_map.add_file(backing.fd, is_block_device=backing.is_block_device, in_memory=backing.in_memory)
            for backing in self.backings
        )

    def backing(self) -> str:
        """All of them, for ``Target.backing``."""
        return ", ".join(map(str, self.paths))

    def status(self) -> dict[str, object]:
        """What ``Target.status`` shows of them."""
        return {
            "files": [str(path) for path in self.paths],
            "direct_io": [int(backing.direct) for backing in self.backings],
        }

    @property
    def _durable(self) -> bool:
        return self._disk.write_cache is False  # nobody asks for a flush then

    def _open(self, path: Path, direct: bool | None, unit: int) -> None:
        backing = Backing(path, read_only=self._disk.read_only, direct=direct, durable=self._durable)
        self.backings.append(backing)
        backing.check_content()
        size = backing.end - backing.end % unit
        limits = backing.limits()
        backing.settle_direct(limits, self._disk.logical_block_size, size, demanded=direct is True)
        backing.check_space()
        self.sizes.append(size)
        self._limits.append(limits)


def _check_different(paths: Sequence[Path]) -> None:
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
