"""What befalls requests where the map names a fault: delays by the ring, and errors, without Python."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ublkpy import Device, Request
from ublkpy.uring.map import Extent, Fault, Faulty, File, Map, Memory, Null, Routing, Stripe, Sync, Upcall
from ublkpy.uring.uapi import Op

from . import disk, load
from .devices import MIB, until
from .targets import Mapped

pytestmark = [pytest.mark.any_kernel, pytest.mark.logs]

SIZE = Mapped.size
OLD, NEW = disk.pattern(SIZE), disk.pattern(SIZE, 1)
SECOND = 10**9  # of a delay


@pytest.fixture
def file(scratch: Path) -> Iterator[int]:
    """A backing file, full of OLD."""
    fd = os.open(disk.image(scratch / "image", SIZE, OLD), os.O_RDWR | os.O_CLOEXEC)
    yield fd
    os.close(fd)


@pytest.fixture
def switch(scratch: Path) -> Path:
    """A file that is not there, so that the kernel's look for partitions meets no fault."""
    return scratch / "on"


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as threads:
        yield threads


def over(fault: Fault, fd: int, *, start: int = 0, length: int = SIZE) -> Callable[[Map], None]:
    """A map of the file, with the fault in one range."""

    def make(made: Map) -> None:
        size = made.size
        number, action = made.add_fault(fault), File(made.add_file(fd))
        made.replace([Extent(0, size, Routing.all(action))])
        made.replace([Extent(start, length, Routing.all(Faulty(action, number)), start)])

    return make


def under_way(device: Device) -> int:
    """Requests that the driver has, and no answer to."""
    found = Path(f"/sys/block/ublkb{device.dev_id}/inflight").read_text().split()
    return sum(map(int, found))


def turn_on(device: Device, switch: Path) -> None:
    """From now on, the requests are the test's."""
    until(lambda: under_way(device) == 0, "the kernel has looked for partitions")
    switch.touch()


def outcomes(node: Path, number: int) -> list[bool]:
    """Which of so many reads, one after the other, fail."""

    def fails(nr: int) -> bool:
        try:
            disk.read(node, nr % 1024 * 512, 512)
        except OSError:
            return True
        return False

    return [fails(nr) for nr in range(number)]


def test_what_is_late_holds_up_nothing_else(file: int, pool: ThreadPoolExecutor, way: str) -> None:
    """More of it than the queue has places, and parts of requests."""
    target = Mapped(over(Fault(delay=3 * SECOND), file, start=MIB, length=MIB))
    with Device(target, mode=way, depth=16) as device:
        node = Path(device.node)
        begin = time.monotonic()
        late = [pool.submit(disk.read, node, MIB + nr * 4096, 4096) for nr in range(7)]
        late.append(pool.submit(disk.read, node, 2 * MIB - 4096, 8192))
        until(lambda: under_way(device) == 8, "all are under way")
        disk.write(node, 0, NEW[:4096])
        assert disk.read(node, 0, 8192) == NEW[:4096] + OLD[4096:8192]
        assert not any(one.done() for one in late)
        got = [one.result() for one in late]
        assert time.monotonic() - begin >= 3
    assert got[:7] == [OLD[MIB + nr * 4096 :][:4096] for nr in range(7)]
    assert got[7] == OLD[2 * MIB - 4096 : 2 * MIB + 4096]


@pytest.mark.parametrize("delay", [0, 10**7])
def test_what_fails_does_nothing(file: int, way: str, delay: int) -> None:
    """Exact to the sector, also where only a part of a request is in that range."""
    fault = Fault(delay=delay, error_rate=1, errno=errno.ENOSPC)
    target = Mapped(over(fault, file, start=MIB, length=512))
    with Device(target, mode=way) as device:
        node = Path(device.node)
        for start, length in ((MIB, 512), (MIB - 512, 1024), (MIB, 4096)):
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                disk.write(node, start, NEW[:length])
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            disk.zero_unmapped(node, MIB, 512)
        assert os.pread(file, 512, MIB) == OLD[MIB : MIB + 512]
        disk.write(node, MIB - 512, NEW[:512])
        disk.write(node, MIB + 512, NEW[512:1024])
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            disk.read(node, MIB, 512)
    assert os.pread(file, 1536, MIB - 512) == NEW[:512] + OLD[MIB : MIB + 512] + NEW[512:1024]


