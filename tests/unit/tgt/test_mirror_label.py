"""What a mirror writes at the end of its legs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ublkpy.errors import UblkError
from ublkpy.tgt import mirror_label
from ublkpy.tgt.mirror_label import ROOM, Label

MIB = 1 << 20


def label(event: int = 1, size: int = 8 * MIB, **changes: object) -> Label:
    values = {"uuid": bytes(range(16)), "in_sync": (True, False), "index": 1, "dirty": bytes([1, 0] * 4)} | changes
    return Label(event=event, size=size, **values)  # type: ignore[arg-type]


@pytest.fixture
def leg(tmp_path: Path) -> int:
    fd = os.open(tmp_path / "leg", os.O_RDWR | os.O_CREAT)
    os.truncate(fd, 8 * MIB + ROOM + 700)
    return fd


END = 8 * MIB + ROOM + 700


def test_what_is_written_is_read(leg: int) -> None:
    assert mirror_label.read(leg, END) is None
    for event in (1, 2, 3):
        mirror_label.write(leg, END, label(event))
        assert mirror_label.read(leg, END) == label(event)
    assert os.pread(leg, 8 * MIB, 0) == bytes(8 * MIB)
    assert label().of(0).index == 0
    os.close(leg)


@pytest.mark.parametrize("cut", [0, 1, 100, 4095, 4096, 5000])
def test_one_that_is_torn_does_not_count(leg: int, cut: int) -> None:
    mirror_label.write(leg, END, label(2))
    before = os.pread(leg, ROOM, mirror_label.room_at(END))
    mirror_label.write(leg, END, label(3, dirty=bytes([0, 1] * 4)))
    new = os.pread(leg, ROOM, mirror_label.room_at(END))
    at = mirror_label.RECORD  # of an odd event
    os.pwrite(leg, new[: at + cut] + before[at + cut :], mirror_label.room_at(END))
    found = mirror_label.read(leg, END)
    assert found == label(2) if cut < 4097 else found == label(3, dirty=bytes([0, 1] * 4))
    os.close(leg)


def test_any_flipped_byte_is_found(leg: int) -> None:
    mirror_label.write(leg, END, label(2))
    at = mirror_label.room_at(END)
    for place in (3, 24, 40, 48, 56, 64, 66, 128, 129, 4096):
        (byte,) = os.pread(leg, 1, at + place)
        os.pwrite(leg, bytes([byte ^ 4]), at + place)
        assert mirror_label.read(leg, END) is None
        os.pwrite(leg, bytes([byte]), at + place)
    assert mirror_label.read(leg, END) == label(2)
    os.close(leg)


def test_a_later_version_is_not_guessed_at(leg: int) -> None:
    mirror_label.write(leg, END, label(2))
    os.pwrite(leg, b"\2", mirror_label.room_at(END) + 16)
    with pytest.raises(UblkError, match="label of version 2"):
        mirror_label.read(leg, END)
    os.close(leg)


@given(st.integers(1, 1 << 50).map(lambda n: n * 4096))
def test_the_bitmap_of_any_size_has_room(size: int) -> None:
    region = mirror_label.region_of(size)
    assert region >= MIB
    assert region & (region - 1) == 0
    assert (mirror_label.nr_regions(size) - 1) * region < size <= mirror_label.nr_regions(size) * region
    assert mirror_label.nr_regions(size) <= (mirror_label.RECORD - mirror_label.BLOCK) * 8


def test_a_large_bitmap(leg: int) -> None:
    count = mirror_label.nr_regions(200 << 30)
    large = label(2, 200 << 30, dirty=bytes(n % 3 == 0 for n in range(count)))
    mirror_label.write(leg, END, large)
    assert mirror_label.read(leg, END) == large
    os.close(leg)


@pytest.mark.parametrize("end", [0, 100, ROOM, ROOM + 4095])
def test_a_leg_without_room(leg: int, end: int) -> None:
    assert mirror_label.read(leg, end) is None
    os.close(leg)
