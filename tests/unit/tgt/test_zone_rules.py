"""What may be done with zones, and what becomes of them: each transition, without a disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

import pytest

from ublkpy.errors import ConfigError
from ublkpy.tgt.zone_rules import Layout, Rules, State, Write, fresh, power_cycled, settled
from ublkpy.uring.zones import ZoneCond, ZoneType

ZONE, CAPACITY, BLOCK = 64 << 10, 48 << 10, 4096
LAYOUT = Layout(8 * ZONE, ZONE, CAPACITY, conv_zones=1, max_open=0, max_active=0)
EMPTY, IMPLICIT, EXPLICIT, CLOSED, FULL = (
    *(ZoneCond.EMPTY, ZoneCond.IMP_OPEN, ZoneCond.EXP_OPEN, ZoneCond.CLOSED, ZoneCond.FULL),
)
NOT_WP, READONLY, OFFLINE = ZoneCond.NOT_WP, ZoneCond.READONLY, ZoneCond.OFFLINE


class Disk(Rules):
    """Its zones are in these states; what is saved is kept."""

    def __init__(self, *states: State, max_open: int = 0, max_active: int = 0) -> None:
        layout = Layout(8 * ZONE, ZONE, CAPACITY, 1, max_open, max_active)
        given = [State(NOT_WP), *states]
        self.saved = dict(enumerate(given))
        super().__init__(layout, [*given, *fresh(layout)[len(given) :]], self.saved.__setitem__)

    def taken(self, zone: int, at: int | None, length: int = BLOCK) -> Write:
        write = self.take(zone, at, length)
        assert write
        return write

    def write(self, zone: int, at: int | None, length: int = BLOCK) -> int:
        """A whole one; where it went."""
        write = self.taken(zone, at, length)
        self.done(write)
        return write.start

    def conds(self, *zones: int) -> list[ZoneCond]:
        assert all(self.saved.get(zone, self.states[zone]) == self.states[zone] for zone in zones)
        return [self.states[zone].cond for zone in zones]


@pytest.fixture
def sealed(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """It is logged, once."""
    yield
    (record,) = caplog.get_records("call")
    assert record.message.startswith("zone 1 is read-only from now on")


def refused(what: Callable[[], object], number: int = errno.EIO) -> None:
    with pytest.raises(OSError, match=r".") as caught:
        what()
    assert caught.value.errno == number


START = {
    EMPTY: State(EMPTY),
    IMPLICIT: State(IMPLICIT, BLOCK, BLOCK),
    EXPLICIT: State(EXPLICIT, BLOCK, BLOCK),
    CLOSED: State(CLOSED, BLOCK, BLOCK),
    FULL: State(FULL, CAPACITY, CAPACITY),
    READONLY: State(READONLY, BLOCK, BLOCK),
    OFFLINE: State(OFFLINE, BLOCK, BLOCK),
}
TRANSITIONS = {
    "open": {EMPTY: EXPLICIT, IMPLICIT: EXPLICIT, EXPLICIT: EXPLICIT, CLOSED: EXPLICIT},
    "close": {EMPTY: EMPTY, IMPLICIT: CLOSED, EXPLICIT: CLOSED, CLOSED: CLOSED, FULL: FULL},
    "finish": dict.fromkeys((EMPTY, IMPLICIT, EXPLICIT, CLOSED, FULL), FULL),
    "reset": dict.fromkeys((EMPTY, IMPLICIT, EXPLICIT, CLOSED, FULL), EMPTY),
    "write": {EMPTY: IMPLICIT, IMPLICIT: IMPLICIT, EXPLICIT: EXPLICIT, CLOSED: IMPLICIT},
}


@pytest.mark.parametrize("before", START)
@pytest.mark.parametrize("what", TRANSITIONS)
def test_transition(what: str, before: ZoneCond) -> None:
    disk = Disk(START[before])
    wp = START[before].wp
    after = TRANSITIONS[what].get(before)

    def act() -> None:
        if what == "write":
            disk.write(1, wp)
        else:
            getattr(disk, what)(1)

    if after is None:
        refused(act)
        assert disk.states[1] == START[before]
        return
    act()
    assert disk.conds(1) == [after]
    assert disk.states[1].wp == {"reset": 0, "write": wp + BLOCK}.get(what, wp)


@pytest.mark.parametrize("what", ["open", "close", "finish", "reset"])
def test_a_conventional_zone_has_no_states(what: str) -> None:
    refused(lambda: getattr(Disk(), what)(0))


def test_an_open_zone_with_nothing_in_it_is_closed_to_empty() -> None:
    disk = Disk()
    disk.open(1)
    disk.close(1)
    assert disk.conds(1) == [EMPTY]
    disk.open(1)
    write = disk.taken(1, 0)
    disk.close(1)
    assert disk.conds(1) == [CLOSED]
    disk.failed(write)
    assert disk.conds(1) == [EMPTY]


# -- writes --------------------------------------------------------------------------------


def test_a_write_goes_to_the_write_pointer() -> None:
    disk = Disk()
    refused(lambda: disk.take(1, BLOCK, BLOCK))
    disk.write(1, 0)
    refused(lambda: disk.take(1, 0, BLOCK))
    refused(lambda: disk.take(1, 2 * BLOCK, BLOCK))
    assert disk.write(1, None, 2 * BLOCK) == BLOCK
    assert disk.states[1] == State(IMPLICIT, 3 * BLOCK, BLOCK)


def test_nothing_crosses_the_capacity_and_a_zone_becomes_full() -> None:
    disk = Disk()
    disk.write(1, 0, CAPACITY - BLOCK)
    refused(lambda: disk.take(1, CAPACITY - BLOCK, 2 * BLOCK))
    refused(lambda: disk.take(1, None, 2 * BLOCK))
    disk.write(1, None)
    assert disk.conds(1) == [FULL]
    refused(lambda: disk.take(1, CAPACITY, BLOCK))
    refused(lambda: disk.take(1, None, BLOCK))


def test_appends_side_by_side_end_in_any_order() -> None:
    disk = Disk()
    first, second, third = (disk.taken(1, None) for _ in range(3))
    assert [write.start for write in (first, second, third)] == [0, BLOCK, 2 * BLOCK]
    disk.done(second)
    assert disk.states[1].wp == 2 * BLOCK
    disk.done(first)
    assert disk.states[1].wp == 2 * BLOCK
    assert disk.report(1, 1)[0].wp == ZONE + 3 * BLOCK
    disk.done(third)
    assert disk.states[1].wp == 3 * BLOCK


def test_a_zone_is_full_when_its_last_write_is_done() -> None:
    disk = Disk()
    write = disk.taken(1, None, CAPACITY)
    assert disk.conds(1) == [IMPLICIT]
    disk.done(write)
    assert disk.conds(1) == [FULL]


def test_a_write_that_fails_is_taken_back() -> None:
    disk = Disk()
    disk.failed(disk.taken(1, 0))
    assert disk.conds(1) == [EMPTY]
    disk.write(1, 0)
    disk.failed(disk.taken(1, BLOCK))
    assert disk.write(1, None) == BLOCK


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)])
def test_all_that_fail_are_taken_back(order: tuple[int, ...]) -> None:
    """As on a disk that is full."""
    disk = Disk()
    disk.write(1, 0)
    writes = [disk.taken(1, None) for _ in range(3)]
    for n in order:
        disk.failed(writes[n])
    assert disk.write(1, None) == BLOCK
    assert disk.conds(1) == [IMPLICIT]


@pytest.mark.parametrize("is_done_first", [True, False])
def test_a_write_that_fails_below_another_seals_the_zone(is_done_first: bool, sealed: None) -> None:
    disk = Disk()
    first, second = disk.taken(1, None), disk.taken(1, None)
    if is_done_first:
        disk.done(second)
        disk.failed(first)
    else:
        disk.failed(first)
        refused(lambda: disk.take(1, None, BLOCK))
        disk.done(second)
    assert disk.conds(1) == [READONLY]
    assert disk.states[1].wp == 2 * BLOCK
    refused(lambda: disk.take(1, None, BLOCK))


def test_writes_that_are_on_their_way_to_a_sealed_zone_end(sealed: None) -> None:
    disk = Disk()
    writes = [disk.taken(1, None) for _ in range(4)]
    disk.done(writes[1])
    disk.failed(writes[0])
    disk.done(writes[2])
    disk.failed(writes[3])
    assert disk.states[1] == State(READONLY, 3 * BLOCK, 2 * BLOCK)
    assert disk.hold([1])


def test_what_cannot_be_saved_changes_nothing() -> None:
    def full(zone: int, state: State) -> None:
        raise OSError(errno.ENOSPC, "no space")

    disk = Rules(LAYOUT, fresh(LAYOUT), full)
    for what in (lambda: disk.take(1, 0, BLOCK), lambda: disk.open(1), lambda: disk.finish(1)):
        refused(what, errno.ENOSPC)
    assert disk.states == fresh(LAYOUT)
    assert disk.hold([1])


def test_a_write_whose_end_cannot_be_saved_is_taken_back() -> None:
    disk = Disk(State(IMPLICIT, BLOCK, BLOCK))
    write = disk.taken(1, None)
    save, disk._save = disk._save, lambda zone, state: os.close(-1)
    refused(lambda: disk.done(write), errno.EBADF)
    disk._save = save
    disk.failed(write)
    assert disk.write(1, BLOCK) == BLOCK


def test_the_last_write_of_a_dead_daemon_may_be_sent_again() -> None:
    disk = Disk(State(IMPLICIT, 3 * BLOCK, BLOCK), State(FULL, CAPACITY, 0))
    refused(lambda: disk.take(1, BLOCK, BLOCK))
    assert disk.write(1, BLOCK, 2 * BLOCK) == BLOCK
    assert disk.states[1].wp == 3 * BLOCK
    refused(lambda: disk.take(1, BLOCK, 2 * BLOCK))  # once
    assert disk.write(1, 3 * BLOCK) == 3 * BLOCK
    assert disk.write(2, 0, CAPACITY) == 0
    assert disk.conds(2) == [FULL]
    refused(lambda: disk.take(2, 0, CAPACITY))


def test_it_is_not_sent_after_others() -> None:
    disk = Disk(State(IMPLICIT, 2 * BLOCK, BLOCK), State(IMPLICIT, BLOCK, 0))
    disk.write(1, None)
    refused(lambda: disk.take(1, BLOCK, BLOCK))
    disk.reset(2)
    disk.write(2, 0)
    refused(lambda: disk.take(2, 0, BLOCK))


def test_a_write_that_fails_when_sent_again_may_be_sent_once_more() -> None:
    disk = Disk(State(IMPLICIT, 2 * BLOCK, BLOCK))
    disk.failed(disk.taken(1, BLOCK))
    assert disk.states[1] == State(IMPLICIT, 2 * BLOCK, BLOCK)
    assert disk.write(1, BLOCK) == BLOCK
    assert disk.write(1, None) == 2 * BLOCK


def test_a_zone_that_is_held_has_writes_wait() -> None:
    disk = Disk()
    write = disk.taken(1, 0)
    assert disk.hold([1, 2]) is None
    disk.done(write)
    assert disk.hold([1, 2])
    assert disk.hold([2, 3]) is None
    assert disk.take(1, BLOCK, BLOCK) is None
    disk.release([1, 2])
    disk.write(1, BLOCK)


# -- how many ------------------------------------------------------------------------------


def test_one_that_is_open_implicitly_is_closed_to_make_room() -> None:
    disk = Disk(max_open=2)
    for zone in (1, 2, 3):
        disk.write(zone, 0)
    assert disk.conds(1, 2, 3) == [CLOSED, IMPLICIT, IMPLICIT]
    disk.open(4)
    assert disk.conds(2, 3, 4) == [CLOSED, IMPLICIT, EXPLICIT]
    disk.open(3)
    for what in (lambda: disk.open(5), lambda: disk.take(1, BLOCK, BLOCK), lambda: disk.finish(2)):
        refused(what, errno.ETOOMANYREFS)
    disk.finish(3)
    disk.finish(2)
    assert disk.conds(2, 3) == [FULL, FULL]


def test_no_more_are_active_than_may_be() -> None:
    disk = Disk(max_active=2)
    disk.write(1, 0)
    disk.open(2)
    for what in (lambda: disk.open(3), lambda: disk.take(3, 0, BLOCK), lambda: disk.finish(3)):
        refused(what, errno.EOVERFLOW)
    disk.close(1)
    refused(lambda: disk.open(3), errno.EOVERFLOW)
    disk.write(1, BLOCK, CAPACITY - BLOCK)
    disk.open(3)
    disk.reset(2)
    disk.finish(4)
    disk.open(5)


# -- what is kept --------------------------------------------------------------------------


def test_a_report_shows_what_is_asked_for() -> None:
    disk = Disk(START[FULL], State(OFFLINE))
    zones = disk.report(0, 100)
    assert len(zones) == 8
    assert (zones[0].type, zones[0].cond, zones[0].capacity) == (ZoneType.CONVENTIONAL, NOT_WP, ZONE)
    assert (zones[1].wp, zones[1].capacity, zones[1].cond) == (2 * ZONE, CAPACITY, FULL)
    assert [zone.start for zone in disk.report(6, 1)] == [6 * ZONE]


def test_a_reset_of_all_spares_those_that_cannot() -> None:
    assert list(Disk(State(READONLY), State(OFFLINE)).usable()) == [3, 4, 5, 6, 7]


def test_what_a_loss_of_power_leaves() -> None:
    assert power_cycled(State(EXPLICIT)) == State(EMPTY)
    assert power_cycled(State(EXPLICIT, 8, 4)) == State(CLOSED, 8, 8)
    assert power_cycled(State(IMPLICIT, 8, 4)) == State(CLOSED, 8, 8)
    assert power_cycled(State(FULL, 8, 4)) == State(FULL, 8, 8)


def test_what_a_dead_daemon_leaves() -> None:
    assert settled(State(IMPLICIT)) == settled(State(CLOSED)) == State(EMPTY)
    assert settled(State(EXPLICIT)) == State(EXPLICIT)
    assert settled(State(IMPLICIT, 8, 4)) == State(IMPLICIT, 8, 4)


# -- layouts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "said", "cure"),
    [
        ((100 << 10, ZONE, ZONE, 0, 0, 0), r"size 100K is not a multiple of zone_size 64K", "64K and 128K are"),
        ((32 << 10, ZONE, ZONE, 0, 0, 0), r"size 32K is not a multiple", "64K is"),
        ((8 * ZONE, ZONE, 2 * ZONE, 0, 0, 0), "zone_capacity 128K is more than zone_size 64K", "lower it"),
        ((8 * ZONE, ZONE, ZONE, 8, 0, 0), "conv_zones 8 leaves no zone", "loop"),
        ((8 * ZONE, ZONE, ZONE, 0, 9, 0), "max_open 9 is more than the disk has zones, 8", "lower it"),
        ((8 * ZONE, ZONE, ZONE, 0, 0, 9), "max_active 9 is more", "lower it"),
        ((8 * ZONE, ZONE, ZONE, 0, 4, 3), "max_open 4 is more than max_active 3", "lower max_open"),
    ],
)
def test_a_layout_that_no_disk_has(layout: tuple[int, int, int, int, int, int], said: str, cure: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        Layout(*layout).check()
    assert cure in caught.value.hint