def test_memory_keeps_what_a_failed_write_would_change(mode: str) -> None:
    """Also where the driver could have put the data right there."""
    with mmap.mmap(-1, SIZE) as memory:
        memory[:] = OLD

        def make(made: Map) -> None:
            size = made.size
            place: Memory = made.add_memory(memory)
            error, delay = made.add_fault(Fault(error_rate=1)), made.add_fault(Fault(delay=10**6))
            made.replace([Extent(0, MIB, Routing.all(Faulty(place, error)))])
            made.replace([Extent(MIB, size - MIB, Routing.all(Faulty(place, delay)), MIB)])

        with Device(Mapped(make), mode=mode) as device:
            node = Path(device.node)
            with pytest.raises(OSError, match="Input/output error"):
                disk.write(node, 0, NEW[:65536])
            assert memory[:65536] == OLD[:65536]
            disk.write(node, MIB, NEW[:65536])
            assert disk.read(node, MIB, 65536) == memory[MIB : MIB + 65536] == NEW[:65536]
            disk.zero_unmapped(node, MIB, 65536)
            assert memory[MIB : MIB + 65536] == bytes(65536)


def test_the_map_is_asked_after_the_delay(
    scratch: Path, file: int, pool: ThreadPoolExecutor, switch: Path, way: str
) -> None:
    """It has changed by then: nobody waits for what is delayed, and no other fault befalls it."""
    other = os.open(disk.image(scratch / "other", SIZE, NEW), os.O_RDWR | os.O_CLOEXEC)
    maps: list[Map] = []

    def make(made: Map) -> None:
        over(Fault(delay=3 * SECOND, while_file=switch), file)(made)
        maps.append(made)

    with Device(Mapped(make), mode=way) as device:
        turn_on(device, switch)
        late = pool.submit(disk.read, Path(device.node), 0, 65536)
        until(lambda: under_way(device) == 1, "it is under way")
        (found,) = maps
        action = Faulty(File(found.add_file(other)), found.add_fault(Fault(error_rate=1)))
        found.replace([Extent(0, 8192, Routing.all(action)), Extent(8192, 4096, Routing.all(Null()))])
        found.drain(0, SIZE, 20)
        assert not late.done()
        got = late.result()
    os.close(other)
    assert got[:8192] == NEW[:8192]
    assert got[12288:] == OLD[12288:65536]


def test_python_is_asked_after_the_fault_and_once(file: int, way: str) -> None:
    """It maps what it is asked for to where everything fails, and only what comes later does."""
    maps: list[Map] = []
    asked: list[Op] = []

    def make(made: Map) -> None:
        size = made.size
        maps.append(made)
        action = Faulty(Upcall(early=True), made.add_fault(Fault(delay=10**7)))
        made.replace([Extent(0, size, Routing.all(action))], Faulty(Upcall(), 0))

    def answer(requests: Sequence[Request]) -> None:
        (found,) = maps
        for request in requests:
            if request.op is Op.READ:  # the kernel's look for partitions
                request.done()
                continue
            asked.append(request.op)
            if request.op is Op.FLUSH:
                request.fail(errno.ENODATA)
                continue
            if request.op is Op.WRITE and request.offset == 0:
                assert bytes(request.buffer) == NEW[:4096]
                error = found.add_fault(Fault(error_rate=1))
                action = Faulty(File(found.add_file(file)), error)
                found.replace([Extent(0, SIZE, Routing.all(action))])
            request.retry()

    with Device(Mapped(make, answer), mode=way) as device:
        node = Path(device.node)
        disk.write(node, 0, NEW[:4096])
        with pytest.raises(OSError, match="Input/output error"):
            disk.write(node, 0, OLD[:4096])
        with pytest.raises(OSError, match="No data available"):
            disk.flush(node)
    assert asked == [Op.WRITE, Op.FLUSH]
    assert os.pread(file, 4096, 0) == NEW[:4096]


