"""The fault target: what it makes of its options, and what it refuses."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from ublkpy.errors import ConfigError, UblkError
from ublkpy.tgt import handlers
from ublkpy.tgt.disk import DiskOptions
from ublkpy.tgt.fault import FaultTarget
from ublkpy.tgt.options import Range
from ublkpy.uring.ffi import ffi, lib
from ublkpy.uring.map import Extent, Fault, Faulty, File, Map, Memory, Null, Routing

MIB = 1 << 20
MS = 10**6


def fault(**said: Any) -> FaultTarget:
    """With options as people write them."""
    return FaultTarget({name: FaultTarget.options[name].parse(raw) for name, raw in said.items()})


def extents(target: FaultTarget, size: int = MIB) -> list[Extent]:
    """Those of its map."""
    target.open()
    found = handlers.make_map(target, size)
    said = list(found.extents())
    found.close()
    target.close()
    return said


def numbers(routing: Routing) -> list[int | None]:
    """Those of the faults, by operation."""
    return [action.fault if isinstance(action, Faulty) else None for action in routing.actions]


def has_flush_fault(target: FaultTarget) -> bool:
    target.open()
    found = handlers.make_map(target, MIB)
    reader = ffi.new("struct um_reader *")
    lib.um_reader_add(found.c, reader, -1)
    lib.um_reader_enter(reader)
    error = lib.um_current(found.c).spaces[0].flush.error
    lib.um_reader_leave(reader)
    lib.um_reader_remove(reader)
    found.close()
    target.close()
    return bool(error)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.touch()
    os.truncate(path, MIB)
    return path


# -- what it makes -------------------------------------------------------------------------


def test_without_faults_it_is_the_file_alone(image: Path) -> None:
    assert extents(fault(file=str(image))) == [Extent(0, MIB, Routing.all(File(0)))]
    assert not has_flush_fault(fault(file=str(image)))


def test_memory() -> None:
    target = fault(size="1M", delay="1ms")
    geometry = target.open()
    assert (geometry.size, geometry.logical_block, geometry.write_cache) == (MIB, 512, True)
    target.start()
    found = handlers.make_map(target, MIB)
    (extent,) = found.extents()
    assert isinstance(extent.routing.places[0], Memory)
    assert isinstance(extent.routing.places[1], Memory)
    assert None not in numbers(extent.routing)
    found.close()
    assert (target.backing(), target.status(), target.segments()) == ("", {}, [])
    with pytest.raises(UblkError, match="keeps its size"):
        target.resize(2 * MIB)
    target.close()


def test_memory_without_a_write_cache() -> None:
    target = fault(size="1M")
    target.disk = DiskOptions({"write_cache": False})
    assert not target.open().write_cache
    target.close()


@pytest.mark.parametrize(
    ("said", "faulty"),
    [
        ({"delay": "1ms"}, "read write flush discard write_zeroes"),
        ({"delay_read": "1ms"}, "read"),
        ({"delay_write": "1ms"}, "write"),
        ({"delay": "1ms", "delay_read": 0}, "write flush discard write_zeroes"),
        ({"error_rate": "1%"}, "read write flush discard write_zeroes"),
        ({"error_rate": "1%", "ops": ["discard", "flush"]}, "flush discard"),
        ({"error_rate": "1%", "ops": ["write"], "delay_read": "1ms"}, "read write"),
        ({"error_rate": 0}, ""),
        ({"delay": "1ms", "ranges": ["0-1M"]}, "read write discard write_zeroes"),
    ],
)
def test_which_operations_meet_a_fault(image: Path, said: dict[str, Any], faulty: str) -> None:
    (extent,) = extents(fault(file=str(image), **said))
    places = dict(zip(("read", "write", "discard", "write_zeroes"), numbers(extent.routing), strict=True))
    found = {op for op, number in places.items() if number is not None}
    if has_flush_fault(fault(file=str(image), **said)):
        found.add("flush")
    assert found == set(faulty.split())


def test_ranges_are_exact(image: Path) -> None:
    found = extents(fault(file=str(image), error_rate=1, ranges=["4k+512", "512k-1M"]))
    assert [(extent.start, extent.end, numbers(extent.routing)[0] is not None) for extent in found] == [
        (0, 4096, False),
        (4096, 4608, True),
        (4608, MIB // 2, False),
        (MIB // 2, MIB, True),
    ]
    assert all(extent.offset == extent.start for extent in found)


def test_what_a_fault_is(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Fault] = []

    def add_fault(_: Map, fault: Fault) -> int:
        made.append(fault)
        return 0

    monkeypatch.setattr(Map, "add_fault", add_fault)
    target = fault(
        file=str(image),
        delay_write="1.5ms",
        distribution="uniform",
        error_rate="5%",
        errno="ENOSPC",
        ops=["write"],
        while_file=str(tmp_path / "on"),
        seed=7,
    )
    target.open()
    with pytest.raises(UblkError, match=r"failed in map\(\)"):
        handlers.make_map(target, MIB)
    target.close()
    (one,) = made
    assert (one.delay, one.distribution, one.error_rate, one.errno) == (1500000, "uniform", 0.05, errno.ENOSPC)
    assert (one.while_file, one.seed) == (tmp_path / "on", 7)
    assert set(target.paths()) == {image, tmp_path / "on"}


def test_size_follows(image: Path) -> None:
    target = fault(file=str(image), error_rate=1, ranges=["0-4k"])
    target.open()
    handlers.make_map(target, MIB).close()
    target.resize(2 * MIB)
    assert image.stat().st_size == 2 * MIB
    target.resize(MIB)
    assert image.stat().st_size == MIB
    with pytest.raises(UblkError, match="range 0-4096 ends behind the new end of the device, or moves with it"):
        target.resize(2048)
    target.close()


def test_a_range_at_the_end_keeps_the_size(image: Path) -> None:
    target = fault(file=str(image), error_rate=1, ranges=["1020k-1M"])
    target.open()
    with pytest.raises(UblkError, match="range 1044480-1048576 ends behind the new end"):
        target.resize(2 * MIB)
    target.close()


# -- what it refuses -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "message", "hint"),
    [
        ({}, "neither a file nor a size is given", "name a file with --file FILE, or take memory with --size SIZE"),
        ({"file": "x", "size": "1M"}, "a file has its own size, and size is for memory", "leave one of the two out"),
        ({"size": "1M", "distribution": "uniform"}, "distribution: nothing is late", "say delay, such as 10ms, too"),
        (
            {"size": "1M", "distribution": "uniform", "delay": 0, "error_rate": 1},
            "distribution: nothing is late",
            "say delay, such as 10ms, too",
        ),
        ({"size": "1M", "errno": "EIO"}, "errno: nothing fails", "say error_rate, such as 1%, too"),
        (
            {"size": "1M", "errno": "EIO", "ops": ["read"], "delay": "1s"},
            "errno and ops: nothing fails",
            "say error_rate, such as 1%, too",
        ),
        (
            {"size": "1M", "ranges": ["0-4k"], "while_file": "/tmp/on"},
            "ranges and while_file: nothing is late, and nothing fails",
            "say delay or error_rate, too",
        ),
        (
            {"size": "1M", "error_rate": 1, "ops": ["read", "flush"], "ranges": ["0-4k"]},
            "ops and ranges: a flush is about the whole disk, and in no range",
            "leave flush out, or ranges",
        ),
        (
            {"size": "1M", "delay": "1s", "ranges": ["0-8k", "4k-12k"]},
            "ranges 0-8192 and 4096-12288 overlap",
            "make one of them",
        ),
    ],
)
def test_words_that_do_not_go_together(said: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fault(**said).open()
    assert (caught.value.message, caught.value.hint) == (message, hint)


@pytest.mark.parametrize(
    ("said", "block", "message"),
    [
        ({"ranges": ["0-2M"]}, None, "range 0-2097152 is not within the device, which has 1M"),
        ({"ranges": ["1M+512"]}, None, "range 1048576-1049088 is not within the device, which has 1M"),
        ({"ranges": ["0-1000"]}, None, "range 0-1000 does not begin and end with a block of the device, 512 bytes"),
        ({"ranges": ["100-512"]}, None, "range 100-512 does not begin and end with a block of the device, 512 bytes"),
        ({"ranges": ["0-512"]}, 4096, "range 0-512 does not begin and end with a block of the device, 4096 bytes"),
        ({"while_file": "/nowhere/on"}, None, "there is no folder /nowhere for while_file"),
    ],
)
def test_what_this_device_has_not(said: dict[str, Any], block: int | None, message: str) -> None:
    target = fault(size="1M", delay="1ms", **said)
    target.disk = DiskOptions({"logical_block_size": block})
    with pytest.raises(UblkError) as caught:
        target.open()
    assert caught.value.message == message


def test_what_is_refused_keeps_no_file_open(image: Path) -> None:
    with pytest.raises(UblkError, match="is not within the device"):
        fault(file=str(image), delay="1ms", ranges=["0-2M"]).open()
    target = fault(file=str(image))  # it is locked while it is open
    target.open()
    target.close()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UblkError, match="does not exist") as caught:
        fault(file=str(tmp_path / "image"), delay="1ms").open()
    assert caught.value.hint == f"make one with: truncate -s 1G {tmp_path / 'image'}"


def test_more_memory_than_there_is() -> None:
    with pytest.raises(UblkError, match="a disk of 7E does not fit into the memory of this machine"):
        fault(size="7E").open()


@pytest.mark.parametrize(
    ("name", "raw", "why"),
    [
        ("delay", "3601s", "3601s is out of range: 3600s or less"),
        ("delay_read", "2h", "is not a time"),
        ("error_rate", "101%", "is not a share"),
        ("error_rate", 1.5, "is not a share"),
        ("errno", "ENOSPACE", "did you mean ENOSPC"),
        ("distribution", "normal", "is not one of: constant, uniform, exponential"),
        ("ops", ["trim"], "is not one of: read, write, flush, discard, write_zeroes"),
        ("ops", [], "have to be 1 or more"),
        ("ops", "read", "is not a list"),
        ("ranges", [], "have to be 1 or more"),
        ("ranges", ["1M-1M"], "has no bytes in it"),
        ("seed", -1, "out of range: 0 to 18446744073709551615"),
    ],
)
def test_values_that_mean_nothing(name: str, raw: object, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        FaultTarget.options[name].parse(raw)


def test_a_configuration_is_kept_as_it_was_said(image: Path) -> None:
    target = fault(file=str(image), delay="2ms", ranges=["0-4k"], errno="ENOSPC", error_rate="10%", ops=["read"])
    dumped = target.dump()
    again = FaultTarget({name: FaultTarget.options[name].load(raw) for name, raw in dumped.items()})
    assert vars(again) == vars(target)
    assert again.ranges == (Range(0, 4096),)
    assert Null() not in extents(again)[0].routing.places
