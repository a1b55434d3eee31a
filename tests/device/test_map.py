"""Requests, the extent map, and what it leaves to Python."""

from __future__ import annotations

import collections
import contextlib
import errno
import logging
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ublkpy.config import DeviceConfig, DeviceOptions
from ublkpy.life.add import add
from ublkpy.tgt.base import Target
from ublkpy.tgt.loop import LoopTarget
from ublkpy.tgt.null import NullTarget
from ublkpy.uring.map import Error, Extent, File, Map, Null, Routing, Stripe, Sync, Upcall, Zero
from ublkpy.uring.queue import Request
from ublkpy.uring.uapi import Op

from . import disk, kernel, load
from .devices import MIB, Device, Devices, until
from .targets import Mapped

SIZE = Mapped.size


def serve(devices: Devices, target: Target, mode: str = "auto", **options: object) -> Device:
    return devices.adopt(add(DeviceConfig(DeviceOptions({"mode": mode, **options}), target)))


@pytest.fixture
def open_file() -> Iterator[Callable[[Path], int]]:
    """Opens files for as long as the test lasts."""
    with contextlib.ExitStack() as stack:

        def opened(path: Path) -> int:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            return fd

        yield opened


@pytest.mark.any_kernel
def test_each_byte_comes_from_its_own_place(
    devices: Devices, scratch: Path, open_file: Callable[[Path], int], way: str
) -> None:
    """In turns, 4 KiB of one file, of another, zeroes, and of the first one again, from its end."""
    contents = [disk.pattern(SIZE), bytes(reversed(disk.pattern(SIZE)))]
    fds = [open_file(disk.image(scratch / f"file{n}", SIZE, content)) for n, content in enumerate(contents)]
    block = 4096

    def make(made: Map) -> None:
        size = made.size
        first, second = (Routing.all(File(made.add_file(fd, in_memory=fd == fds[1]))) for fd in fds)
        extents = []
        for start in range(0, size, 4 * block):
            extents.append(Extent(start, block, first, start))
            extents.append(Extent(start + block, block, second, start + block))
            extents.append(Extent(start + 2 * block, block, Routing.all(Zero())))
            extents.append(Extent(start + 3 * block, block, first, SIZE - start - 4 * block))
        made.replace(extents, Sync((0, 1)))

    device = serve(devices, Mapped(make), way)
    expected = bytearray()
    for start in range(0, SIZE, 4 * block):
        expected += contents[0][start : start + block]
        expected += contents[1][start + block : start + 2 * block]
        expected += bytes(block)
        expected += contents[0][SIZE - start - 4 * block : SIZE - start - 3 * block]
    assert disk.read(device.node, 0, SIZE) == expected
    disk.write(device.node, block // 2, b"w" * 4 * block)
    expected[block // 2 : 9 * block // 2] = b"w" * 4 * block
    expected[2 * block : 3 * block] = bytes(block)  # forgotten
    assert disk.read(device.node, 0, 5 * block) == expected[: 5 * block]


@pytest.mark.any_kernel
@pytest.mark.parametrize("chunk", [512, 65536])
def test_a_stripe_over_three_files(
    devices: Devices, scratch: Path, open_file: Callable[[Path], int], way: str, chunk: int
) -> None:
    """The device is shorter than its legs; more pieces than there are spares, where the chunk is small."""
    leg = 3 * MIB
    fds = [open_file(disk.image(scratch / f"leg{n}", leg)) for n in range(3)]

    def make(made: Map) -> None:
        size = made.size
        files = tuple(made.add_file(fd) for fd in fds)
        made.replace([Extent(0, size, Routing.all(Stripe(files, chunk)))], Sync(files))

    device = serve(devices, Mapped(make), way, depth=4)
    data = disk.pattern(SIZE)
    disk.write(device.node, 0, data)
    assert disk.read(device.node, 0, SIZE) == data
    legs = [(scratch / f"leg{n}").read_bytes() for n in range(3)]
    for number in range(0, SIZE // chunk, 37):
        at = number // 3 * chunk
        assert legs[number % 3][at : at + chunk] == data[number * chunk : (number + 1) * chunk]


@pytest.mark.any_kernel
def test_an_error_in_the_middle_fails_the_request(
    devices: Devices, scratch: Path, open_file: Callable[[Path], int], way: str
) -> None:
    fd = open_file(disk.image(scratch / "image", SIZE, disk.pattern(SIZE)))

    def make(made: Map) -> None:
        size = made.size
        file = Routing.all(File(made.add_file(fd)))
        made.replace([Extent(0, MIB, file), Extent(MIB, 4096, Routing.all(Error(errno.ENOSPC)))])
        made.replace([Extent(MIB + 4096, size - MIB - 4096, file, MIB + 4096)])

    device = serve(devices, Mapped(make), way)
    assert disk.read(device.node, 0, MIB) == disk.pattern(SIZE)[:MIB]
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        disk.read(device.node, MIB - 8192, 16384)
    assert disk.read(device.node, MIB + 4096, MIB) == disk.pattern(SIZE)[MIB + 4096 : 2 * MIB + 4096]


def test_python_answers_what_the_map_leaves_open(
    devices: Devices, scratch: Path, open_file: Callable[[Path], int], way: str
) -> None:
    """The second half of the device is a bytearray of the daemon."""
    fd = open_file(disk.image(scratch / "image", SIZE))
    memory = bytearray(SIZE)

    def make(made: Map) -> None:
        size = made.size
        file = Routing.all(File(made.add_file(fd)))
        made.replace([Extent(0, size // 2, file), Extent(size // 2, size // 2, Routing.all(Upcall()))], Upcall())

    def answer(requests: Sequence[Request]) -> None:
        for request in requests:
            where = slice(request.offset, request.offset + request.length)
            if request.op is Op.READ:
                request.buffer[:] = memory[where]
            elif request.op is Op.WRITE:
                memory[where] = request.buffer
            elif request.op in (Op.DISCARD, Op.WRITE_ZEROES):
                memory[where] = bytes(request.length)
            request.done()

    device = serve(devices, Mapped(make, answer), way)
    data = disk.pattern(SIZE)
    disk.write(device.node, 0, data)
    assert disk.read(device.node, 0, SIZE) == data
    crossing = SIZE // 2 - 4096
    disk.write(device.node, crossing, b"c" * 16384)
    assert disk.read(device.node, crossing, 16384) == b"c" * 16384
    load.verify(device.node, "--ioengine=libaio", "--iodepth=16", "--rw=randrw", "--bsrange=4k-128k", "--size=8m")


@pytest.mark.any_kernel
def test_the_map_changes_and_is_asked_again(
    devices: Devices, scratch: Path, open_file: Callable[[Path], int], way: str
) -> None:
    """The first write of each 64 KiB is an upcall that maps them; all others are not."""
    path = disk.image(scratch / "image", SIZE)
    fd = open_file(path)
    maps: list[Map] = []
    asked: list[int] = []

    def make(made: Map) -> None:
        size = made.size
        made.add_file(fd, in_memory=True)
        made.replace([Extent(0, size, Routing(Zero(), Upcall(), Null(), Upcall()))], Sync((0,)))
        maps.append(made)

    def answer(requests: Sequence[Request]) -> None:
        for request in requests:
            start = request.offset // 65536 * 65536
            asked.append(start)
            logging.getLogger("test").info("upcall %d", len(asked))
            maps[0].replace([Extent(start, 65536, Routing.all(File(0)), SIZE - 65536 - start)])
            request.retry()

    log = scratch / "log"
    device = serve(devices, Mapped(make, answer), way, log=log)
    data = disk.pattern(SIZE)
    disk.write(device.node, 0, data[:MIB])  # asked for all at once, and again for what is left after each answer
    for start in range(MIB, SIZE, 32768):
        disk.write(device.node, start, data[start : start + 32768])
    assert disk.read(device.node, 0, SIZE) == data
    assert log.read_text().count("upcall") == SIZE // 65536
    image = path.read_bytes()
    assert image[:65536] == data[SIZE - 65536 :]


@pytest.mark.any_kernel
def test_an_answer_that_leads_to_the_next_question(devices: Devices, scratch: Path, mode: str) -> None:
    """With one request in flight, nothing else would wake the queue."""
    asked: collections.Counter[tuple[Op, bool]] = collections.Counter()

    def answer(requests: Sequence[Request]) -> None:
        for request in requests:
            asked[request.op, request.early] += 1
            if asked[request.op, request.early] % 3:
                request.retry()
            elif request.early:
                request.receive(bytearray(request.length))
            else:
                request.done()

    device = serve(devices, Mapped(lambda made: made.fill(Routing.all(Upcall(early=True))), answer), mode)
    for start in range(0, MIB, 65536):
        disk.write(device.node, start, bytes(4096))
        disk.read(device.node, start, 4096)


@pytest.mark.any_kernel
@pytest.mark.parametrize(
    ("error", "expected"), [(OSError(errno.ENOSPC, "full"), errno.ENOSPC), (ValueError("a bug"), errno.EIO)]
)
def test_what_an_upcall_raises_is_the_answer(devices: Devices, scratch: Path, error: Exception, expected: int) -> None:
    def answer(requests: Sequence[Request]) -> None:
        raise error

    log = scratch / "log"
    device = serve(devices, Mapped(lambda made: made.fill(Routing.all(Upcall())), answer), log=log)
    with pytest.raises(OSError, match=os.strerror(expected)):
        disk.read(device.node, 0, 4096)
    assert ("ValueError: a bug" in log.read_text()) is (expected == errno.EIO)


@pytest.mark.any_kernel
def test_natively_means_without_python(devices: Devices, scratch: Path, way: str) -> None:
    """Under load, loop and null ask Python nothing."""
    asked = scratch / "asked"

    class Telling:
        def upcall(self, requests: Sequence[Request]) -> None:
            asked.touch()
            raise OSError(errno.EIO, "asked")

    class Loop(Telling, LoopTarget):
        pass

    class Null(Telling, NullTarget):
        pass

    file = disk.image(scratch / "image", SIZE)
    device = serve(devices, Loop({"file": file}), way, queues=2)
    load.verify(device.node, "--ioengine=libaio", "--iodepth=32", "--rw=randrw", "--bs=4k", "--size=2m", "--fsync=16")
    device = serve(devices, Null({"size": SIZE}), way, queues=2)
    with load.running(device, "--iodepth=32", "--rw=randrw", "--bs=4k", "--time_based", "--runtime=1") as fio:
        status, output = load.result(fio)
    assert status == 0, output
    assert not asked.exists()


@pytest.mark.any_kernel
def test_memory(devices: Devices, scratch: Path, open_file: Callable[[Path], int], way: str) -> None:
    """The outer parts in a file, the inner one in memory that is a file's mapping."""
    fd = open_file(disk.image(scratch / "image", SIZE))
    path = disk.image(scratch / "memory", SIZE)
    begin, end = MIB + 512, SIZE - MIB - 1024

    def make(made: Map) -> None:
        size = made.size
        file = Routing.all(File(made.add_file(fd)))
        memory = Routing.all(made.add_memory(mmap.mmap(open_file(path), SIZE)))
        made.replace(
            [Extent(0, begin, file), Extent(begin, end - begin, memory, begin), Extent(end, size - end, file, end)]
        )

    device = serve(devices, Mapped(make), way)
    data = disk.pattern(SIZE)
    disk.write(device.node, 0, data)
    assert disk.read(device.node, 0, SIZE) == data
    assert path.read_bytes() == bytes(begin) + data[begin:end] + bytes(SIZE - end)
    disk.write(device.node, begin - 512, b"b" * 1024)  # half in the one and half in the other
    assert disk.read(device.node, begin - 512, 1536) == b"b" * 1024 + data[begin + 512 : begin + 1024]
    disk.zero_unmapped(device.node, 2 * MIB, 65536)
    assert disk.read(device.node, 2 * MIB - 512, 66560) == (
        data[2 * MIB - 512 : 2 * MIB] + bytes(65536) + data[2 * MIB + 65536 : 2 * MIB + 66048]
    )
    load.verify(device.node, "--ioengine=libaio", "--iodepth=16", "--rw=randrw", "--bsrange=4k-128k", "--size=8m")


@pytest.mark.any_kernel
def test_a_write_goes_where_the_target_wants_it(
    devices: Devices, scratch: Path, open_file: Callable[[Path], int], way: str
) -> None:
    """Python names the buffer when it has seen the request, where the data is still with the driver (get-data)."""
    path = disk.image(scratch / "store", SIZE)
    store = mmap.mmap(open_file(path), SIZE)
    log = scratch / "log"

    def answer(requests: Sequence[Request]) -> None:
        for request in requests:
            where = slice(request.offset, request.offset + request.length)
            if request.early:
                logging.getLogger("test").info("early")
                with pytest.raises(RuntimeError, match="before its data"):
                    request.done()
                with pytest.raises(ValueError, match="too few"):
                    request.receive(bytearray(request.length - 1))
                if request.offset == 0:
                    request.fail(errno.ENOSPC)
                else:
                    request.receive(memoryview(store)[where])
                continue
            if request.op is Op.READ:
                request.buffer[:] = store[where]
            elif request.op is Op.WRITE:
                with pytest.raises(RuntimeError, match="there already"):
                    request.receive(bytearray(request.length))
                if way != "get-data":
                    store[where] = bytes(request.buffer)
                assert store[where] == request.buffer
            request.done()

    def make(made: Map) -> None:
        made.fill(Routing.all(Upcall(early=True)))

    device = serve(devices, Mapped(make, answer), way, log=log)
    data = disk.pattern(SIZE)
    disk.write(device.node, MIB, data[MIB:])
    assert disk.read(device.node, MIB, SIZE - MIB) == data[MIB:]
    assert path.read_bytes()[MIB:] == data[MIB:]
    if way == "get-data":
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            disk.write(device.node, 0, data[:4096])
        assert disk.read(device.node, 0, 4096) == bytes(4096)
    assert ("early" in log.read_text()) is (way == "get-data")
    assert "Traceback" not in log.read_text()
    load.verify(
        device.node, "--ioengine=libaio", "--iodepth=16", "--rw=randrw", "--bsrange=4k-64k", "--offset=1m", "--size=7m"
    )


@pytest.mark.any_kernel
@pytest.mark.parametrize("mode", ["copy", "auto"])
def test_waiting_for_what_is_on_its_way(devices: Devices, scratch: Path, mode: str) -> None:
    """A read of a slow disk is on its way when the map changes below it: that can be waited for."""
    maps: list[Map] = []
    say = logging.getLogger("test").info

    def change() -> None:
        maps[0].replace([Extent(0, MIB, Routing.all(Zero()))])
        maps[0].drain(MIB, MIB, 10)
        say("another range: at once")
        with pytest.raises(TimeoutError, match="requests that are under way"):
            maps[0].drain(0, MIB, 0.1)
        say("too soon: TimeoutError")
        maps[0].drain(0, 512, 10)
        say("this range: drained")

    def answer(requests: Sequence[Request]) -> None:
        begin = any(request.offset == 5 * MIB + 4096 for request in requests)
        for request in requests:
            request.done()
        if begin:
            with pytest.raises(OSError, match="requests that are under way") as caught:
                maps[0].drain(0, MIB, 10)
            assert caught.value.errno == errno.EDEADLK
            threading.Thread(target=change).start()

    log = scratch / "log"
    settings = {"size": str(SIZE // MIB), "irqmode": "2", "completion_nsec": "1000000000"}
    with kernel.null_block(scratch, "slow", **settings) as node, ThreadPoolExecutor() as pool:
        fd = os.open(node, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)  # past the page cache

        def make(made: Map) -> None:
            size = made.size
            slow = Routing.all(File(made.add_file(fd, is_block_device=True)))
            made.replace([Extent(0, MIB, slow), Extent(MIB, size - MIB, Routing.all(Upcall()))])
            maps.append(made)

        device = serve(devices, Mapped(make, answer), mode, log=log, queues=2)
        slow = pool.submit(disk.read, device.node, 0, 4096)
        inflight = Path(f"/sys/block/{device.node.name}/inflight")
        until(lambda: inflight.read_text().split()[0] == "1", "the slow read is on its way")
        disk.read(device.node, 5 * MIB + 4096, 4096)
        until(lambda: "TimeoutError" in log.read_text(), "what need not wait has not waited")
        assert not slow.done()
        assert "drained" not in log.read_text()
        slow.result(10)
        until(lambda: "this range: drained" in log.read_text(), "the range is drained")
        assert disk.read(device.node, 0, 4096) == bytes(4096)
        devices.remove(device)
        os.close(fd)
