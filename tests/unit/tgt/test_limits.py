"""What the disk looks like: as the target has it, changed by what was said."""

from __future__ import annotations

from ublkpy.tgt.base import Geometry
from ublkpy.tgt.disk import DiskOptions
from ublkpy.tgt.limits import settle

FOUND = Geometry(1 << 30, discard_granularity=4096, max_discard_bytes=1 << 20, max_write_zeroes_bytes=1 << 21)


def test_what_is_not_said_is_as_the_target_has_it() -> None:
    assert settle(DiskOptions(), FOUND) == FOUND


def test_read_only_disk_has_nothing_to_flush_or_discard() -> None:
    disk = settle(DiskOptions({"read_only": True}), FOUND)
    assert (disk.read_only, disk.write_cache, disk.discard_granularity) == (True, False, 0)
