"""Several threads that serve one queue."""

from __future__ import annotations

import os
import re
import resource
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from ublkpy.config import DeviceConfig, DeviceOptions
from ublkpy.driver import inspect
from ublkpy.driver.ctrl import Control
from ublkpy.errors import ExitCode, UblkError
from ublkpy.life.add import add
from ublkpy.life.recover import recover
from ublkpy.system.spawn import wait_end
from ublkpy.tgt.base import Geometry, Target
from ublkpy.upcall.raw import Raw
from ublkpy.uring.map import Map, Routing, Upcall
from ublkpy.uring.mode import MODES
from ublkpy.uring.queue import Request
from ublkpy.uring.uapi import Feature, Op

from . import disk, load, program
from .devices import MIB, Device, Devices, until

MIXED = ["--ioengine=libaio", "--iodepth=32", "--rw=randrw", "--bssplit=4k/50:8k/20:12k/10:64k/15:512k/5", "--size=8m"]


@pytest.fixture(params=list(MODES))
def mode(request: pytest.FixtureRequest) -> str:
    """Each mode in which this driver lets several threads serve a queue."""
    wanted = MODES[request.param]
    missing = (wanted.flags if wanted.batch else wanted.flags | Feature.PER_IO_DAEMON) & ~inspect.features()
    if missing:
        pytest.skip(f"this driver lacks {missing!r}")
    return str(request.param)


@pytest.fixture(params=["copy", "batch+copy"])
def protocol(request: pytest.FixtureRequest) -> str:
    """A mode of each kind, where it does not matter how the data travels."""
    if Feature.PER_IO_DAEMON not in inspect.features() or MODES[request.param].flags & ~inspect.features():
        pytest.skip(f"this driver has no {request.param} with several threads")
    return str(request.param)


@pytest.fixture
def several() -> None:
    """Only where it is possible at all."""
    if Feature.PER_IO_DAEMON not in inspect.features():
        pytest.skip("this driver has one thread per queue")


def threads(device: Device) -> list[tuple[int, int]]:
    """(q_id, tid) of each."""
    known = device.status().known
    assert known
    return [(queue.q_id, queue.tid) for queue in known.queues]


def sleeps(device: Device) -> dict[int, int]:
    """How often each thread has waited so far: it does when it has served what there was."""
    found = {}
    for _, tid in threads(device):
        status = Path(f"/proc/{device.pid}/task/{tid}/status").read_text()
        found[tid] = int(re.findall(r"^voluntary_ctxt_switches:\s*(\d+)", status, re.MULTILINE)[0])
    return found


class InMemory(Target):
    """A device in the daemon's memory, all of it upcalls; tells which threads answered."""

    name = "memory"

    def __init__(self, told: Path) -> None:
        super().__init__({})
        self._told = told
        self._data = bytearray(8 * MIB)

    def open(self) -> Geometry:
        return Geometry(8 * MIB)

    def map(self, target_map: Map) -> None:
        target_map.fill(Routing.all(Upcall()), Upcall())

    def upcall(self, requests: Sequence[Request]) -> None:
        (self._told / str(threading.get_native_id())).touch()
        for request in requests:
            where = slice(request.offset, request.offset + request.length)
            if request.op is Op.READ:
                request.buffer[:] = self._data[where]
            elif request.op is Op.WRITE:
                self._data[where] = request.buffer
            request.done()


def serve(devices: Devices, target: Target, **options: object) -> Device:
    return devices.adopt(add(DeviceConfig(DeviceOptions(options), target)))


# -- data, and who serves it ----------------------------------------------------------------


