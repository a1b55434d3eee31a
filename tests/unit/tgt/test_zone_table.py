"""The file of a zoned disk's states: what is found in it after a death, and what is not believed."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from ublkpy.errors import UblkError
from ublkpy.tgt import zone_table
from ublkpy.tgt.zone_rules import Layout, State, fresh
from ublkpy.tgt.zone_table import Table
from ublkpy.uring.zones import ZoneCond

ZONE, BLOCK = 64 << 10, 4096
LAYOUT = Layout(300 * ZONE, ZONE, ZONE - BLOCK, conv_zones=2, max_open=3, max_active=5)
LIVE, KEPT = 4096, 4096 + 8192
WRITTEN = State(ZoneCond.IMP_OPEN, 3 * BLOCK, BLOCK)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """Of the table of a new disk."""
    number = os.open(tmp_path / "zones", os.O_RDWR | os.O_CREAT)
    zone_table.create(number, LAYOUT)
    yield number
    os.close(number)


@pytest.fixture
def table(fd: int) -> Table:
    """The same in use."""
    table = Table(fd, LAYOUT)
    table.begin(fresh(LAYOUT))
    return table


def found(fd: int) -> list[State]:
    return zone_table.read(fd, Path("disk/zones")).states


@pytest.fixture
def another_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is read in a test; what it wrote, was written in this one."""
    boots = iter([zone_table.boot_id()])
    monkeypatch.setattr(zone_table, "boot_id", lambda: next(boots, b"another"))


def test_a_new_one(fd: int) -> None:
    assert zone_table.read(fd, Path("x")) == (LAYOUT, fresh(LAYOUT))


def test_what_is_saved_is_there_after_a_death(table: Table, fd: int) -> None:
    table.save(7, WRITTEN)
    table.save(299, State(ZoneCond.EXP_OPEN))
    table.save(8, State(ZoneCond.IMP_OPEN))
    assert found(fd)[7] == WRITTEN
    assert found(fd)[299] == State(ZoneCond.EXP_OPEN)
    assert found(fd)[8] == State(ZoneCond.EMPTY)


def test_what_is_kept_is_there_after_a_boot(another_boot: None, table: Table, fd: int) -> None:
    table.save(7, WRITTEN)
    table.save(8, State(ZoneCond.FULL, BLOCK, BLOCK))
    table.save(9, State(ZoneCond.EXP_OPEN))
    changes = table.changes()
    table.save(7, State(ZoneCond.IMP_OPEN, 4 * BLOCK, 3 * BLOCK))
    table.keep(changes)
    states = found(fd)
    assert states[7] == State(ZoneCond.CLOSED, 3 * BLOCK, 3 * BLOCK)
    assert states[8] == State(ZoneCond.FULL, BLOCK, BLOCK)
    assert states[9] == State(ZoneCond.EMPTY)


def test_what_is_saved_only_is_not_there_after_a_boot(another_boot: None, table: Table, fd: int) -> None:
    table.save(7, WRITTEN)
    assert found(fd) == fresh(LAYOUT)


def test_an_older_change_does_not_come_over_a_newer_one(another_boot: None, table: Table, fd: int) -> None:
    """As when two flushes are on their way, or a flush and a reset."""
    table.save(7, WRITTEN)
    older = table.changes()
    table.save(7, State(ZoneCond.EMPTY))
    newer = table.changes([7])
    table.keep(newer)
    table.forget(newer)
    table.keep(older)
    table.forget(older)
    assert found(fd)[7] == State(ZoneCond.EMPTY)
    assert table.changes() == []


def test_a_change_is_kept_by_each_flush_until_one_is_through(table: Table) -> None:
    table.save(7, WRITTEN)
    first, second = table.changes(), table.changes()
    assert first == second != []
    table.save(7, State(ZoneCond.FULL, ZONE, ZONE))
    table.keep(first)
    table.forget(first)
    (left,) = table.changes()
    assert left not in first


