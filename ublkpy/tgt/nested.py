"""A target as a part of another: where one takes files, in YAML a whole target may stand.

A part has its own space in the map of the device, and what that leaves to Python
is answered by the part itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ublkpy.errors import UblkError
from ublkpy.tgt import handlers, load, options
from ublkpy.tgt.base import Geometry, Target
from ublkpy.tgt.disk import DiskOptions
from ublkpy.tgt.handlers import Way
from ublkpy.uring.map import Map

Source = Path | Target
"""What an option of this type is: the path of a file or block device, or a target."""


class Nested:
    """An open target that is a part of another, which runs its life. ``disk`` is what was said of the device.

    Raises UblkError, also for one that cannot be a part; nothing is open then.
    """

    def __init__(self, target: Target, disk: DiskOptions, *, unit: int = 1) -> None:
        self.target = target
        target.disk = disk
        found = handlers.open_target(target)
        try:
            self.geometry: Geometry = handlers.fit(target, found)
            self._check()
        except BaseException:
            target.close()
            raise
        self.size = self.geometry.size - self.geometry.size % unit
        """Its bytes in whole units."""

    def add_to(self, target_map: Map) -> Map:
        """Its space of that map, empty yet."""
        return target_map.add_space(self.geometry.size, self.target.upcall)

    @property
    def name(self) -> str:
        """For messages."""
        return self.backing()

    def how_to_fit(self, size: int) -> str:
        """How it gets so many bytes."""
        return f"give target {self.target.name} {size} bytes"

    def backing(self) -> str:
        """For ``Target.backing``."""
        behind = handlers.backing(self.target)
        return f"{self.target.name}({behind})" if behind else self.target.name

    def status(self) -> dict[str, object]:
        """For ``Target.status``."""
        return {"name": self.target.name, **handlers.status(self.target)}

    def close(self) -> None:
        """``Target.close``."""
        self.target.close()

    def _check(self) -> None:
        name = self.target.name
        if handlers.way(self.target) is not Way.RAW:
            raise UblkError(
                f"target {name} answers requests by its methods, and a part of another target has to have a map",
                "serve it as a device of its own, and name that device",
            )
        if self.geometry.zones or self.geometry.integrity:
            what = "zones" if self.geometry.zones else "metadata"
            raise UblkError(f"target {name} has {what}, and a part of another target cannot", "choose another one")


def paths(sources: Sequence[Source]) -> list[Path]:
    """All files that these name."""
    return [path for one in sources for path in (one.paths() if isinstance(one, Target) else [one])]


def as_target(source: Source, values: Mapping[str, Any]) -> Target:
    """A file is a loop target, with these options."""
    if isinstance(source, Target):
        return source
    return load.find("loop")({"file": source, **values})


def _parse(raw: object) -> Source:
    return raw if isinstance(raw, Target) else options.parse_path(raw)


def _dump(source: Source) -> object:
    return load.dump(source) if isinstance(source, Target) else str(source)


def _load(raw: object) -> Source:
    return load.from_dump(raw) if isinstance(raw, dict) else options.parse_path(raw)


options.KINDS[Source] = options.Kind("PATH", _parse, _dump, load=_load, is_path=True, is_target=True)
