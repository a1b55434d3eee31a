"""A queue's thread, on files that are no ublk devices."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.device.targets import BlockingRam
from ublkpy.config import DeviceConfig, DeviceOptions
from ublkpy.daemon import server, worker
from ublkpy.daemon.host import Program
from ublkpy.daemon.plan import Plan
from ublkpy.daemon.server import Server
from ublkpy.daemon.worker import Worker
from ublkpy.errors import UblkError
from ublkpy.tgt import handlers
from ublkpy.tgt.null import NullTarget
from ublkpy.uring.map import Extent, File, Map, Routing
from ublkpy.uring.mode import MODES
from ublkpy.uring.queue import Call, Event, Memory
from ublkpy.uring.uapi import Op

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
    target_map = handlers.make_map(target, 1 << 20)
    if backing is not None:
        target_map.replace([Extent(0, 1 << 20, Routing.all(File(target_map.add_file(backing))))])
    mode = MODES["copy"]
    memory = Memory(fd, 3, 4, 4096)
    made = Worker(memory, 0, mode, target, target_map, cpus, nth, lambda: ended.append(threading.current_thread()))
    made.start()
    made.join(10)
    assert not made.is_alive()
    made.release()
    memory.close()
    return made, ended


def test_driver_that_refuses(refusing: int) -> None:
    cpus = {min(os.sched_getaffinity(0))}
    ran, ended = run(refusing, cpus)
    assert isinstance(ran.error, OSError)
    assert ran.error.errno == errno.EOPNOTSUPP
    assert ran.ready.is_set()
    assert not ran.serving
    assert ended == [ran]


def test_queue_that_cannot_be_set_up(refusing: int) -> None:
    ran, ended = run(refusing, {0}, backing=1 << 20)
    assert isinstance(ran.error, OSError)
    assert ran.error.errno == errno.EBADF
    assert "queue 3" in str(ran.error)
    assert ran.ready.is_set()
    assert len(ended) == 1


def test_state_names_thread_and_cpus(refusing: int) -> None:
    cpu = min(os.sched_getaffinity(0))
    ran, _ = run(refusing, {cpu})
    state = ran.state()
    assert (state.q_id, state.affinity) == (3, [cpu])
    assert state.tid == ran.native_id != os.getpid()


def test_cpus_that_do_not_exist_are_no_reason_to_fail(refusing: int, caplog: pytest.LogCaptureFixture) -> None:
    ran, _ = run(refusing, {8000})
    assert isinstance(ran.error, OSError)
    assert ran.error.errno == errno.EOPNOTSUPP, "it got as far as the driver"
    assert caplog.messages[0].startswith("queue 3 runs on any CPU: ")


def test_it_stays_on_one_of_its_cpus(refusing: int) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    for nth in range(2 * len(cpus)):
        ran, _ = run(refusing, set(cpus), nth=nth)
        assert ran.state().affinity == [cpus[nth % len(cpus)]]


def test_where_that_one_is_not_there_it_takes_any(refusing: int, caplog: pytest.LogCaptureFixture) -> None:
    cpus = {min(os.sched_getaffinity(0)), 1000}
    ran, _ = run(refusing, cpus, nth=1)
    assert ran.state().affinity == sorted(cpus)
    assert not caplog.messages


def test_affinity_and_signals_of_the_main_thread_stay(refusing: int) -> None:
    before = os.sched_getaffinity(0), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    run(refusing, {min(before[0])})
    assert (os.sched_getaffinity(0), signal.pthread_sigmask(signal.SIG_BLOCK, [])) == before


class Cut:
    """A queue that is cut off when the only request of its first batch, a WRITE, has ``begun``."""

    begun: threading.Event

    def __init__(self, *_args: object) -> None:
        self._calls: list[Call] = [(0, 512, 0, int(Op.WRITE), 3, 0)]

    def run(self) -> Event:
        if self._calls:
            return Event.UPCALLS
        assert self.begun.wait(60)
        raise OSError(errno.ECANCELED, "cut off")

    def calls(self) -> list[Call]:
        calls, self._calls = self._calls, []
        return calls

    def let_go(self, _piece: int) -> None:
        pass

    def data(self, _place: int, length: int, _what: int) -> memoryview:
        return memoryview(bytearray(length))

    def answer(self, _piece: int, _result: int) -> None:
        pass

    def close(self) -> None:
        pass


class Waiting(BlockingRam):
    """A method that returns when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go_on, self.ended = threading.Event(), threading.Event(), list[str]()

    def write(self, offset: int, buf: memoryview) -> None:
        self.begun.set()
        self.go_on.wait(60)
        self.ended.append("write")

    def stop_thread(self) -> None:
        self.ended.append("stop_thread")

    def stop(self) -> None:
        self.ended.append("stop")

    def close(self) -> None:
        self.ended.append("close")


