"""What the disk looks like in the end: as the target has it, changed by what was said."""

from __future__ import annotations

from dataclasses import replace

from ublkpy.tgt.base import Geometry
from ublkpy.tgt.disk import DiskOptions


def settle(said: DiskOptions, found: Geometry) -> Geometry:
    """The disk of a target that found ``found`` when it opened."""
    if said.read_only:
        return replace(found, read_only=True, write_cache=False, discard_granularity=0)
    return found