def test_the_end_leaves_nothing_to_be_sent_again(another_boot: None, table: Table, fd: int) -> None:
    table.save(7, WRITTEN)
    states = fresh(LAYOUT)
    states[7] = WRITTEN
    table.end(states)
    assert found(fd)[7] == State(ZoneCond.CLOSED, 3 * BLOCK, 3 * BLOCK)


def test_open_zones_stay_open_in_the_same_boot(table: Table, fd: int) -> None:
    states = fresh(LAYOUT)
    states[7], states[8] = WRITTEN, State(ZoneCond.EXP_OPEN)
    table.end(states)
    assert found(fd)[7:9] == [State(ZoneCond.IMP_OPEN, 3 * BLOCK, 3 * BLOCK), State(ZoneCond.EXP_OPEN)]


def test_what_a_dead_daemon_had_not_kept_is_kept_by_the_next(another_boot: None, fd: int) -> None:
    first = Table(fd, LAYOUT)
    states = fresh(LAYOUT)
    states[7] = WRITTEN
    first.begin(states)
    (change,) = first.changes()
    assert change.zone == 7
    first.keep([change])
    assert found(fd)[7].wp == WRITTEN.wp


# -- what is not believed ------------------------------------------------------------------


def record(zone: int, cond: int, wp: int, began: int = 0) -> bytes:
    fields = struct.pack("<IIB3x", wp, began, cond)
    return fields + struct.pack("<I", zone_table._checksum(zone, fields))


@pytest.mark.parametrize(
    ("place", "data", "said"),
    [
        (0, b"x", "does not begin as a table of zones does"),
        (20, b"x", "the checksum of its header is wrong"),
        (LIVE + 7 * 16, b"x", "the checksum of zone 7 is wrong"),
        (LIVE + 7 * 16, bytes(16), "the checksum of zone 7 is wrong"),
        (LIVE + 7 * 16, record(7, 5, 0), "zone 7 is in a state that there is not: condition 5, block 0"),
        (LIVE + 7 * 16, record(7, 2, 16), "zone 7 is in a state that there is not: condition 2, block 16"),
        (LIVE + 7 * 16, record(7, 2, 1, 2), "zone 7 is in a state"),
        (LIVE + 7 * 16, record(7, 0, 0), "zone 7 is in a state"),
        (LIVE, record(0, 1, 0), "zone 0 is in a state"),
    ],
)
def test_a_damaged_one_is_refused(fd: int, place: int, data: bytes, said: str) -> None:
    Table(fd, LAYOUT).begin(fresh(LAYOUT))
    os.pwrite(fd, data, place)
    with pytest.raises(UblkError, match=f"disk/zones is damaged: .*{said}") as caught:
        found(fd)
    assert "bring back disk from a copy" in caught.value.hint


def test_a_kept_record_that_is_damaged_matters_after_a_boot(another_boot: None, table: Table, fd: int) -> None:
    os.pwrite(fd, b"x", KEPT + 299 * 16)
    with pytest.raises(UblkError, match="the checksum of zone 299 is wrong"):
        found(fd)


@pytest.mark.parametrize(
    ("length", "said"),
    [(0, "it has 0 bytes, which are fewer than a header takes"), (4100, "it has 4100 bytes, and 20480 are right")],
)
def test_one_that_was_cut_off_is_refused(fd: int, length: int, said: str) -> None:
    os.truncate(fd, length)
    with pytest.raises(UblkError, match=said):
        found(fd)


def test_one_of_a_later_version_is_not_touched(fd: int) -> None:
    os.pwrite(fd, struct.pack("<I", 2), 8)
    with pytest.raises(
        UblkError, match="has version 2 of the table of zones, and this ublkpy knows version 1"
    ) as caught:
        found(fd)
    assert "the ublkpy that made it, or a later one" in caught.value.hint
