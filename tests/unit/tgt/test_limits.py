"""What the disk looks like: as the target has it, changed by what was said."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ublkpy.errors import ConfigError, ExitCode, UblkError
from ublkpy.tgt.base import Geometry
from ublkpy.tgt.disk import DiskOptions
from ublkpy.tgt.limits import check, settle

MIB = 1 << 20
FOUND = Geometry(1 << 30, discard_granularity=4096, max_discard_bytes=MIB, max_write_zeroes_bytes=2 * MIB)
SPINNING = replace(FOUND, rotational=True)
SMALL = replace(FOUND, physical_block=512, io_min=512, io_opt=512, discard_granularity=512)
NO_DISCARD = replace(FOUND, discard_granularity=0)
NO_CACHE = replace(FOUND, write_cache=False)


def refused(found: Geometry, **said: object) -> UblkError:
    """The error of this machine that it ends in."""
    with pytest.raises(UblkError) as caught:
        settle(DiskOptions(said), found)
    assert (caught.value.exit_code, caught.value.hint != "") == (ExitCode.FAILED, True)
    return caught.value


def test_what_is_not_said_is_as_the_target_has_it() -> None:
    assert settle(DiskOptions(), FOUND) == FOUND
    assert settle(DiskOptions(), SPINNING) == SPINNING


def test_read_only_disk_has_nothing_to_flush_or_discard() -> None:
    disk = settle(DiskOptions({"read_only": True}), FOUND)
    assert (disk.read_only, disk.write_cache, disk.discard_granularity) == (True, False, 0)


@pytest.mark.parametrize("found", [FOUND, SPINNING])
@pytest.mark.parametrize("rotational", [True, False])
def test_rotational(found: Geometry, rotational: bool) -> None:
    assert settle(DiskOptions({"rotational": rotational}), found) == replace(FOUND, rotational=rotational)


# -- block sizes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "sizes"),
    [
        ({}, (512, 512, 512, 512)),
        ({"logical_block_size": 4096}, (4096, 4096, 4096, 4096)),
        ({"logical_block_size": 512}, (512, 512, 512, 512)),
        ({"physical_block_size": 2048}, (512, 2048, 2048, 2048)),
        ({"io_min": 8192}, (512, 512, 8192, 8192)),
        ({"io_opt": MIB}, (512, 512, 512, MIB)),
        ({"logical_block_size": 1024, "io_opt": 4096}, (1024, 1024, 1024, 4096)),
        ({"physical_block_size": 4096, "io_min": 65536, "io_opt": MIB}, (512, 4096, 65536, MIB)),
    ],
    ids=str,
)
def test_sizes_that_are_not_said_follow_those_before(said: dict[str, int], sizes: tuple[int, ...]) -> None:
    disk = settle(DiskOptions(said), SMALL)
    assert (disk.logical_block, disk.physical_block, disk.io_min, disk.io_opt) == sizes


def test_sizes_can_be_less_than_the_targets_where_all_behind_are_said() -> None:
    disk = settle(DiskOptions({"physical_block_size": 512, "io_min": 512, "io_opt": 1024}), FOUND)
    assert (disk.physical_block, disk.io_min, disk.io_opt) == (512, 512, 1024)


@pytest.mark.parametrize(
    ("said", "found", "message"),
    [
        ({"io_min": 512}, FOUND, "io_min 512 is less than physical_block_size 4096"),
        ({"io_opt": 2048}, FOUND, "io_opt 2048 is less than physical_block_size 4096"),
        (
            {"logical_block_size": 2048},
            replace(FOUND, logical_block=4096),
            "logical_block_size 2048 is less than the 4096 bytes of the blocks behind it",
        ),
        (
            {"logical_block_size": 4096},
            replace(FOUND, size=MIB + 512),
            f"the size 1.00M ({MIB + 512} bytes) is not a multiple of logical_block_size 4096",
        ),
    ],
)
def test_sizes_that_the_target_cannot_have(said: dict[str, object], found: Geometry, message: str) -> None:
    assert refused(found, **said).message == message


# -- the cache -----------------------------------------------------------------------------


def test_cache_is_as_the_target_can() -> None:
    assert settle(DiskOptions({"write_cache": True}), FOUND) == FOUND
    assert settle(DiskOptions({"write_cache": False}), NO_CACHE) == NO_CACHE
    assert "cannot make each write durable" in refused(FOUND, write_cache=False).message
    assert "nothing is written" in refused(NO_CACHE, write_cache=True).message


def test_read_only_disk_needs_no_cache() -> None:
    assert not settle(DiskOptions({"write_cache": False, "read_only": True}), FOUND).write_cache


# -- discard -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "limits"),
    [
        ({}, (4096, MIB, 2 * MIB)),
        ({"max_discard_bytes": 65536}, (4096, 65536, 2 * MIB)),
        ({"max_discard_bytes": 4096}, (4096, 4096, 2 * MIB)),
        ({"max_discard_bytes": 0}, (4096, 0, 2 * MIB)),
        ({"max_write_zeroes_bytes": 512}, (4096, MIB, 512)),
        ({"max_discard_bytes": 0, "max_write_zeroes_bytes": 0}, (0, 0, 0)),
        ({"discard_granularity": 65536}, (65536, MIB, 2 * MIB)),
        ({"physical_block_size": 65536}, (65536, MIB, 2 * MIB)),
        ({"physical_block_size": 65536, "discard_granularity": 131072}, (131072, MIB, 2 * MIB)),
    ],
    ids=str,
)
def test_discard(said: dict[str, int], limits: tuple[int, ...]) -> None:
    disk = settle(DiskOptions(said), FOUND)
    assert (disk.discard_granularity, disk.max_discard_bytes, disk.max_write_zeroes_bytes) == limits


def test_what_the_target_can_is_cut_to_whole_blocks() -> None:
    found = replace(FOUND, max_discard_bytes=2**32 - 512, max_write_zeroes_bytes=2**32 - 512)
    disk = settle(DiskOptions({"logical_block_size": 4096}), found)
    assert disk.max_discard_bytes == disk.max_write_zeroes_bytes == 2**32 - 4096


@pytest.mark.parametrize(
    ("said", "found", "message"),
    [
        ({"max_discard_bytes": 4096}, NO_DISCARD, "max_discard_bytes: this disk can neither discard nor write zeroes"),
        ({"discard_granularity": 4096}, NO_DISCARD, "discard_granularity: this disk can neither"),
        ({"max_write_zeroes_bytes": 4096}, NO_DISCARD, "max_write_zeroes_bytes: this disk can neither"),
        ({"max_discard_bytes": 2 * MIB}, FOUND, f"max_discard_bytes {2 * MIB} is more than this disk can do"),
        ({"max_write_zeroes_bytes": 4 * MIB}, FOUND, f"max_write_zeroes_bytes {4 * MIB} is more than this disk can do"),
        ({"discard_granularity": 512}, FOUND, "discard_granularity 512 is not a multiple of 4096"),
        ({"discard_granularity": 2 * MIB}, FOUND, f"max_discard_bytes {MIB} is less than discard_granularity"),
        ({"physical_block_size": 2 * MIB}, FOUND, f"max_discard_bytes {MIB} is less than discard_granularity"),
    ],
)
def test_discard_that_the_target_cannot(said: dict[str, object], found: Geometry, message: str) -> None:
    assert refused(found, **said).message.startswith(message)


def test_nothing_of_zero_bytes_needs_a_disk_that_discards() -> None:
    assert settle(DiskOptions({"max_discard_bytes": 0, "max_write_zeroes_bytes": 0}), NO_DISCARD) == NO_DISCARD


def test_odd_limits_of_a_backing_are_its_own() -> None:
    odd = replace(FOUND, discard_granularity=2 * MIB)
    assert settle(DiskOptions(), odd) == odd


# -- what no target could do ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "keys"),
    [
        ({"logical_block_size": 4096, "physical_block_size": 512}, ["physical_block_size", "logical_block_size"]),
        ({"logical_block_size": 4096, "io_opt": 512}, ["io_opt", "logical_block_size"]),
        ({"physical_block_size": 8192, "io_min": 4096}, ["io_min", "physical_block_size"]),
        ({"io_min": 8192, "io_opt": 4096}, ["io_opt", "io_min"]),
        ({"write_cache": True, "read_only": True}, ["write_cache", "read_only"]),
        ({"max_discard_bytes": 4096, "read_only": True}, ["max_discard_bytes", "read_only"]),
        ({"max_discard_bytes": 2**32}, ["max_discard_bytes"]),
        ({"max_discard_bytes": 512, "logical_block_size": 4096}, ["max_discard_bytes", "logical_block_size"]),
        ({"max_write_zeroes_bytes": 512, "logical_block_size": 4096}, ["max_write_zeroes_bytes", "logical_block_size"]),
        (
            {"max_discard_bytes": 4096, "discard_granularity": 8192},
            ["max_discard_bytes", "discard_granularity", "physical_block_size"],
        ),
        (
            {"physical_block_size": 8192, "discard_granularity": 4096},
            ["discard_granularity", "physical_block_size"],
        ),
    ],
    ids=str,
)
def test_what_contradicts_itself(said: dict[str, object], keys: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check(DiskOptions(said), None)
    assert caught.value.keys == keys
    assert caught.value.hint


def test_size_that_is_said_with_the_block() -> None:
    check(DiskOptions({"logical_block_size": 512}), MIB + 512)
    check(DiskOptions(), MIB + 512)
    with pytest.raises(ConfigError, match="is not a multiple of logical_block_size 4096") as caught:
        check(DiskOptions({"logical_block_size": 4096}), MIB + 512)
    assert caught.value.keys == ["logical_block_size", "size"]
    assert caught.value.hint == f"{MIB}B and {MIB + 4096}B are"


def test_what_another_target_could_do() -> None:
    check(DiskOptions({"write_cache": False}), None)
    check(DiskOptions({"write_cache": False, "read_only": True}), None)
    check(DiskOptions({"discard_granularity": 512, "max_discard_bytes": 2**32 - 512}), None)


POWERS = st.none() | st.integers(9, 28).map(lambda shift: 1 << shift)


@given(
    said=st.fixed_dictionaries(
        {
            "logical_block_size": st.none() | st.sampled_from([512, 1024, 2048, 4096]),
            "physical_block_size": POWERS,
            "io_min": POWERS,
            "io_opt": POWERS,
            "discard_granularity": POWERS,
            "max_discard_bytes": st.none() | st.integers(0, 1 << 15).map(lambda n: n * 512),
            "max_write_zeroes_bytes": st.none() | st.integers(0, 1 << 15).map(lambda n: n * 512),
            "read_only": st.booleans(),
        }
    )
)
def test_whatever_is_said_gives_a_disk_that_the_kernel_takes_or_an_error(said: dict[str, object]) -> None:
    try:
        disk = settle(DiskOptions(said), SMALL)
    except UblkError:
        return
    assert disk.logical_block <= disk.physical_block <= disk.io_min <= disk.io_opt
    assert disk.size % disk.logical_block == 0
    if disk.discard_granularity:
        assert disk.discard_granularity % disk.physical_block == 0
        assert disk.max_discard_bytes == 0 or disk.max_discard_bytes >= disk.discard_granularity
        assert disk.max_discard_bytes % disk.logical_block == disk.max_write_zeroes_bytes % disk.logical_block == 0
    for name, value in said.items():
        if value is not None and name in ("logical_block_size", "physical_block_size"):
            assert getattr(disk, name.removesuffix("_size")) == value