def test_all_threads_serve_and_keep_what_fio_writes(devices: Devices, scratch: Path, mode: str) -> None:
    file = disk.image(scratch / "image", 16 * MIB)
    device = devices.loop(file, mode=mode, queues=2, depth=32, threads_per_queue=2)
    assert [q_id for q_id, _ in threads(device)] == [0, 0, 1, 1]
    before = sleeps(device)
    load.verify(device.node, *MIXED, "--numjobs=2", "--offset_increment=8m")
    after = sleeps(device)
    busy = [q_id for q_id, tid in threads(device) if after[tid] > before[tid] + 20]
    # Of one queue at least: both jobs may run on the CPU of the same.
    assert any(busy.count(q_id) == 2 for q_id in range(2)), (before, after)
    assert disk.read(device.node, 0, 16 * MIB) == file.read_bytes()
    assert any(file.read_bytes())


@pytest.mark.parametrize(("depth", "count"), [(2, 2), (5, 3), (17, 4)])
def test_depths_that_are_no_multiple_of_the_threads(
    devices: Devices, scratch: Path, protocol: str, depth: int, count: int
) -> None:
    file = disk.image(scratch / "image", 8 * MIB)
    device = devices.loop(file, mode=protocol, depth=depth, threads_per_queue=count)
    before = sleeps(device)
    load.verify(device.node, *MIXED)
    after = sleeps(device)
    assert all(after[tid] > before[tid] for tid in after), (before, after)
    assert disk.read(device.node, 0, 8 * MIB) == file.read_bytes()


def test_python_answers_in_each_of_them(devices: Devices, scratch: Path, protocol: str) -> None:
    device = serve(devices, InMemory(scratch), mode=protocol, threads_per_queue=2)
    data = disk.pattern(8 * MIB)
    disk.write(device.node, 0, data)
    assert disk.read(device.node, 0, 8 * MIB) == data
    load.verify(device.node, "--ioengine=libaio", "--iodepth=64", "--rw=randrw", "--bsrange=4k-128k", "--size=8m")
    assert {int(path.name) for path in scratch.iterdir()} == {tid for _, tid in threads(device)}


def test_single_requests_come_through(devices: Devices, scratch: Path, protocol: str) -> None:
    """One at a time, more than a thread's turn lasts."""
    file = disk.image(scratch / "image", MIB)
    device = devices.loop(file, mode=protocol, threads_per_queue=3)
    for n in range(64):
        disk.write(device.node, n * 4096, bytes([n]) * 4096)
    assert file.read_bytes()[: 64 * 4096] == b"".join(bytes([n]) * 4096 for n in range(64))


def test_threads_of_a_queue_share_its_cpus(devices: Devices, several: None) -> None:
    device = devices.null(queues=2, threads_per_queue=2)
    assert [q_id for q_id, _ in threads(device)] == [0, 0, 1, 1]
    single = devices.null(threads_per_queue=2)
    with Control() as control:
        for each in (device, single):
            for q_id, tid in threads(each):
                assert len(os.sched_getaffinity(tid)) == 1
                assert os.sched_getaffinity(tid) <= control.affinity(each.id, q_id)
    assert len({cpu for _, tid in threads(single) for cpu in os.sched_getaffinity(tid)}) == 2


def test_the_default_mode_leaves_each_thread_its_own_tags(devices: Devices, several: None) -> None:
    known = devices.null(threads_per_queue=2).status().known
    assert known
    assert known.mode == "user-copy"


# -- the end, and a new beginning -----------------------------------------------------------


def test_del_under_load(devices: Devices, scratch: Path, protocol: str) -> None:
    device = devices.loop(disk.image(scratch / "image", 8 * MIB), mode=protocol, queues=2, threads_per_queue=3)
    options = ["--ioengine=libaio", "--iodepth=32", "--rw=randrw", "--bs=4k", "--time_based", "--runtime=60"]
    with load.running(device, *options) as fio:
        devices.remove(device)
        status, output = load.result(fio)
    assert status != 0, output
    assert not device.exists()


