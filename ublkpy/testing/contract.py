"""What every target owes to those who use its disk, as tests to inherit. With pytest and hypothesis."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ublkpy.testing.disk import Disk

_MOST = 64  # blocks of a request
_ROUNDS = 20


class Shadow:
    """A disk and a copy of what must be on it; None where that is the target's choice."""

    def __init__(self, disk: Disk, blocks: int) -> None:
        self.disk = disk
        self.blocks = blocks
        self._copy: list[bytes | None] = [None] * blocks

    def forget(self) -> None:
        """What was written so far; anything may be there."""
        self._copy = [None] * self.blocks

    def write(self, first: int, data: bytes, *, durable: bool = False) -> None:
        self.disk.write(first * self.disk.block, data, durable=durable)
        size = self.disk.block
        for n in range(len(data) // size):
            self._copy[first + n] = data[n * size : (n + 1) * size]

    def discard(self, first: int, count: int) -> None:
        self.disk.discard(first * self.disk.block, count * self.disk.block)
        self._copy[first : first + count] = [None] * count

    def write_zeroes(self, first: int, count: int) -> None:
        self.disk.write_zeroes(first * self.disk.block, count * self.disk.block)
        self._copy[first : first + count] = [bytes(self.disk.block)] * count

    def check(self, first: int, count: int) -> None:
        size = self.disk.block
        found = self.disk.read(first * size, count * size)
        assert len(found) == count * size
        for n in range(count):
            expected = self._copy[first + n]
            if expected is not None:
                assert found[n * size : (n + 1) * size] == expected, f"block {first + n} is not what was written"


def bytes_of(seed: int, length: int) -> bytes:
    """Bytes that nothing else would produce."""
    return random.Random(seed).randbytes(length)


def _errno(call: Callable[..., object], *args: object) -> int | None:
    try:
        call(*args)
    except OSError as e:
        return e.errno
    return None


class TargetContract:
    """Tests to inherit, in a class with a pytest fixture ``disk`` that gives a ``Disk``; see ``ublkpy.testing``.

    What a disk cannot do is skipped. A test that fails is an AssertionError with the number of the block.
    """

    @pytest.fixture
    def shadow(self, disk: Disk) -> Iterator[Shadow]:
        """The disk, with a copy of its first blocks to compare with."""
        shadow = Shadow(disk, min(disk.size // disk.block, 4 * _MOST))
        yield shadow
        if not disk.read_only:
            shadow.check(0, shadow.blocks)

    def test_each_end(self, disk: Disk) -> None:
        """The first and the last block, the largest request, and what reaches behind the end."""
        for offset in (0, disk.size - disk.block):
            if not disk.read_only:
                disk.write(offset, bytes_of(offset, disk.block))
                found = disk.read(offset, disk.block)
                assert found == bytes_of(offset, disk.block), f"the block at {offset} is not what was written"
            assert len(disk.read(offset, disk.block)) == disk.block
        assert _errno(disk.read, disk.size, disk.block) in (errno.ENXIO, errno.EIO, errno.EINVAL)

    def test_it_reads_the_same_twice(self, disk: Disk) -> None:
        """In one piece, and in a smaller one."""
        length = min(disk.size, _MOST * disk.block)
        assert disk.read(0, length) == disk.read(0, length)
        assert disk.read(0, length)[: disk.block] == disk.read(0, disk.block)

    def test_a_read_only_disk_takes_nothing(self, disk: Disk) -> None:
        """A write is refused (EPERM, EROFS or EACCES), and changes nothing."""
        if not disk.read_only:
            pytest.skip("this disk can be written")
        before = disk.read(0, disk.block)
        assert _errno(disk.write, 0, bytes_of(1, disk.block)) in (errno.EPERM, errno.EROFS, errno.EACCES)
        assert disk.read(0, disk.block) == before

    @pytest.mark.parametrize("name", ["write", "durable", "zero", "discard"])
    def test_what_is_beside_stays(self, shadow: Shadow, name: str) -> None:
        """What a request is about ends where it says."""
        if shadow.disk.read_only:
            pytest.skip("this disk cannot be written")
        if name == "discard" and not shadow.disk.can_discard:
            pytest.skip("this disk cannot discard")
        part = min(_MOST, shadow.blocks // 3)
        for first in (0, part, 2 * part):
            shadow.write(first, bytes_of(first, part * shadow.disk.block))
        self._do(shadow, name, part, part, 1)
        shadow.check(0, 3 * part)

    @settings(max_examples=_ROUNDS, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def test_what_was_written_is_there(self, shadow: Shadow, data: st.DataObject) -> None:
        """After any sequence of writes, discards, zeroes and flushes; the same disk goes on from one to the next."""
        if shadow.disk.read_only:
            pytest.skip("this disk cannot be written")
        shadow.forget()  # or a sequence that failed would not do so again, which hypothesis takes for a flaky test
        names = ["write", "durable", "read", "flush", "zero"] + (["discard"] if shadow.disk.can_discard else [])
        for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=12), label="operations"):
            first = data.draw(st.integers(0, shadow.blocks - 1))
            count = data.draw(st.integers(1, min(_MOST, shadow.blocks - first)))
            self._do(shadow, name, first, count, data.draw(st.integers(0, 2**32)))
        shadow.check(0, shadow.blocks)

    def _do(self, shadow: Shadow, name: str, first: int, count: int, seed: int) -> None:
        match name:
            case "write" | "durable":
                shadow.write(first, bytes_of(seed, count * shadow.disk.block), durable=name == "durable")
            case "read":
                shadow.check(first, count)
            case "zero":
                shadow.write_zeroes(first, count)
            case "discard":
                shadow.discard(first, count)
            case "flush":
                shadow.disk.flush()

    def test_requests_at_the_same_time(self, shadow: Shadow) -> None:
        """Side by side, none disturbs another."""
        disk, count = shadow.disk, min(16, shadow.blocks)
        if disk.read_only:
            pytest.skip("this disk cannot be written")
        data = [bytes_of(n, disk.block) for n in range(count)]
        calls: list[tuple[Any, ...]] = [("write", n * disk.block, data[n]) for n in range(count)]
        assert disk.together(calls) == [None] * count
        found = disk.together([("read", n * disk.block, disk.block) for n in range(count)])
        wrong = [n for n in range(count) if found[n] != data[n]]
        assert not wrong, f"blocks {wrong} are not what was written at the same time"

    def test_overlapping_requests(self, shadow: Shadow) -> None:
        """One of them wins, in each block."""
        disk, length = shadow.disk, min(8, shadow.blocks) * shadow.disk.block
        if disk.read_only:
            pytest.skip("this disk cannot be written")
        written = [bytes_of(n, length) for n in range(8)]
        calls: list[tuple[Any, ...]] = [("write", 0, data) for data in written]
        disk.together([*calls, ("read", 0, length), ("flush",)])
        found = disk.read(0, length)
        for place in range(0, length, disk.block):
            block = slice(place, place + disk.block)
            assert any(found[block] == data[block] for data in written), f"the block at {place} is of no request"