@pytest.mark.parametrize("patience", [60.0, 0.05], ids=["in time", "late"])
def test_a_target_is_not_stopped_while_a_pool_is_in_its_methods(
    patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "Queue", Cut)
    monkeypatch.setattr(worker, "_POOL_END", patience)
    target = Waiting()
    monkeypatch.setattr(Cut, "begun", target.begun, raising=False)
    config = DeviceConfig(DeviceOptions(), target)
    made = Server(Plan(config, config.open(), 1), host=Program())
    told: list[tuple[bool, bool]] = []
    memory: Any = SimpleNamespace(q_id=0)
    serving: Worker = Worker(
        memory,
        0,
        MODES["copy"],
        target,
        Map(1 << 20),
        {0},
        0,
        lambda: told.append((serving.ready.is_set(), serving.serving)),
    )
    made._workers, made._started = [serving], True
    serving.start()
    assert target.begun.wait(60)
    if patience > 1:
        until_told = time.monotonic() + 30
        while not told and time.monotonic() < until_told:
            time.sleep(0.01)
        assert not made.close()
        assert serving.serving
    else:
        serving.join(60)
        assert (serving.serving, serving.is_inside()) == (False, True)
        assert not made.close()
    assert isinstance(serving.error, OSError)
    assert target.ended == ["stop_thread"]
    target.go_on.set()
    serving.join(60)
    assert serving._threads
    assert serving._threads.wait(60)
    assert made.close()
    assert target.ended == ["stop_thread", "write", "stop", "close"]
    assert told == [(True, True), (True, False)]


def test_a_target_that_keeps_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it again, and it is not closed."""

    class Keeping(Waiting):
        def start_thread(self) -> None:
            self.go_on.wait(60)

    monkeypatch.setattr(worker, "Queue", Cut)
    monkeypatch.setattr(server, "START_DEADLINE", 0.05)
    target = Keeping()
    config = DeviceConfig(DeviceOptions(), target)
    made: Any = Server(Plan(config, config.open(), 1), host=Program())
    monkeypatch.setattr(made, "_start_helper", lambda dev_id, force: None)
    memory: Any = SimpleNamespace(q_id=0)
    kept = Worker(memory, 0, MODES["copy"], target, Map(1 << 20), {0}, 0, made._wake)
    with pytest.raises(UblkError, match=r"target keeping has not returned from start_thread\(\)$") as caught:
        made._start_workers([kept])
    assert "a timeout of its own" in caught.value.hint
    began = time.monotonic()
    made.abandon(7)
    assert not made.close()
    assert time.monotonic() - began < 20
    assert target.ended == []
    target.go_on.set()
    threading.Thread.join(kept, 60)
    assert kept._queue is None
    assert made.close()
    assert target.ended == ["stop_thread", "close"]


def test_a_fork_waits_for_a_ring_to_be_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its child could not close it."""
    half_made, target = threading.Event(), Waiting()

    class Slow(Cut):
        def __init__(self, *_args: object) -> None:
            super().__init__()
            half_made.set()
            time.sleep(0.5)

    monkeypatch.setattr(worker, "Queue", Slow)
    monkeypatch.setattr(Slow, "begun", target.go_on, raising=False)
    memory: Any = SimpleNamespace(q_id=0)
    serving = Worker(memory, 0, MODES["copy"], target, Map(1 << 20), {0}, 0, lambda: None)
    serving.start()
    assert half_made.wait(60)
    pid = os.fork()
    if not pid:
        os._exit(0 if serving._queue else 1)
    assert os.waitpid(pid, 0)[1] == 0
    target.go_on.set()
    serving.join(60)