def test_more_parts_than_there_are_places_for(scratch: Path, way: str) -> None:
    """Each is late, by a time of its own."""
    fds = [os.open(disk.image(scratch / f"leg{n}", SIZE), os.O_RDWR | os.O_CLOEXEC) for n in range(2)]

    def make(made: Map) -> None:
        size = made.size
        files = tuple(made.add_file(fd) for fd in fds)
        action = Faulty(Stripe(files, 512), made.add_fault(Fault(delay=10**6, distribution="exponential")))
        made.replace([Extent(0, size, Routing.all(action))], Faulty(Sync(files), 0))

    with Device(Mapped(make), mode=way, depth=4) as device:
        options = ("--ioengine=libaio", "--iodepth=8", "--rw=randrw", "--bsrange=512-256k", "--size=2m", "--fsync=8")
        load.verify(Path(device.node), *options)
    for fd in fds:
        os.close(fd)


def test_a_flush_fails_once_for_all_its_files(scratch: Path, file: int) -> None:
    other = os.open(disk.image(scratch / "other", SIZE), os.O_RDWR | os.O_CLOEXEC)

    def make(made: Map) -> None:
        size = made.size
        files = made.add_file(file), made.add_file(other)
        fault = made.add_fault(Fault(delay=10**6, error_rate=0.5, seed=3))
        made.replace([Extent(0, size, Routing.all(File(files[0])))], Faulty(Sync(files), fault))

    failed = 0
    with Device(Mapped(make)) as device:
        for _ in range(100):
            try:
                disk.flush(Path(device.node))
            except OSError:
                failed += 1
    os.close(other)
    assert 30 <= failed <= 70  # 75 of 100 would be two throws for each


def test_the_same_requests_fail_again_with_the_same_seed(
    file: int, switch: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And the log says that it was no accident."""

    def run(seed: int, delay: int = 0) -> list[bool]:
        switch.unlink(missing_ok=True)
        with Device(Mapped(over(Fault(delay, error_rate=0.25, while_file=switch, seed=seed), file))) as device:
            turn_on(device, switch)
            return outcomes(Path(device.node), 400)

    with caplog.at_level(logging.ERROR):
        first = run(seed=1)
    assert 65 <= sum(first) <= 135
    said = [record.message for record in caplog.records if "failed so far" in record.message]
    assert said[0].endswith("failed: Input/output error (1 failed so far, 1 of them injected)")
    assert said[-1].endswith("(64 failed so far, 64 of them injected)")
    assert run(seed=1) == first
    assert run(seed=2) != first
    assert run(seed=1, delay=10**5) == first


@pytest.mark.parametrize("distribution", ["uniform", "exponential"])
def test_delays_are_around_their_mean(file: int, distribution: str) -> None:
    """One after the other, so that their sum is what the test waits for at least."""
    number, mean = 100, 0.02
    fault = Fault(delay=int(mean * SECOND), distribution=distribution)  # type: ignore[arg-type]
    with Device(Mapped(over(fault, file))) as device:
        begin = time.monotonic()
        times = []
        for _ in range(number):
            before = time.monotonic()
            disk.read(Path(device.node), 0, 512)
            times.append(time.monotonic() - before)
        assert time.monotonic() - begin >= number * mean * 0.7
    assert max(times) - min(times) >= mean


def test_only_while_a_file_is_there(file: int, switch: Path) -> None:
    """The very next request knows."""
    with Device(Mapped(over(Fault(error_rate=1, while_file=switch), file))) as device:
        node = Path(device.node)
        for _ in range(3):
            assert outcomes(node, 3) == [False] * 3
            switch.touch()
            assert outcomes(node, 3) == [True] * 3
            switch.unlink()
        switch.mkdir()
        assert outcomes(node, 1) == [True]


def test_what_is_late_is_answered_before_the_device_goes(
    file: int, pool: ThreadPoolExecutor, switch: Path, way: str
) -> None:
    """A device that is stopped waits for it, as for any request."""
    with Device(Mapped(over(Fault(delay=2 * SECOND, while_file=switch), file)), mode=way) as device:
        turn_on(device, switch)
        late = [pool.submit(disk.read, Path(device.node), nr * 4096, 4096) for nr in range(8)]
        until(lambda: under_way(device) == 8, "all are under way")
    assert [one.result() for one in late] == [OLD[nr * 4096 :][:4096] for nr in range(8)]