def test_recovery_under_load_loses_nothing(devices: Devices, scratch: Path, protocol: str) -> None:
    device = devices.loop(
        disk.image(scratch / "image", 8 * MIB), mode=protocol, queues=2, threads_per_queue=2, recovery="reissue"
    )
    options = ["--ioengine=libaio", "--iodepth=16", "--rw=randwrite", "--bs=4k", "--size=2m", "--verify=crc32c"]
    with load.running(device, *options, "--rate_iops=,400") as fio:
        until(lambda: device.completed("writes") > 50, "fio writes")
        os.kill(device.pid, signal.SIGKILL)
        recover(device.id)
        status, output = load.result(fio)
    assert status == 0, output
    assert [q_id for q_id, _ in threads(device)] == [0, 0, 1, 1]


def test_a_thread_that_fails_ends_the_daemon(
    devices: Devices, scratch: Path, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only the first one of its queue."""
    now, told = scratch / "now", scratch / "told"
    told.mkdir()
    answer = Raw.answer

    def fail(self: Raw) -> None:
        if now.exists() and threading.current_thread().name == "queue-0.1":
            raise AssertionError("a fault of ours")
        answer(self)

    monkeypatch.setattr(Raw, "answer", fail)
    device = serve(devices, InMemory(told), mode=protocol, threads_per_queue=2, log=scratch / "log")
    pid = device.pid
    options = ["--iodepth=64", "--rw=randwrite", "--bs=4k", "--time_based", "--runtime=60"]
    with load.running(device, *options) as fio:
        now.touch()
        assert wait_end(pid, 20)
        status, output = load.result(fio)
    assert status != 0, output
    assert "queue 0 failed: giving the device up" in (scratch / "log").read_text()


# -- what is shown, and what is refused -----------------------------------------------------


def test_list_shows_the_first_and_json_all(devices: Devices, several: None) -> None:
    device = devices.null(queues=2, threads_per_queue=2)
    tids = [tid for _, tid in threads(device)]
    lines = program.ublk("list", "-n", str(device.id)).out.splitlines()
    shown = [line for line in lines if line.startswith("\tqueue")]
    assert [int(line.split()[3]) for line in shown] == [tids[0], tids[2]]
    assert [(t["q_id"], t["tid"]) for t in device.status().to_dict()["queue_threads"]] == threads(device)


def test_a_driver_that_binds_queues_to_threads(devices: Devices) -> None:
    if Feature.PER_IO_DAEMON in inspect.features():
        pytest.skip("this driver has several threads per queue")
    with pytest.raises(UblkError, match="lacks UBLK_F_PER_IO_DAEMON, which 2 threads per queue need"):
        devices.null(threads_per_queue=2)
    refused = program.ublk("add", "-t", "null", "-T", "2")
    assert (refused.status, refused.out, inspect.device_ids()) == (ExitCode.FAILED, "", [])
    assert "lacks UBLK_F_PER_IO_DAEMON" in refused.err
    assert "Linux 6.16" in refused.err


@pytest.mark.any_kernel
def test_more_threads_than_requests(devices: Devices) -> None:
    refused = program.ublk("add", "-t", "null", "-T", "3", "-d", "2")
    assert (refused.status, refused.out, inspect.device_ids()) == (ExitCode.USAGE, "", [])
    assert "3 threads per queue need a depth of 3 or more, not 2" in refused.err


def test_more_threads_than_the_system_allows(devices: Devices, several: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some are there already, and have fetched."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "queue-0.2":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(UblkError, match="cannot start a thread for queue 0") as caught:
        devices.null(threads_per_queue=4)
    assert "fewer queues or threads" in caught.value.hint
    assert inspect.device_ids() == []


@pytest.mark.parametrize("batch", [False, True])
def test_more_threads_than_files(devices: Devices, several: None, batch: bool) -> None:
    if batch and Feature.BATCH_IO not in inspect.features():
        pytest.skip("this driver has no batches")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(fd.name) for fd in Path("/proc/self/fd").iterdir())  # by this process; the daemon begins with none
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, hard))
    try:
        with pytest.raises(UblkError, match="Too many open files") as caught:
            devices.null(mode="batch+copy" if batch else "copy", threads_per_queue=100)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "fewer queues or threads" in caught.value.hint
    assert inspect.device_ids() == []
