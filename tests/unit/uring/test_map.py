"""The extent map against a list with an entry for each sector."""

from __future__ import annotations

import errno
import os
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ublkpy.uring.ffi import ffi, lib
from ublkpy.uring.map import (
    Error,
    Extent,
    Fault,
    Faulty,
    File,
    Map,
    Mirror,
    Null,
    Pattern,
    Routing,
    Space,
    Spaces,
    Stripe,
    Sync,
    Upcall,
    Zero,
)

OPS = (lib.UM_READ, lib.UM_WRITE, lib.UM_DISCARD, lib.UM_WRITE_ZEROES)
KINDS = {lib.UM_NULL: Null(), lib.UM_ZERO: Zero(), lib.UM_UPCALL: Upcall()}

ROUTINGS = (
    Routing.all(Null()),
    Routing.all(File(0)),
    Routing(File(1), File(2, shift=1 << 20), Zero(), Upcall()),
    Routing(Zero(), Upcall(), Error(errno.EROFS), Null()),
    Routing.all(Stripe((0, 1, 2), 1024)),
    Routing.all(Mirror((0, 1), 2048)),
    Routing(Faulty(File(1), 0), Faulty(Stripe((0, 1, 2), 1024), 1), Faulty(Zero(), 1), Upcall()),
)


class Reader:
    """What a queue does."""

    def __init__(self, target_map: Map) -> None:
        self.map = target_map
        self.c = ffi.new("struct um_reader *")
        lib.um_reader_add(target_map.c, self.c, -1)

    def __enter__(self) -> Reader:
        lib.um_reader_enter(self.c)
        self.view = lib.um_current(self.map.c)
        return self

    def __exit__(self, *_: object) -> None:
        lib.um_reader_leave(self.c)

    def hit(self, pos: int, op: int = lib.UM_READ) -> Any:
        hit = ffi.new("struct um_hit *")
        lib.um_lookup(self.view, pos, op, hit)
        return hit

    def remove(self) -> None:
        lib.um_reader_remove(self.c)


