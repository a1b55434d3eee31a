"""The null target."""

from __future__ import annotations

import pytest

from ublkpy.tgt import handlers
from ublkpy.tgt.disk import DiskOptions
from ublkpy.tgt.null import NullTarget
from ublkpy.uring.map import Extent, Null, Routing


def test_default_size_is_ublksrvs() -> None:
    assert NullTarget().open().size == 250 << 30


def test_geometry() -> None:
    geometry = NullTarget({"size": 1 << 20}).open()
    assert (geometry.size, geometry.logical_block, geometry.physical_block) == (1 << 20, 512, 4096)
    assert geometry.write_cache
    assert not geometry.read_only
    assert geometry.discard_granularity == 4096
    assert geometry.max_discard_bytes == geometry.max_write_zeroes_bytes == 2**32 - 512


@pytest.mark.parametrize("raw", ["1", "1000", "511", 0])
def test_size_is_whole_sectors(raw: object) -> None:
    with pytest.raises(ValueError, match=r"multiple of 512|out of range"):
        NullTarget.options["size"].parse(raw)


def test_what_is_forgotten_needs_no_cache() -> None:
    target = NullTarget()
    target.disk = DiskOptions({"write_cache": False})
    assert not target.open().write_cache


def test_metadata_is_that_of_larger_blocks_if_those_are_said() -> None:
    target = NullTarget({"metadata_size": 8})
    target.disk = DiskOptions({"logical_block_size": 4096})
    integrity = target.open().integrity
    target_map = handlers.make_map(target, 1 << 20)
    assert integrity
    assert target_map.metadata
    assert integrity.interval == target_map.metadata.integrity.interval == 4096
    target_map.close()


def test_map_and_status() -> None:
    target = NullTarget()
    target_map = handlers.make_map(target, target.open().size)
    assert list(target_map.extents()) == [Extent(0, 250 << 30, Routing.all(Null()))]
    target_map.close()
    assert (target.backing(), target.status()) == ("", {})
    target.close()
