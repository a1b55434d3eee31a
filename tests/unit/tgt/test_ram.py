"""Memory that holds a disk, and the target that is all of it."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest

from ublkpy.config import DeviceConfig, Draft, build, from_dump
from ublkpy.errors import ConfigError, UblkError
from ublkpy.tgt import handlers, memory
from ublkpy.tgt.base import Target
from ublkpy.tgt.disk import DiskOptions
from ublkpy.tgt.ram import RamTarget
from ublkpy.tgt.stripe import StripeTarget
from ublkpy.uring import libc
from ublkpy.uring.map import Extent, File, Memory, Routing

MIB = 1 << 20


def segments() -> set[int]:
    """Those that this machine has."""
    lines = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    return {int(line.split()[1]) for line in lines}


@pytest.fixture(autouse=True)
def no_segment_is_left() -> Iterator[None]:
    before = segments()
    yield
    assert segments() == before


def ram(size: int = MIB, *, recovery: str = "none", huge_pages: bool = False) -> RamTarget:
    target = build(Draft({"recovery": recovery}, "ram", {"size": size, "huge_pages": huge_pages})).target
    assert isinstance(target, RamTarget)
    return target


def started(target: Target) -> None:
    target.open()
    target.start()


def contents(target: RamTarget) -> memoryview:
    """The disk, as it is mapped."""
    made = handlers.make_map(target, target.size)
    (extent,) = made.extents()
    made.close()
    assert isinstance(extent.routing.read, Memory)
    return memoryview(libc.buffer(extent.routing.read.address, target.size))


def test_what_it_is() -> None:
    target = ram(MIB + 512)
    found = target.open()
    assert (found.size, found.logical_block, found.write_cache) == (MIB + 512, 512, True)
    assert found.discard_granularity == mmap.PAGESIZE
    target.start()
    made = handlers.make_map(target, found.size)
    (extent,) = made.extents()
    place = extent.routing.read
    assert isinstance(place, Memory)
    assert place.length == found.size
    assert extent == Extent(0, found.size, Routing(place, place, File(0), File(0)))
    made.close()
    assert (target.backing(), target.status()) == ("", {"huge_pages": False})
    with pytest.raises(UblkError, match="keeps its size"):
        target.resize(2 * MIB)
    target.close()


def test_without_recovery_it_goes_with_the_process() -> None:
    """From the first moment on: there is nothing to forget."""
    before = segments()
    target = ram()
    target.open()
    (segment,) = segments() - before
    assert "dest" in _status(segment) or segment not in target.segments()
    target.start()
    assert target.segments() == []
    contents(target)[:4] = b"data"
    target.close()
    assert segments() == before


def _status(segment: int) -> str:
    """As ``ipcs`` tells it: 01000 is SHM_DEST (linux/shm.h)."""
    for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]:
        _key, number, mode, *_rest = line.split()
        if int(number) == segment:
            return "dest" if int(mode, 8) & 0o1000 else ""
    return "gone"


def test_with_recovery_the_next_daemon_finds_it() -> None:
    before = segments()
    config = build(Draft({"recovery": "queue"}, "ram", {"size": MIB}))
    target = config.target
    assert isinstance(target, RamTarget)
    target.open()
    assert segments() == before  # a command that only looks leaves nothing
    target.start()
    (segment,) = segments() - before
    assert target.segments() == [segment]
    contents(target)[512:516] = b"data"
    dumped = json.loads(json.dumps(config.dump()))
    target.close()
    again = from_dump(dumped)
    assert isinstance(again, DeviceConfig)
    other = again.target
    assert isinstance(other, RamTarget)
    started(other)
    assert other.segments() == [segment]
    assert other.status()["segment"] == segment
    assert bytes(contents(other)[512:516]) == b"data"
    other.close()
    libc.shm_remove(segment)


def test_a_part_of_another_keeps_its_own() -> None:
    parts = (RamTarget({"size": MIB}), RamTarget({"size": MIB}))
    config = build(Draft({"recovery": "queue"}, "stripe", {"files": parts}))
    assert isinstance(config.target, StripeTarget)
    config.target.open()
    handlers.start(config.target, lambda: None, lambda: None)
    found = config.target.segments()
    assert len(found) == 2
    again = from_dump(json.loads(json.dumps(config.dump())))
    assert again.target.segments() == found
    config.target.close()
    for segment in found:
        libc.shm_remove(segment)


# -- what it refuses -----------------------------------------------------------------------


def test_memory_that_is_gone() -> None:
    target = ram(recovery="queue")
    started(target)
    (segment,) = target.segments()
    target.close()
    libc.shm_remove(segment)
    with pytest.raises(UblkError) as caught:
        target.open()
    assert caught.value.message.startswith(f"the memory that the disk was in, shared memory segment {segment}, is gone")
    assert caught.value.hint == "its data is lost: delete the device, and add it anew"


def test_memory_of_somebody_else() -> None:
    segment = libc.shm_create(2 * MIB)
    target = ram(recovery="queue")
    target.segment = segment
    with pytest.raises(UblkError, match="another one has its number now"):
        target.open()
    libc.shm_remove(segment)


def test_more_than_the_machine_has() -> None:
    with pytest.raises(UblkError) as caught:
        ram(1 << 50).open()
    assert caught.value.message.startswith("a disk of 1P does not fit into the memory of this machine, ")
    assert caught.value.hint == "make it smaller, or keep it in a file"


def test_more_than_is_free(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    told = tmp_path / "meminfo"
    told.write_text("MemTotal:  2048 kB\nMemAvailable:  512 kB\n")
    monkeypatch.setattr(memory, "Path", lambda _: told)
    memory.check_fits(MIB)
    assert "a disk of 1M, and 512K of memory are free" in caplog.text


@pytest.mark.parametrize("size", ["0", "511", "1000"])
def test_sizes_that_cannot_be(size: str) -> None:
    with pytest.raises(ValueError, match=r"is out of range|is not a multiple of 512"):
        RamTarget.options["size"].parse(size)


def test_no_size() -> None:
    with pytest.raises(ConfigError, match="no size given: target ram needs --size, size of the device"):
        build(Draft({}, "ram", {}))


def test_huge_pages_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_huge_page", lambda: 2 * MIB)
    with pytest.raises(ConfigError) as caught:
        ram(3 * MIB, huge_pages=True).open()
    assert caught.value.message == f"size {3 * MIB} is not a multiple of a huge page, 2M"
    assert caught.value.hint == f"the next multiple is --size {4 * MIB}"


def test_no_segments_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    target = ram(recovery="queue")
    target.open()
    monkeypatch.setattr(libc, "shm_create", none)
    with pytest.raises(UblkError) as caught:
        target.start()
    assert caught.value.message == "there is no memory for 1M: No space left on device"
    assert "/proc/sys/kernel/shmall" in caught.value.hint
    target.close()


def test_without_the_right_to_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """It works, and does not discard."""
    monkeypatch.setattr(memory, "_can_free", lambda: False)
    target = RamTarget({"size": MIB})
    target.disk = DiskOptions()
    found = target.open()
    assert (found.discard_granularity, found.max_discard_bytes, found.max_write_zeroes_bytes) == (0, 0, 0)
    target.start()
    assert len(contents(target)) == MIB
    target.close()
