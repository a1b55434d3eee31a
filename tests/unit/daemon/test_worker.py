"""A queue's thread, on files that are no ublk devices."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from ublkpy.daemon.worker import Worker
from ublkpy.tgt.null import NullTarget
from ublkpy.uring.map import Extent, File, Routing
from ublkpy.uring.mode import MODES
from ublkpy.uring.queue import Memory

OpenFds = Callable[[], set[str]]


@pytest.fixture
def refusing() -> Iterator[int]:
    """A file that can be mapped but takes no commands."""
    fd = os.open("/dev/zero", os.O_RDWR)
    yield fd
    os.close(fd)


def run(fd: int, cpus: set[int], backing: int | None = None, nth: int = 0) -> tuple[Worker, list[threading.Thread]]:
    """A worker that has ended, and the threads from which it said so."""
    ended: list[threading.Thread] = []
    target = NullTarget({"size": 1 << 20})
    target_map = target.map(1 << 20)
    if backing is not None:
        target_map.replace([Extent(0, 1 << 20, Routing.all(File(target_map.add_file(backing))))])
    mode = MODES["copy"]
    memory = Memory(fd, 3, 4, 4096)
    worker = Worker(memory, 0, mode, target, target_map, cpus, nth, lambda: ended.append(threading.current_thread()))
    worker.start()
    worker.join(10)
    assert not worker.is_alive()
    worker.release()
    memory.close()
    return worker, ended


def test_driver_that_refuses(refusing: int) -> None:
    cpus = {min(os.sched_getaffinity(0))}
    worker, ended = run(refusing, cpus)
    assert isinstance(worker.error, OSError)
    assert worker.error.errno == errno.EOPNOTSUPP
    assert worker.ready.is_set()
    assert not worker.serving
    assert ended == [worker]


def test_queue_that_cannot_be_set_up(refusing: int) -> None:
    worker, ended = run(refusing, {0}, backing=1 << 20)
    assert isinstance(worker.error, OSError)
    assert worker.error.errno == errno.EBADF
    assert "queue 3" in str(worker.error)
    assert worker.ready.is_set()
    assert len(ended) == 1


def test_state_names_thread_and_cpus(refusing: int) -> None:
    cpu = min(os.sched_getaffinity(0))
    worker, _ = run(refusing, {cpu})
    state = worker.state()
    assert (state.q_id, state.affinity) == (3, [cpu])
    assert state.tid == worker.native_id != os.getpid()


def test_cpus_that_do_not_exist_are_no_reason_to_fail(refusing: int, caplog: pytest.LogCaptureFixture) -> None:
    worker, _ = run(refusing, {8000})
    assert isinstance(worker.error, OSError)
    assert worker.error.errno == errno.EOPNOTSUPP, "it got as far as the driver"
    assert caplog.messages[0].startswith("queue 3 runs on any CPU: ")


def test_it_stays_on_one_of_its_cpus(refusing: int) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    for nth in range(2 * len(cpus)):
        worker, _ = run(refusing, set(cpus), nth=nth)
        assert worker.state().affinity == [cpus[nth % len(cpus)]]


def test_where_that_one_is_not_there_it_takes_any(refusing: int, caplog: pytest.LogCaptureFixture) -> None:
    cpus = {min(os.sched_getaffinity(0)), 1000}
    worker, _ = run(refusing, cpus, nth=1)
    assert worker.state().affinity == sorted(cpus)
    assert not caplog.messages


def test_affinity_and_signals_of_the_main_thread_stay(refusing: int) -> None:
    before = os.sched_getaffinity(0), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    run(refusing, {min(before[0])})
    assert (os.sched_getaffinity(0), signal.pthread_sigmask(signal.SIG_BLOCK, [])) == before
