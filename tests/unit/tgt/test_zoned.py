"""The zoned target without a driver: its disk in a folder and in memory, and what it refuses to open."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import re
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ublkpy import io
from ublkpy.config import DeviceConfig, DeviceOptions
from ublkpy.errors import BusyError, ConfigError, ExitCode, UblkError
from ublkpy.tgt import backing, handlers, zone_table
from ublkpy.tgt.base import Geometry
from ublkpy.tgt.zoned import ZonedTarget
from ublkpy.uring.map import Error, Extent, File, Null, Routing, Upcall, Zero
from ublkpy.uring.zones import Zone, ZoneCond, Zones

ZONE, BLOCK = 64 << 10, 4096
SIZE = 8 * ZONE


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for those who hold a file: here they hold it until they are told."""
    monkeypatch.setattr(backing, "_RELEASE", 0.0)


@pytest.fixture
def another_boot(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Has the machine begin anew."""
    return lambda: monkeypatch.setattr(zone_table, "boot_id", lambda: b"another")


def opened(folder: Path | None = None, **values: Any) -> tuple[ZonedTarget, Geometry]:
    device: dict[str, Any] = {name: values.pop(name) for name in ("read_only", "recovery") if name in values}
    where = {"folder": folder} if folder else {}
    target = ZonedTarget(where | values)
    return target, DeviceConfig(DeviceOptions(device), target).open()


class Disk:
    """A target that has begun."""

    def __init__(self, target: ZonedTarget, size: int) -> None:
        self.target = target
        target.start()
        self.map = handlers.make_map(target, size)

    def write(self, offset: int, data: bytes) -> None:
        asyncio.run(self.target.write(offset, aligned(data)))

    def append(self, offset: int, data: bytes) -> int:
        return asyncio.run(self.target.zone_append(offset, aligned(data)))

    def do(self, later: Coroutine[Any, Any, None]) -> None:
        asyncio.run(later)

    def read(self, offset: int, length: int) -> bytes:
        """As the map says."""
        (extent,) = self.map.extents(offset, offset + length)
        if isinstance(extent.routing.read, Zero):
            return bytes(length)
        assert isinstance(extent.routing.read, File)
        with Path(f"/proc/self/fd/{self.target._files.data}").open("rb") as file:
            return os.pread(file.fileno(), length, extent.offset)

    def put(self, offset: int, data: bytes) -> None:
        """Behind its back."""
        with Path(f"/proc/self/fd/{self.target._files.data}").open("r+b") as file:
            os.pwrite(file.fileno(), data, offset)

    def conds(self, *zones: int) -> list[ZoneCond]:
        return [zone.cond for zone in self.report() if zone.start // ZONE in zones]

    def report(self) -> list[Zone]:
        return list(self.target.report_zones(0, SIZE // ZONE))

    def die(self) -> None:
        """As by SIGKILL."""
        self.map.close()
        self.target.close()

    def end(self) -> None:
        self.map.close()
        self.target.stop()
        self.target.close()


def aligned(data: bytes) -> memoryview:
    """Memory that O_DIRECT takes."""
    view = memoryview(mmap.mmap(-1, len(data)))
    view[:] = data
    return view


def begun(folder: Path | None = None, **values: Any) -> Disk:
    target, geometry = opened(folder, **values)
    return Disk(target, geometry.size)


@contextmanager
def serving(folder: Path | None = None, **values: Any) -> Iterator[Disk]:
    disk = begun(folder, **{"size": SIZE, "zone_size": ZONE} | values)
    try:
        yield disk
    finally:
        disk.end()


@pytest.fixture(params=["folder", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "disk" if request.param == "folder" else None


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a disk of 8 zones, in two of which is something."""
    with serving(tmp_path / "disk") as disk:
        disk.write(0, b"a" * BLOCK)
        disk.write(ZONE, b"b" * ZONE)
    return tmp_path / "disk"


# -- the disk ------------------------------------------------------------------------------


def test_what_the_disk_looks_like(folder: Path | None) -> None:
    target, geometry = opened(folder, size=SIZE, zone_size=ZONE, max_open=2, max_active=4)
    assert geometry == Geometry(
        SIZE, logical_block=BLOCK, write_cache=folder is not None, zones=Zones(ZONE, max_open=2, max_active=4)
    )
    assert target.backing() == (str(folder) if folder else "")
    assert target.status()["zones"] == 8
    assert ("folder" in target.status()) == (folder is not None)
    target.close()


def test_zones_are_64m_unless_something_else_is_said() -> None:
    target, geometry = opened(size=1 << 30)
    assert geometry.zones == Zones(64 << 20)
    target.close()


def test_conventional_zones_are_files_and_the_others_are_read_as_files(folder: Path | None) -> None:
    with serving(folder, conv_zones=2) as disk:
        file, error = File(0), Error(errno.EOPNOTSUPP)
        assert list(disk.map.extents()) == [
            Extent(0, 2 * ZONE, Routing.all(file)),
            Extent(2 * ZONE, 6 * ZONE, Routing(file, Upcall(), Null(), error), 2 * ZONE),
        ]
    target, geometry = opened(folder, size=SIZE, zone_size=ZONE, conv_zones=2)
    assert geometry.discard_granularity == BLOCK
    target.close()


def test_what_is_written_is_read_and_nothing_is_behind_it(folder: Path | None) -> None:
    with serving(folder) as disk:
        disk.write(ZONE, b"a" * BLOCK)
        assert disk.append(ZONE, b"b" * 2 * BLOCK) == ZONE + BLOCK
        assert disk.read(ZONE, 4 * BLOCK) == b"a" * BLOCK + b"b" * 2 * BLOCK + bytes(BLOCK)
        with pytest.raises(OSError, match="zone 1 is written at 0, but its write pointer is at 12288"):
            disk.write(ZONE, b"c" * BLOCK)
        assert disk.report()[1].wp == ZONE + 3 * BLOCK


def test_what_is_done_with_zones(folder: Path | None) -> None:
    with serving(folder) as disk:
        disk.target.zone_open(ZONE)
        disk.target.zone_open(2 * ZONE)
        disk.write(2 * ZONE, b"a" * ZONE)
        disk.write(3 * ZONE, b"a" * BLOCK)
        disk.target.zone_close(3 * ZONE)
        disk.do(disk.target.zone_finish(4 * ZONE))
        assert disk.conds(1, 2, 3, 4) == [ZoneCond.EXP_OPEN, ZoneCond.FULL, ZoneCond.CLOSED, ZoneCond.FULL]
        disk.do(disk.target.zone_reset(2 * ZONE))
        assert disk.conds(2) == [ZoneCond.EMPTY]
        assert disk.read(2 * ZONE, ZONE) == bytes(ZONE)
        disk.do(disk.target.zone_reset_all())
        assert set(disk.conds(*range(8))) == {ZoneCond.EMPTY}
        assert os.fstat(disk.target._files.data).st_blocks == 0


def test_appends_from_several_queues_do_not_meet(folder: Path | None) -> None:
    """Each has a thread and a loop of its own."""
    with serving(folder, size=4 << 20, zone_size=1 << 20) as disk:
        places: list[tuple[int, bytes]] = []

        async def appends(name: int) -> None:
            async def one(n: int) -> None:
                data = bytes([name * 16 + n]) * BLOCK
                places.append((await disk.target.zone_append(1 << 20, aligned(data)), data))

            await asyncio.gather(*(one(n) for n in range(16)))

        threads = [threading.Thread(target=lambda n=n: asyncio.run(appends(n))) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(at for at, _ in places) == [(1 << 20) + n * BLOCK for n in range(64)]
        assert all(disk.read(at, BLOCK) == data for at, data in places)
        assert disk.report()[1].wp == (1 << 20) + 64 * BLOCK


def test_a_reset_and_writes_to_the_same_zone_take_turns(folder: Path | None) -> None:
    with serving(folder) as disk:

        async def both() -> None:
            async def write() -> None:
                for _ in range(8):
                    await disk.target.zone_append(ZONE, aligned(b"a" * BLOCK))

            await asyncio.gather(write(), *(disk.target.zone_reset(ZONE) for _ in range(4)), disk.target.flush())

        asyncio.run(both())
        wp = disk.report()[1].wp - ZONE
        assert disk.read(ZONE, ZONE) == (b"a" * wp).ljust(ZONE, b"\0")


# -- what fails ----------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_zone_as_it_was(folder: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(folder) as disk:
        disk.write(0, b"a" * BLOCK)
        with monkeypatch.context() as failing:

            async def half(fd: int, buf: memoryview, offset: int) -> None:
                os.pwrite(fd, buf[: len(buf) // 2], offset)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            failing.setattr(io, "write", half)
            failing.setattr(disk.target._files, "in_memory", False)
            for at in (BLOCK, ZONE):
                with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                    disk.write(at, b"b" * 2 * BLOCK)
        assert disk.conds(0, 1) == [ZoneCond.IMP_OPEN, ZoneCond.EMPTY]
        assert disk.read(0, 4 * BLOCK) == (b"a" * BLOCK).ljust(4 * BLOCK, b"\0")
        disk.write(BLOCK, b"c" * BLOCK)


def test_a_zone_that_cannot_be_cleared_is_read_only(
    folder: Path | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fails(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with serving(folder) as disk:
        disk.write(0, b"a" * BLOCK)
        monkeypatch.setattr(io, "punch_hole", fails)
        disk.do(disk.target.zone_reset(0))
        assert disk.conds(0) == [ZoneCond.READONLY]
        with pytest.raises(OSError, match="zone 0 is read-only"):
            disk.write(0, b"a" * BLOCK)
        disk.do(disk.target.zone_reset_all())
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "zone 0 cannot be cleared",
        "zone 0 is read-only from now on",
    ]


def test_the_flush_of_a_disk_that_fails_keeps_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, another_boot: Callable[[], None]
) -> None:
    async def fails(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    disk = begun(place)
    disk.write(BLOCK, b"b" * BLOCK)
    with monkeypatch.context() as failing:
        failing.setattr(io, "fsync", fails)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            disk.do(disk.target.flush())
    disk.die()
    another_boot()
    with serving(place) as disk:
        assert disk.report()[0].wp == BLOCK


# -- what is left --------------------------------------------------------------------------


def test_a_disk_is_there_again(place: Path) -> None:
    disk = begun(place)
    assert disk.read(0, 2 * BLOCK) == b"a" * BLOCK + bytes(BLOCK)
    assert disk.read(ZONE, ZONE) == b"b" * ZONE
    assert disk.conds(0, 1, 2) == [ZoneCond.IMP_OPEN, ZoneCond.FULL, ZoneCond.EMPTY]
    disk.write(BLOCK, b"c" * BLOCK)
    disk.end()


def test_a_dead_daemon_leaves_what_it_has_done_and_nothing_else(place: Path) -> None:
    disk = begun(place)
    disk.target.zone_open(3 * ZONE)
    disk.write(BLOCK, b"c" * BLOCK)
    disk.put(2 * BLOCK, b"half of a write")
    disk.put(5 * ZONE, b"what a reset had left")
    disk.die()
    disk = begun(place)
    assert disk.conds(0, 1, 2, 3) == [ZoneCond.IMP_OPEN, ZoneCond.FULL, ZoneCond.EMPTY, ZoneCond.EXP_OPEN]
    assert disk.read(0, 3 * BLOCK) == b"a" * BLOCK + b"c" * BLOCK + bytes(BLOCK)
    assert disk.read(5 * ZONE, BLOCK) == bytes(BLOCK)
    disk.write(BLOCK, b"c" * BLOCK)  # sent again
    disk.write(2 * BLOCK, b"d" * BLOCK)
    disk.end()
    with serving(place) as disk, pytest.raises(OSError, match="write pointer is at 12288"):
        disk.write(2 * BLOCK, b"d" * BLOCK)  # of a daemon that has ended well, nothing is


def test_a_loss_of_power_leaves_what_was_flushed(place: Path, another_boot: Callable[[], None]) -> None:
    disk = begun(place)
    disk.write(BLOCK, b"c" * BLOCK)
    disk.do(disk.target.flush())
    disk.write(2 * BLOCK, b"d" * BLOCK)
    disk.target.zone_open(3 * ZONE)
    disk.write(4 * ZONE, b"e" * BLOCK)
    disk.do(disk.target.zone_reset(ZONE))
    disk.die()
    another_boot()
    disk = begun(place)
    assert disk.conds(*range(5)) == [ZoneCond.CLOSED, *[ZoneCond.EMPTY] * 4]
    assert disk.read(0, 3 * BLOCK) == b"a" * BLOCK + b"c" * BLOCK + bytes(BLOCK)
    assert disk.read(4 * ZONE, BLOCK) == disk.read(ZONE, BLOCK) == bytes(BLOCK)
    disk.write(2 * BLOCK, b"f" * BLOCK)
    disk.end()


def test_a_flush_that_takes_long_keeps_nobody_waiting(
    place: Path, another_boot: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written meanwhile is not flushed, because its data may not be."""
    disk = begun(place)
    disk.write(BLOCK, b"c" * BLOCK)

    async def both() -> None:
        is_syncing, may_end = asyncio.Event(), asyncio.Event()

        async def slow(fd: int) -> None:
            is_syncing.set()
            await may_end.wait()

        monkeypatch.setattr(io, "fsync", slow)
        flush = asyncio.create_task(disk.target.flush())
        await is_syncing.wait()
        await disk.target.write(2 * BLOCK, aligned(b"d" * BLOCK))
        may_end.set()
        await flush

    asyncio.run(both())
    assert disk.report()[0].wp == 3 * BLOCK
    disk.die()
    another_boot()
    with serving(place) as disk:
        assert disk.report()[0].wp == 2 * BLOCK


def test_a_reset_is_known_before_its_data_goes(
    place: Path, another_boot: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dies(fd: int, offset: int, length: int) -> None:
        raise KeyboardInterrupt

    disk = begun(place)
    monkeypatch.setattr(io, "punch_hole", dies)
    with pytest.raises(KeyboardInterrupt):
        disk.do(disk.target.zone_reset(ZONE))
    disk.die()
    another_boot()
    with serving(place) as disk:
        assert disk.conds(1) == [ZoneCond.EMPTY]
        assert disk.read(ZONE, ZONE) == bytes(ZONE)


def test_nothing_is_cleared_in_a_conventional_zone(tmp_path: Path) -> None:
    disk = begun(tmp_path / "disk", size=SIZE, zone_size=ZONE, conv_zones=2)
    disk.put(0, b"a" * 2 * ZONE)
    disk.die()
    with serving(tmp_path / "disk", conv_zones=2) as disk:
        assert disk.read(0, 2 * ZONE) == b"a" * 2 * ZONE


def test_a_read_only_disk_is_not_changed(place: Path, another_boot: Callable[[], None]) -> None:
    disk = begun(place)
    disk.write(BLOCK, b"c" * BLOCK)
    disk.die()
    another_boot()
    before = [(place / name).read_bytes() for name in ("data", "zones")]
    disk = begun(place, read_only=True)
    assert disk.read(0, BLOCK) == b"a" * BLOCK
    assert disk.read(BLOCK, BLOCK) == bytes(BLOCK)
    assert disk.read(ZONE, ZONE) == b"b" * ZONE
    disk.end()
    assert [(place / name).read_bytes() for name in ("data", "zones")] == before


def test_a_zone_that_is_offline_cannot_be_read(place: Path) -> None:
    disk = begun(place)
    disk.target._table.save(1, disk.target._rules.states[1]._replace(cond=ZoneCond.OFFLINE))
    disk.die()
    with serving(place) as disk:
        (extent,) = disk.map.extents(ZONE, ZONE + BLOCK)
        assert extent.routing == Routing.all(Error(errno.EIO))
        with pytest.raises(OSError, match="zone 1 is offline"):
            disk.do(disk.target.zone_reset(ZONE))


# -- what is refused -----------------------------------------------------------------------


def open_fds() -> list[Path]:
    return list(Path("/proc/self/fd").iterdir())


def refused(folder: Path | None, **values: Any) -> UblkError:
    """The error that opening ends in; nothing is changed, and no file stays open."""

    def look() -> list[object]:
        files = sorted(folder.parent.rglob("*")) if folder else []
        return [files, [path.read_bytes() for path in files if path.is_file()], len(open_fds())]

    before = look()
    with pytest.raises(UblkError) as caught:
        opened(folder, **values)
    assert look() == before
    assert caught.value.hint
    assert not caught.value.message.endswith(".")
    return caught.value


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "no size given: a disk in memory needs --size"),
        ({"size": SIZE + BLOCK, "zone_size": ZONE}, "is not a multiple of zone_size 64K"),
        ({"size": SIZE, "zone_size": ZONE, "zone_capacity": 2 * ZONE}, "zone_capacity 128K is more than"),
        ({"size": SIZE, "zone_size": ZONE, "conv_zones": 8}, "conv_zones 8 leaves no zone"),
        ({"size": SIZE, "zone_size": ZONE, "max_open": 3, "max_active": 2}, "max_open 3 is more than max_active 2"),
    ],
)
def test_words_that_no_disk_fits(values: dict[str, Any], said: str) -> None:
    error = refused(None, **values)
    assert said in error.message
    assert error.exit_code is ExitCode.USAGE


@pytest.mark.parametrize(("name", "value"), [("zone_capacity", "5000"), ("zone_size", "96k"), ("conv_zones", -1)])
def test_values_that_no_zone_has(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        ZonedTarget.options[name].parse(value)


def test_more_memory_than_there_is() -> None:
    error = refused(None, size=1 << 50)
    assert re.fullmatch(r"a disk of 1P does not fit into the memory of this machine, .*", error.message)
    assert "--folder" in error.hint


def test_memory_does_not_outlive_its_daemon(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recovery queue: what a disk of target zoned has in memory goes") as caught:
        opened(size=SIZE, zone_size=ZONE, recovery="queue")
    assert caught.value.keys == ["recovery"]
    opened(tmp_path / "disk", size=SIZE, zone_size=ZONE, recovery="queue")[0].close()


def test_a_new_folder_needs_a_size(tmp_path: Path) -> None:
    assert "there is no disk in" in refused(tmp_path / "disk").message


def test_looking_at_a_new_disk_makes_none(tmp_path: Path) -> None:
    opened(tmp_path / "disk", size=SIZE, zone_size=ZONE)[0].close()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    with serving(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {"data", "zones"}


def test_a_folder_that_has_no_place(tmp_path: Path) -> None:
    error = refused(tmp_path / "no" / "disk", size=SIZE, zone_size=ZONE)
    assert f"there is no folder {tmp_path}/no" in error.message
    assert error.hint == f"mkdir -p {tmp_path}/no"


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "disk").touch()
    assert refused(tmp_path / "disk", size=SIZE).message == f"{tmp_path}/disk is not a folder"


def test_a_folder_with_something_else(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "letter").touch()
    assert "has other files, and no zoned disk" in refused(tmp_path / "disk", size=SIZE).message


@pytest.mark.parametrize("name", ["data", "zones"])
def test_half_a_disk(place: Path, name: str) -> None:
    (place / name).unlink()
    assert f"has half a zoned disk: there is no file {name} in it" in refused(place).message


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"size": 2 * SIZE}, "size 512K, not 1M"),
        ({"zone_size": 2 * ZONE}, "zone_size 64K, not 128K"),
        ({"zone_capacity": BLOCK, "conv_zones": 1}, "zone_capacity 64K, not 4K, conv_zones 0, not 1"),
        ({"max_open": 1, "max_active": 2}, "max_open 0, not 1, max_active 0, not 2"),
    ],
)
def test_a_folder_with_another_disk(place: Path, values: dict[str, Any], said: str) -> None:
    error = refused(place, **values)
    assert error.message == f"the disk in {place} has {said}"
    assert "leave that out" in error.hint


def test_a_disk_that_is_in_use(place: Path) -> None:
    with serving(place):
        error = refused(place)
    assert isinstance(error, BusyError)
    assert "is in use by another device" in error.message


def test_data_of_another_length(place: Path) -> None:
    os.truncate(place / "data", SIZE - BLOCK)
    assert re.search(r"data has 508K, but the disk has 512K", refused(place).message)


def test_a_table_that_is_damaged(place: Path) -> None:
    os.truncate(place / "zones", 4100)
    assert "zones is damaged" in refused(place).message


def test_a_disk_that_is_not_there_is_not_made_read_only(tmp_path: Path) -> None:
    error = refused(tmp_path / "disk", size=SIZE, zone_size=ZONE, read_only=True)
    assert "none is made that is read-only" in error.message


def test_a_file_system_that_frees_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backing, "_PUNCHING", set())
    assert "is not known to free parts of a file" in refused(place).message


def test_a_disk_that_is_too_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = os.statvfs(tmp_path)
    full = os.statvfs_result([*found[:3], 0, *found[4:]])
    monkeypatch.setattr(os, "statvfs", lambda _path: full)
    assert "is full, and the image still needs 512K" in refused(tmp_path / "disk", size=SIZE, zone_size=ZONE).message


def test_a_disk_that_is_short_of_space(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened(tmp_path / "disk", size=1 << 60, zone_size=1 << 40)[0].close()
    (record,) = caplog.records
    assert "is sparse and may need 1E more" in record.message


def test_a_disk_that_cannot_be_made_leaves_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As with a file that its file system cannot have."""
    target, _ = opened(tmp_path / "disk", size=1 << 62, zone_size=1 << 40)
    with pytest.raises(UblkError, match="cannot make a disk of 4E in"):
        target.start()
    target.close()
    assert list(tmp_path.iterdir()) == []


def test_two_who_make_the_same_disk(tmp_path: Path) -> None:
    first, _ = opened(tmp_path, size=SIZE, zone_size=ZONE)
    second, _ = opened(tmp_path, size=SIZE, zone_size=ZONE)
    first.start()
    with pytest.raises(BusyError, match="somebody else makes a disk"):
        second.start()
    first.close()
    second.close()
    assert {path.name for path in tmp_path.iterdir()} == {"data", "zones"}