class Model:
    """For each sector a routing and where in its files it is, in bytes."""

    def __init__(self, nr_sectors: int) -> None:
        self.sectors: list[tuple[Routing, int]] = [(ROUTINGS[0], 0)] * nr_sectors

    def replace(self, extents: list[Extent]) -> None:
        for e in extents:
            for i in range(e.length // 512):
                self.sectors[e.start // 512 + i] = (e.routing, e.offset + i * 512 if e.routing.is_placed else 0)

    def resize(self, nr_sectors: int) -> None:
        routing, offset = self.sectors[-1]
        step = 512 if routing.is_placed else 0
        missing = nr_sectors - len(self.sectors)
        self.sectors = self.sectors[:nr_sectors] + [(routing, offset + step * i) for i in range(1, missing + 1)]

    def extents(self) -> list[Extent]:
        found = [Extent(0, 512, *self.sectors[0])]
        for (_, before), (i, (routing, offset)) in pairwise(enumerate(self.sectors)):
            if found[-1].routing == routing and offset - before[1] == (512 if routing.is_placed else 0):
                found[-1] = replace(found[-1], length=found[-1].length + 512)
            else:
                found.append(Extent(i * 512, 512, routing, offset))
        return found


def new_map(nr_sectors: int) -> Map:
    target_map = Map(nr_sectors * 512)
    assert [target_map.add_file(10 + i, is_block_device=i == 2) for i in range(3)] == [0, 1, 2]
    assert [target_map.add_fault(Fault(delay=i)) for i in range(2)] == [0, 1]
    return target_map


def check_same(target_map: Map, model: Model) -> None:
    assert lib.um_check(target_map.c) == 0
    extents = model.extents()
    assert list(target_map.extents()) == extents
    assert target_map.count == len(extents)
    assert target_map.stats().nr_dead == 0


def check_hits(target_map: Map, extents: list[Extent]) -> None:
    """At the borders of each extent, for each op."""
    reader = Reader(target_map)
    with reader:
        for e in extents:
            for pos in {e.start, e.start + 1, e.end - 1}:
                for op, action in zip(OPS, e.routing.actions, strict=True):
                    check_hit(reader.hit(pos, op), pos, action, e.offset + pos - e.start, e.end, op)
    reader.remove()


def check_hit(hit: Any, pos: int, action: object, p: int, end: int, op: int = lib.UM_READ) -> None:
    if isinstance(action, Faulty):
        assert hit.error == -(lib.UM_FIRST_FAULT + action.fault)
        hit.error, action = 0, action.action
    assert hit.asks == isinstance(action, Mirror)
    match action:
        case File(file, shift):
            assert (hit.kind, hit.slot, hit.offset, hit.end) == (lib.UM_FILE, file, p + shift, end)
        case Stripe(files) if op in (lib.UM_DISCARD, lib.UM_WRITE_ZEROES):
            assert (hit.kind, hit.slot, hit.nr_legs, hit.end) == (lib.UM_FILE, files[0], len(files), end)
        case Mirror(files) if op != lib.UM_READ:
            assert (hit.kind, hit.slot, hit.nr_legs, hit.end) == (lib.UM_FILE, files[0], len(files), end)
        case Mirror(files, chunk, shift):
            assert (hit.kind, hit.slot, hit.offset) == (lib.UM_FILE, files[p // chunk % len(files)], p + shift)
            assert hit.end == min(end, pos + chunk - p % chunk)
        case Stripe(files, chunk, shift):
            offset = p // chunk // len(files) * chunk + p % chunk + shift
            assert (hit.kind, hit.slot, hit.offset) == (lib.UM_FILE, files[p // chunk % len(files)], offset)
            assert hit.end == min(end, pos + chunk - p % chunk)
        case Error(number):
            assert (hit.kind, hit.error, hit.end) == (lib.UM_ERROR, -number, end)
        case _:
            assert (KINDS[hit.kind], hit.error, hit.end) == (action, 0, end)


SECTORS = 1024


@st.composite
def some_extents(draw: st.DrawFn) -> list[Extent]:
    """Anything from one large extent to many small ones, with or without gaps, continuing each other or not."""
    start = draw(st.integers(0, SECTORS - 1)) * 512
    length = draw(st.sampled_from((1, 1, 2, 5, 300))) * 512
    gap = draw(st.sampled_from((0, 0, 1, 3))) * 512
    nr = draw(st.sampled_from((1, 2, 7, 60, 400)))
    routings = draw(st.lists(st.sampled_from(ROUTINGS), min_size=1, max_size=3))
    shift = draw(st.sampled_from((0, 0, 4096)))
    found = []
    for i, at in enumerate(range(start, min(start + nr * (length + gap), SECTORS * 512), length + gap)):
        found.append(Extent(at, min(length, SECTORS * 512 - at), routings[i % len(routings)], at + shift))
    return found


class MapMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.map = new_map(SECTORS)
        self.model = Model(SECTORS)

    @rule(extents=some_extents(), order=st.randoms(use_true_random=False))
    def replace(self, extents: list[Extent], order: random.Random) -> None:
        order.shuffle(extents)
        self.map.replace(extents)
        self.model.replace(extents)

    @rule(extents=some_extents())
    def refuse(self, extents: list[Extent]) -> None:
        with pytest.raises(ValueError, match="overlap"):
            self.map.replace([*extents, extents[-1]])

    @rule(nr_sectors=st.integers(1, 2 * SECTORS))
    def resize(self, nr_sectors: int) -> None:
        """At least to the size that the others need."""
        for size in sorted({nr_sectors, max(nr_sectors, SECTORS)}):
            self.map.resize(size * 512)
            self.model.resize(size)
            check_same(self.map, self.model)

    @invariant()
    def is_what_was_said(self) -> None:
        check_same(self.map, self.model)

    def teardown(self) -> None:
        check_hits(self.map, self.model.extents())
        self.map.close()


TestMap = MapMachine.TestCase
TestMap.settings = settings(max_examples=40, stateful_step_count=20)


def test_deep_tree_grows_and_shrinks() -> None:
    """Every way of splitting and joining nodes comes up many times, on three levels."""
    nr_sectors, chance = 20000, random.Random(1)
    target_map, model = new_map(nr_sectors), Model(nr_sectors)
    levels = set()
    for step in range(4000):
        if step % 50 == 49:
            for size in (chance.randrange(1, nr_sectors), nr_sectors):
                target_map.resize(size * 512)
                model.resize(size)
                assert lib.um_check(target_map.c) == 0
        if step // 500 % 2 == 0:
            where = [(sector, 1) for sector in chance.sample(range(nr_sectors), chance.choice((1, 2, 40)))]
        else:
            sector = chance.randrange(nr_sectors)
            where = [(sector, min(chance.choice((1, 30, 500)), nr_sectors - sector))]
        extents = [
            Extent(sector * 512, nr * 512, chance.choice(ROUTINGS), (sector + chance.randrange(4)) * 512)
            for sector, nr in where
        ]
        target_map.replace(extents)
        model.replace(extents)
        assert lib.um_check(target_map.c) == 0
        levels.add(target_map.stats().levels)
        if step % 500 in (0, 100, 499):
            check_same(target_map, model)
    assert levels == {1, 2, 3}
    check_hits(target_map, model.extents()[:500])
    target_map.replace([Extent(0, target_map.size, ROUTINGS[0])])
    assert (target_map.count, target_map.stats().levels, target_map.stats().nr_nodes) == (1, 1, 1)
    target_map.close()


def test_a_million_extents() -> None:
    nr = 1_000_000
    target_map = Map(nr * 4096)
    files = [Routing.all(File(target_map.add_file(fd))) for fd in range(2)]
    target_map.replace(Extent(i * 4096, 4096, files[i % 2], i * 4096) for i in range(nr))
    assert (target_map.count, lib.um_check(target_map.c)) == (nr, 0)
    assert target_map.stats().levels == 4
    start = 700_001 * 4096
    check_hits(target_map, [Extent(start, 4096, files[1], start)])
    target_map.replace([Extent(start, 4096, files[0], start)])
    assert (target_map.count, lib.um_check(target_map.c)) == (nr - 2, 0)
    check_hits(target_map, [Extent(start - 4096, 3 * 4096, files[0], start - 4096)])
    assert len(list(target_map.extents(start, start + 300 * 4096))) == 300 - 1
    target_map.close()


def fill_while_memory_runs_out() -> None:
    nr = 200_000
    target_map = Map(nr * 512)
    files = [Routing.all(File(target_map.add_file(fd))) for fd in range(2)]
    target_map.replace([Extent(i * 2560, 1024, files[i % 2]) for i in range(500)])
    before = list(target_map.extents())
    ids = [target_map._add_routing(routing) for routing in files]
    pieces = ffi.new("struct um_extent[]", [(i * 512, i * 512 + 512, 0, ids[i % 2]) for i in range(nr)])
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    refused = 0
    for extra in range(0, 48 << 20, 1 << 20):
        resource.setrlimit(resource.RLIMIT_AS, (used + extra, -1))
        res = lib.um_replace(target_map.c, 0, pieces, nr, ffi.NULL)
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        assert lib.um_check(target_map.c) == 0
        if res == 0:
            break
        assert res == -errno.ENOMEM
        assert list(target_map.extents()) == before
        refused += 1
    assert target_map.count == nr
    assert refused > 8  # 6 MiB go to a copy of the pieces, as much to the nodes
    target_map.close()


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer has memory of its own")
def test_memory_runs_out() -> None:
    """Wherever it happens, the map stays as it was and can be used. In a process that has no free memory left over."""
    program = f"from {__name__} import fill_while_memory_runs_out as run; run()"
    root = Path(__file__).parents[__name__.count(".")]
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)


@given(
    st.integers(1, 5),
    st.integers(9, 16),
    st.integers(0, 1 << 40),
    st.integers(0, 1 << 20),
    st.integers(0, (1 << 20) - 1),
)
def test_stripes(nr_files: int, chunk_shift: int, offset: int, shift: int, pos: int) -> None:
    target_map = Map(1 << 20)
    stripe = Stripe(tuple(target_map.add_file(i) for i in range(nr_files)), 1 << chunk_shift, shift)
    target_map.replace([Extent(0, 1 << 20, Routing.all(stripe), offset)])
    reader = Reader(target_map)
    with reader:
        check_hit(reader.hit(pos), pos, stripe, offset + pos, 1 << 20)
    reader.remove()
    target_map.close()


def parts(target_map: Map, pos: int, length: int, nr_legs: int) -> list[tuple[int, int]]:
    """Of a discard: its place and length in each leg."""
    reader = Reader(target_map)
    with reader:
        hit = reader.hit(pos, lib.UM_DISCARD)
        assert hit.nr_legs == nr_legs
        found = [lib.um_leg(hit, length, leg) for leg in range(nr_legs)]
    reader.remove()
    return [(part.offset, part.len) for part in found]


@given(
    st.integers(1, 5), st.sampled_from((512, 1024, 4096)), st.integers(0, 40), st.integers(0, 200), st.integers(1, 200)
)
def test_what_has_no_data_goes_to_each_leg_of_a_stripe_at_once(
    nr_files: int, chunk: int, shift: int, first: int, count: int
) -> None:
    """What it is in each, told sector by sector."""
    target_map = Map(1 << 20)
    files = tuple(target_map.add_file(i) for i in range(nr_files))
    target_map.replace([Extent(0, 1 << 20, Routing.all(Stripe(files, chunk, shift * 512)))])
    expected: dict[int, set[int]] = {leg: set() for leg in range(nr_files)}
    for sector in range(first, first + count):
        nth, rest = divmod(sector * 512, chunk)
        expected[nth % nr_files].add(nth // nr_files * chunk + rest + shift * 512)
    for leg, (offset, length) in enumerate(parts(target_map, first * 512, count * 512, nr_files)):
        assert set(range(offset, offset + length, 512)) == expected[leg]
    target_map.close()


def test_all_legs_of_a_mirror_are_alike() -> None:
    target_map = Map(1 << 20)
    files = tuple(target_map.add_file(i) for i in range(3))
    target_map.replace([Extent(0, 1 << 20, Routing.all(Mirror(files, 4096, 512)), 1024)])
    assert parts(target_map, 512, 9 * 512, 3) == [(4 * 512, 9 * 512)] * 3
    target_map.close()


def test_a_pattern_has_a_place() -> None:
    target_map = Map(1 << 20)
    target_map.fill(Routing.all(Pattern()))
    target_map.replace([Extent(4096, 4096, Routing.all(Pattern()), 512)])
    assert [(e.start, e.offset) for e in target_map.extents()] == [(0, 0), (4096, 512), (8192, 8192)]
    target_map.close()


@pytest.fixture
def small() -> Iterator[Map]:
    target_map = new_map(64)
    yield target_map
    target_map.close()


def test_one_extent() -> None:
    target_map = Map(1 << 40)
    target_map.fill(ROUTINGS[3])
    assert list(target_map.extents()) == [Extent(0, 1 << 40, ROUTINGS[3])]
    check_hits(target_map, [Extent(0, 1 << 40, ROUTINGS[3])])
    target_map.close()


def test_behind_the_end_is_an_error(small: Map) -> None:
    for extents in ([], [Extent(512, 512, ROUTINGS[1])]):
        small.replace(extents)
        reader = Reader(small)
        with reader:
            for pos in (64 * 512, 1 << 63):
                hit = reader.hit(pos)
                assert (hit.kind, hit.error) == (lib.UM_ERROR, -errno.EIO)
                assert hit.end > pos
        reader.remove()


@pytest.mark.parametrize("size", [0, -512, 1000, 1 << 63])
def test_what_is_no_size(small: Map, size: int) -> None:
    with pytest.raises(ValueError, match="is not a positive multiple of 512"):
        small.resize(size)
    assert small.size == 64 * 512
    assert lib.um_resize(small.c, 0, size % (1 << 64)) == -errno.EINVAL


def test_an_end_that_cannot_move(small: Map) -> None:
    small.replace([Extent(0, small.size, ROUTINGS[1], (1 << 63) - 1024 - small.size)])
    small.resize(65 * 512)
    with pytest.raises(ValueError, match="no file has so many bytes"):
        small.resize(66 * 512)
    memory = bytearray(65 * 512)
    small.replace([Extent(0, small.size, Routing.all(small.add_memory(memory)))])
    with pytest.raises(ValueError, match="ends in memory"):
        small.resize(66 * 512)
    small.resize(512)
    assert (small.size, small.count) == (512, 1)


def test_part_of_a_map_is_cut_to_size(small: Map) -> None:
    small.replace([Extent(0, 8192, ROUTINGS[1], 4096), Extent(8192, 8192, ROUTINGS[3], 4096)])
    assert list(small.extents(512, 1024)) == [Extent(512, 512, ROUTINGS[1], 4608)]
    assert list(small.extents(7680, 8704)) == [Extent(7680, 512, ROUTINGS[1], 11776), Extent(8192, 512, ROUTINGS[3])]
    assert list(small.extents(1024, 1024)) == []


def test_same_routings_are_one(small: Map) -> None:
    before = small.stats().nr_routings
    for start in (0, 1024, 2048):
        small.replace([Extent(start, 512, Routing.all(File(1)))])
    assert small.stats().nr_routings == before + 1


def test_tables_grow_under_a_reader(small: Map) -> None:
    reader = Reader(small)
    with reader:
        for i in range(3, 300):
            assert small.add_file(10 + i) == i
            small.replace([Extent(512, 512, Routing.all(File(i)))])
        assert reader.hit(512).kind == lib.UM_NULL
        assert (reader.view.nr_files, small.stats().nr_dead > 300) == (0, True)
    with reader:
        assert reader.hit(512).slot == 299
        assert [reader.view.files[i].fd for i in range(300)] == list(range(10, 310))
        assert [reader.view.files[i].is_block_device for i in range(4)] == [0, 0, 1, 0]
    assert small.stats().nr_dead == 0
    reader.remove()


def test_flush_changes_with_the_extents(small: Map) -> None:
    def flush(view: Any) -> tuple[int, list[int]]:
        return view.spaces[0].flush.kind, [view.spaces[0].flush.slots[i] for i in range(view.spaces[0].flush.nr)]

    reader = Reader(small)
    with reader as old:
        assert flush(old.view) == (lib.UM_NULL, [])
        small.replace([Extent(0, 512, ROUTINGS[1])], Sync((2, 0, 2)))
        assert flush(old.view) == (lib.UM_NULL, [])
    with reader as new:
        assert flush(new.view) == (lib.UM_FILE, [0, 2])
        assert new.hit(0).kind == lib.UM_FILE
    for word, kind in ((Upcall(), lib.UM_UPCALL), (Null(), lib.UM_NULL)):
        small.set_flush(word)
        with reader as new:
            assert flush(new.view) == (kind, [])
    assert list(small.extents(0, 512)) == [Extent(0, 512, ROUTINGS[1])]
    reader.remove()


def test_the_dead_live_as_long_as_a_reader_may_see_them(small: Map) -> None:
    one, other = Reader(small), Reader(small)
    with one:
        for i in range(20):
            small.replace([Extent(i * 1024, 512, ROUTINGS[1], i * 512)])
        dead = small.stats().nr_dead
        assert dead == 40  # a view and a node each time
        with other:
            small.replace([Extent(512, 512, ROUTINGS[3])])
            assert one.hit(0).end == small.size
        assert small.stats().nr_dead == dead + 2
        lib.um_reader_enter(one.c)
        assert small.stats().nr_dead == 0
    one.remove()
    other.remove()


def test_waiting_for_readers(small: Map) -> None:
    small.synchronize(0)
    reader = Reader(small)
    small.synchronize(0)
    with reader:
        with pytest.raises(TimeoutError, match="old map"):
            small.synchronize(0.01)
        lib.um_reader_enter(reader.c)
        with pytest.raises(TimeoutError):
            small.synchronize(0)
        waiting = Thread(target=small.synchronize, args=(60,))
        waiting.start()
        while waiting.is_alive():
            lib.um_reader_enter(reader.c)
    small.synchronize(0)
    with pytest.raises(OSError, match="map: ") as caught:
        small.close()
    assert caught.value.errno == errno.EBUSY
    reader.remove()


@pytest.mark.parametrize("nr_extents", [1, 64, 20000])
def test_readers_see_all_of_a_change_or_nothing(nr_extents: int) -> None:
    """Threads look places up all over the map while these go from one file to the other and back, all at once."""
    target_map = Map(nr_extents * 8192)
    files = [Routing.all(File(target_map.add_file(i))) for i in range(2)]
    between = [Extent(i * 8192, 4096, Routing.all(Zero())) for i in range(nr_extents)]
    nr_places = min(nr_extents, 16)
    places = [(i * nr_extents // nr_places) * 8192 + 4096 for i in range(nr_places)]
    target_map.replace(between if nr_extents > 1 else [])
    states = [[Extent(place, 4096, routing, place) for place in places] for routing in files]
    target_map.replace(states[0])
    mixed: list[int] = []
    c_places = ffi.new("uint64_t[]", places)
    threads = [
        Thread(target=lambda: mixed.append(lib.um_probe(target_map.c, c_places, nr_places, 100_000 // nr_places)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    changes = 0
    while changes < 100 or any(thread.is_alive() for thread in threads):
        changes += 1
        target_map.replace(states[changes % 2])
    assert mixed == [0, 0, 0]
    assert (lib.um_check(target_map.c), target_map.stats().nr_dead) == (0, 0)
    target_map.close()


def test_probe_tells_what_differs(small: Map) -> None:
    small.replace([Extent(512, 512, ROUTINGS[1])])
    assert lib.um_probe(small.c, [0, 511, 1024], 3, 10) == 0
    assert lib.um_probe(small.c, [0, 512, 1024], 3, 10) == 10


@pytest.mark.parametrize("size", [0, -512, 511, 1 << 63])
def test_size_without_meaning(size: int) -> None:
    with pytest.raises(ValueError, match=f"size of {size} bytes"):
        Map(size)


@pytest.mark.parametrize(
    ("extents", "why"),
    [
        ([Extent(1, 512, ROUTINGS[0])], "extent of 512 bytes at 1: not multiples of 512"),
        ([Extent(0, 100, ROUTINGS[0])], "extent of 100 bytes at 0: not multiples of 512"),
        ([Extent(0, 0, ROUTINGS[0])], "extent of 0 bytes at 0: not within 32768 bytes"),
        ([Extent(-512, 1024, ROUTINGS[0])], "at -512: not within"),
        ([Extent(32256, 1024, ROUTINGS[0])], "at 32256: not within"),
        ([Extent(0, 512, ROUTINGS[1], -1)], "no file has an offset of -1 bytes"),
        ([Extent(0, 1024, ROUTINGS[0]), Extent(512, 512, ROUTINGS[0])], "extents at 0 and 512 overlap"),
        ([Extent(0, 1024, ROUTINGS[1], (1 << 63) - 1024)], "ends where no file can"),
        ([Extent(0, 512, Routing.all(File(0, -1)))], "begins before the start of a file"),
        ([Extent(0, 512, Routing.all(File(0, 1 << 63)))], "no file is that large"),
        ([Extent(0, 512, Routing.all(Stripe((0, 1), 512, -512)), 512)], "begins before the start of a file"),
        ([Extent(0, 512, Routing.all(File(3)))], "file 3 was not added to the map, which has 3"),
        ([Extent(0, 512, Routing.all(File(-1)))], "file -1 was not added"),
        ([Extent(0, 512, Routing.all(Error(0)))], "0 is not an errno"),
        ([Extent(0, 512, Routing.all(Stripe((), 512)))], "not 1 to 255 that were added one after the other"),
        ([Extent(0, 512, Routing.all(Stripe((1, 0), 512)))], "not 1 to 255 that were added one after the other"),
        ([Extent(0, 512, Routing.all(Mirror((0, 2), 512)))], "not 1 to 255 that were added one after the other"),
        ([Extent(0, 512, Routing.all(Mirror((0, 1), 512, -512)))], "begins before the start of a file"),
        ([Extent(0, 512, Routing.all(Stripe((0, 1), 1536)))], "chunk of 1536 bytes is not a power of two"),
        ([Extent(0, 512, Routing.all(Stripe((0, 1), 256)))], "chunk of 256 bytes"),
        ([Extent(0, 512, Routing.all(Faulty(Zero(), 2)))], "fault 2 was not added to the map, which has 2"),
        ([Extent(0, 512, Routing.all(Faulty(Zero(), -1)))], "fault -1 was not added"),
        ([Extent(0, 512, Routing.all(Faulty(File(3), 0)))], "file 3 was not added"),
        ([Extent(0, 512, Routing.all(Faulty(Sync((0,)), 0)))], "sync files is no action of an extent"),
        (
            [Extent(0, 512, Routing.all(Faulty(Error(5), 0)))],  # type: ignore[arg-type]
            "a fault cannot come before Error",
        ),
        (
            [Extent(0, 512, Routing.all(Faulty(Faulty(Zero(), 0), 1)))],  # type: ignore[arg-type]
            "a fault cannot come before Faulty",
        ),
    ],
)
def test_extents_without_meaning(small: Map, extents: list[Extent], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        small.replace([Extent(4096, 512, ROUTINGS[3]), *extents])
    assert list(small.extents()) == [Extent(0, small.size, ROUTINGS[0])]


def test_shifts_are_allowed_where_they_fit(small: Map) -> None:
    largest = (1 << 63) - 1
    small.replace(
        [
            Extent(0, 512, Routing.all(File(0, -512)), 512),
            Extent(512, 512, Routing.all(File(0, largest - 1024)), 512),
            Extent(1024, 512, Routing.all(Stripe((0, 1), 512, -512)), 1024),
        ]
    )
    assert small.count == 4


def test_c_takes_nothing_on_trust(small: Map) -> None:
    """What the Python side checks already."""
    bad: list[dict[str, int]] = [
        {"kind": lib.UM_STRIPE + 1},
        {"kind": lib.UM_NULL, "error": 5},
        {"kind": lib.UM_ERROR},
        {"kind": lib.UM_FILE, "slot": 3},
        {"kind": lib.UM_STRIPE, "slot": 1, "nr_legs": 3, "chunk_shift": 12},
        {"kind": lib.UM_STRIPE, "nr_legs": 3, "chunk_shift": 8},
        {"kind": lib.UM_STRIPE, "chunk_shift": 12},
        {"kind": lib.UM_NULL, "error": lib.UM_FIRST_FAULT + 2},
        {"kind": lib.UM_ERROR, "error": lib.UM_FIRST_FAULT},
    ]
    for action in bad:
        routing = ffi.new("struct um_routing *", {"actions": [{}, {}, {}, action]})
        assert lib.um_add_routing(small.c, routing) == -errno.EINVAL
    for piece in ((0, 513, 0, 0), (512, 512, 0, 0), (0, 33280, 0, 0), (0, 512, 0, 1)):
        extent = ffi.new("struct um_extent[1]", [piece])
        assert lib.um_replace(small.c, 0, extent, 1, ffi.NULL) == -errno.EINVAL
    for flush in ((lib.UM_ZERO, []), (lib.UM_NULL, [0]), (lib.UM_FILE, [3])):
        c_flush = ffi.new("struct um_flush *", {"kind": flush[0], "nr": len(flush[1]), "slots": flush[1]})
        assert lib.um_replace(small.c, 0, ffi.NULL, 0, c_flush) == -errno.EINVAL
    for error in (5, lib.UM_FIRST_FAULT + 2):
        c_flush = ffi.new("struct um_flush *", {"kind": lib.UM_NULL, "error": error, "slots": []})
        assert lib.um_replace(small.c, 0, ffi.NULL, 0, c_flush) == -errno.EINVAL
    good: dict[str, Any] = {"error": errno.EIO}
    for wrong in (
        {"delay": lib.UM_MAX_DELAY + 1},
        {"error_rate": 1.1},
        {"error_rate": float("nan")},
        {"error": 0},
        {"error": 4096},
        {"distribution": lib.UM_EXPONENTIAL + 1},
    ):
        assert lib.um_add_fault(small.c, ffi.new("struct um_fault *", good | wrong), ffi.NULL) == -errno.EINVAL
    assert small.count == 1


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (Fault(delay=-1), "a delay of -1 ns is not from 0 to an hour"),
        (Fault(delay=3600 * 10**9 + 1), "is not from 0 to an hour"),
        (Fault(distribution="normal"), "distribution 'normal' is not one of: constant, uniform, exponential"),  # type: ignore[arg-type]
        (Fault(error_rate=1.01), "an error rate of 1.01 is not from 0 to 1"),
        (Fault(error_rate=-0.01), "is not from 0 to 1"),
        (Fault(error_rate=float("nan")), "is not from 0 to 1"),
        (Fault(errno=0), "0 is not an errno"),
        (Fault(errno=4096), "4096 is not an errno"),
        (Fault(seed=-1), "does not fit into 64 bits"),
        (Fault(seed=1 << 64), "does not fit into 64 bits"),
        (Fault(while_file=Path("on")), "while_file on is not absolute"),
    ],
)
def test_faults_without_meaning(small: Map, fault: Fault, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        small.add_fault(fault)
    assert small.stats().nr_faults == 2


def test_faults_run_out(small: Map) -> None:
    fault = Fault(delay=1, while_file=Path("/on"))
    for nr in range(2, lib.UM_MAX_FAULTS):
        assert small.add_fault(fault) == nr
    with pytest.raises(OSError, match="fault for a map") as caught:
        small.add_fault(fault)
    assert caught.value.errno == errno.ENOSPC
    last = Faulty(Null(), lib.UM_MAX_FAULTS - 1)
    small.replace([Extent(0, 512, Routing.all(last))], last)
    reader = Reader(small)
    with reader:
        assert reader.hit(0).error == -(lib.UM_FIRST_FAULT + lib.UM_MAX_FAULTS - 1)
    reader.remove()


def test_a_flush_after_a_fault(small: Map) -> None:
    reader = Reader(small)
    for flush, kind in ((Sync((2, 0)), lib.UM_FILE), (Sync(()), lib.UM_NULL), (Upcall(), lib.UM_UPCALL)):
        small.set_flush(Faulty(flush, 1))
        with reader:
            now = reader.view.spaces[0].flush
            assert (now.kind, now.error) == (kind, lib.UM_FIRST_FAULT + 1)
    small.set_flush(Null())
    with reader:
        assert reader.view.spaces[0].flush.error == 0
    for wrong in (Faulty(Zero(), 0), Faulty(Null(), 2)):
        with pytest.raises(ValueError, match=r"is no flush|was not added"):
            small.set_flush(wrong)
    reader.remove()


def test_files_run_out(small: Map) -> None:
    for _ in range(3, lib.UM_MAX_FILES):
        small.add_file(0)
    with pytest.raises(OSError, match="file for a map") as caught:
        small.add_file(0)
    assert caught.value.errno == errno.ENOSPC
    last = lib.UM_MAX_FILES - 1
    small.replace([Extent(0, 512, Routing.all(File(last)))], Sync(tuple(range(last + 1))))
    with pytest.raises(ValueError, match="was not added"):
        small.set_flush(Sync((last + 1,)))


def test_routing_without_its_file() -> None:
    with pytest.raises(ValueError, match="file 0 was not added to the map, which has 0"):
        Map(512).fill(Routing.all(File(0)))


# -- spaces --------------------------------------------------------------------------------


def follow(maps: list[Map], space: int, pos: int, op: int) -> tuple[Any, int, int, int]:
    """What a byte comes to: the action, its offset there, and the space and position that say so."""
    if pos >= maps[space].size:
        return Error(errno.EIO), 0, space, pos
    (extent,) = maps[space].extents(pos, pos + 1)
    action = extent.routing.actions[op]
    match action:
        case Space(number, shift):
            return follow(maps, number, extent.offset + shift, op)
        case Spaces(numbers, chunk):
            nr, within = divmod(extent.offset, chunk)
            return follow(maps, numbers[nr % len(numbers)], nr // len(numbers) * chunk + within, op)
    return action, extent.offset, space, pos


def test_spaces_go_on_in_others() -> None:
    """What each sector of the device comes to, through up to three of them, and how far that holds."""
    chance = random.Random(3)
    sizes = [256 * 512, 100 * 512, 100 * 512, 300 * 512]
    maps = [Map(sizes[0])]
    maps += [maps[0].add_space(size) for size in sizes[1:]]
    assert [one.space for one in maps] == [0, 1, 2, 3]
    assert maps[0].stats().nr_spaces == 4
    maps[2].add_file(10)
    leaves = [Routing.all(Zero()), Routing.all(File(0)), Routing(Upcall(), Null(), Zero(), File(0, shift=4096))]
    ways = {
        0: [Routing.all(Spaces((1, 2), 1024)), Routing.all(Space(3, shift=512)), Routing.all(Spaces((1, 2, 3), 4096))],
        1: [Routing.all(Space(3)), Routing(Space(2), Space(3), Null(), Spaces((2, 3), 512))],
        2: [Routing.all(Space(3, shift=8192))],
        3: [],
    }
    reader = Reader(maps[0])
    for _ in range(200):
        space = chance.randrange(4)
        nr_sectors = sizes[space] // 512
        start = chance.randrange(nr_sectors)
        length = chance.randrange(1, nr_sectors - start + 1)
        routing = chance.choice(leaves + 3 * ways[space])
        maps[space].replace([Extent(start * 512, length * 512, routing, chance.randrange(200) * 512)])
        assert lib.um_check(maps[0].c) == 0
        with reader:
            for op in OPS:
                pos, held = 0, None
                for sector in range(sizes[0] // 512):
                    action, offset, where, at = follow(maps, 0, sector * 512, op)
                    hit = reader.hit(sector * 512, op)
                    expected = {
                        Error: lib.UM_ERROR,
                        File: lib.UM_FILE,
                        Zero: lib.UM_ZERO,
                        Upcall: lib.UM_UPCALL,
                        Null: lib.UM_NULL,
                    }[type(action)]
                    assert (hit.kind, hit.space, hit.at) == (expected, where, at)
                    if isinstance(action, File):
                        assert hit.offset == offset + action.shift
                    if held and sector * 512 < pos:  # the first answer held for it, too
                        assert (hit.kind, hit.space, hit.at) == (held[0], held[1], held[2] + sector * 512 - held[3])
                    else:
                        pos, held = hit.end, (hit.kind, hit.space, hit.at, sector * 512)
                    assert hit.end > sector * 512
    reader.remove()
    maps[0].close()


def test_flushes_of_spaces() -> None:
    found = Map(4096)
    others = [found.add_space(4096) for _ in range(2)]
    found.add_file(10)
    found.set_flush(Upcall())
    others[1].set_flush(Sync((0,), asks=True))
    reader = Reader(found)
    with reader:
        flushes = [reader.view.spaces[n].flush for n in range(3)]
        assert [one.kind for one in flushes] == [lib.UM_UPCALL, lib.UM_NULL, lib.UM_FILE]
        assert [one.asks for one in flushes] == [0, 0, 1]
    reader.remove()
    found.close()


@pytest.mark.parametrize(
    ("space", "action", "why"),
    [
        (0, Space(3), "space 3 was not added to the map, which has 3"),
        (0, Space(0), "space 0 was not added"),
        (0, Spaces((2, 1), 512), r"spaces \(2, 1\) are not 1 to 255 that were added one after the other"),
        (0, Spaces((1, 2), 1000), "chunk of 1000 bytes"),
        (1, Space(1), "in a space that was added before this one, 1"),
        (2, Space(1), "in a space that was added before this one, 2"),
        (1, Spaces((1, 2), 512), "in a space that was added before this one, 1"),
        (0, Faulty(Space(1), 0), "a fault cannot come before"),  # type: ignore[arg-type]
    ],
)
def test_spaces_that_cannot_be(space: int, action: Any, why: str) -> None:
    maps = [Map(4096)]
    maps += [maps[0].add_space(4096) for _ in range(2)]
    maps[0].add_fault(Fault())
    with pytest.raises(ValueError, match=why):
        maps[space].fill(Routing.all(action))
    maps[0].close()


def test_too_many_spaces() -> None:
    found = Map(512)
    for _ in range(4095):
        found.add_space(512)
    with pytest.raises(OSError, match="No space left") as caught:
        found.add_space(512)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(ValueError, match="not a positive multiple"):
        found.add_space(511)
    assert lib.um_check(found.c) == 0
    found.close()


def test_who_answers_for_a_space() -> None:
    found = Map(512)
    told: list[object] = []
    other = found.add_space(512, told.extend)
    assert found.answer(other.space) == told.extend
    assert found.answer(0) is None
    found.close()


def test_a_space_has_a_size_of_its_own() -> None:
    found = Map(4096)
    other = found.add_space(4096)
    other.add_file(10)
    other.fill(Routing.all(File(0)))
    other.resize(8192)
    assert list(other.extents()) == [Extent(0, 8192, Routing.all(File(0)))]
    assert list(found.extents()) == [Extent(0, 4096, Routing.all(Null()))]
    assert (found.size, found.count, other.size, other.count) == (4096, 1, 8192, 1)
    found.close()
