"""The queue engine's edges: what can be had without the driver."""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ublkpy.uring.integrity import Integrity, Metadata
from ublkpy.uring.map import Extent, File, Map, Routing
from ublkpy.uring.mode import MODES
from ublkpy.uring.queue import IoError, Memory, Queue, Request, writable
from ublkpy.uring.uapi import Op

MIB = 1 << 20
OpenFds = Callable[[], set[str]]


@pytest.fixture
def target_map() -> Iterator[Map]:
    """Of nothing, until a test puts something there."""
    made = Map(MIB)
    yield made
    made.close()  # raises while a queue still reads it


def put_file(target_map: Map, fd: int) -> None:
    target_map.replace([Extent(0, MIB, Routing.all(File(target_map.add_file(fd))))])


def test_file_that_cannot_be_mapped(open_fds: OpenFds) -> None:
    fd = os.open("/dev/null", os.O_RDWR)
    before = open_fds()
    with pytest.raises(OSError, match="memory of queue 2") as caught:
        Memory(fd, 2, 4, 4096)
    assert caught.value.errno == errno.ENODEV
    assert open_fds() == before
    os.close(fd)


@pytest.mark.parametrize("files", [0, 1, 100])
def test_driver_that_refuses_every_fetch(files: int, open_fds: OpenFds, target_map: Map) -> None:
    before = open_fds()
    fd = os.open("/dev/zero", os.O_RDWR)
    for _ in range(files):
        put_file(target_map, fd)
    for depth in (1, 4, 128, 4096):
        memory = Memory(fd, 0, depth, 4096)
        queue = Queue(memory, MODES["copy"], target_map)
        with pytest.raises(OSError, match="queue: ") as caught:
            queue.run()
        assert caught.value.errno == errno.EOPNOTSUPP
        queue.close()
        memory.close()
    os.close(fd)
    assert open_fds() == before


def test_backing_that_is_not_open(open_fds: OpenFds, target_map: Map) -> None:
    fd = os.open("/dev/zero", os.O_RDWR)
    put_file(target_map, 1 << 20)
    before = open_fds()
    memory = Memory(fd, 0, 4, 4096)
    with pytest.raises(OSError, match="set-up of queue 0") as caught:
        Queue(memory, MODES["copy"], target_map)
    assert caught.value.errno == errno.EBADF
    memory.close()
    assert open_fds() == before
    os.close(fd)


@pytest.mark.parametrize("kept", [False, True])
def test_room_for_metadata_is_given_back(kept: bool, open_fds: OpenFds, target_map: Map) -> None:
    fd = os.open("/dev/zero", os.O_RDWR)
    put_file(target_map, fd)
    target_map.metadata = Metadata(Integrity(512, 255), 0 if kept else None)
    before = open_fds()
    for depth in (1, 128):
        memory = Memory(fd, 0, depth, 32 * MIB)
        queue = Queue(memory, MODES["user-copy"], target_map)
        with pytest.raises(OSError, match="queue: "):
            queue.run()
        queue.close()
        memory.close()
    assert open_fds() == before
    os.close(fd)


@pytest.fixture
def queue(target_map: Map) -> Iterator[Queue]:
    """One that has no driver, and so no requests but those that a test makes."""
    fd = os.open("/dev/zero", os.O_RDWR)
    memory = Memory(fd, 0, 4, 4096)
    # In a thread of its own: the kernel registers few rings for one (io_uring/tctx.h: IO_RINGFD_REG_MAX).
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(Queue, memory, MODES["copy"], target_map).result()
        yield made
        pool.submit(made.close).result()
    memory.close()
    os.close(fd)


def at_the_same_time(call: Callable[[], None]) -> Counter[str]:
    """What happened in each of several threads: the exception's name, or nothing."""
    together, happened = threading.Barrier(4), []

    def run() -> None:
        together.wait()
        try:
            call()
        except Exception as e:
            happened.append(type(e).__name__)
        else:
            happened.append("")

    threads = [threading.Thread(target=run) for _ in range(together.parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Counter(happened)


def test_threads_that_answer_one_request(queue: Queue) -> None:
    for _ in range(200):
        request = Request(queue, (0, 4096, 0, int(Op.READ), 0, 0, 0, 0))
        assert at_the_same_time(request.done) == {"": 1, "RuntimeError": 3}
        assert request.answered


def test_threads_that_look_at_the_data_of_requests(queue: Queue) -> None:
    def look() -> None:
        for _ in range(20000):
            with queue.data(4096, 4096, int(Op.READ)) as data:
                data[:1] = b"x"

    assert at_the_same_time(look) == {"": 4}
    assert bytes(queue.buffers[4096:4098]) == b"x\0"


@pytest.mark.parametrize(("op", "name"), [(0, "READ"), (1, "WRITE"), (5, "WRITE_ZEROES"), (4, "op 4"), (99, "op 99")])
def test_name_of_a_failed_operation(op: int, name: str) -> None:
    assert IoError(op, 0, errno.EIO, 1).op_name == name


@pytest.mark.parametrize(
    ("buffer", "error"),
    [(bytearray(7), "7 bytes are too few for a write of 8"), (bytes(8), "bytes is read-only"), (None, "bytes-like")],
)
def test_what_no_data_can_be_received_in(buffer: object, error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        writable(buffer, 8)


def test_what_data_can_be_received_in() -> None:
    message = bytearray(12)
    place = writable(memoryview(message)[4:], 8)
    place[:] = b"12345678"
    assert place.obj is message
    assert message[4:] == b"12345678"
