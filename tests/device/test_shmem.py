"""Memory that clients share with a device."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import operator
import os
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from ublkpy import shmem
from ublkpy.config import DeviceConfig, DeviceOptions
from ublkpy.daemon import shmem as daemon_shmem
from ublkpy.driver import inspect
from ublkpy.driver.delete import delete
from ublkpy.errors import ExitCode
from ublkpy.life.add import add
from ublkpy.life.recover import recover
from ublkpy.tgt.base import Geometry, Target
from ublkpy.uring.ffi import ffi
from ublkpy.uring.map import Extent, Map, Routing, Upcall, Zero
from ublkpy.uring.queue import Request
from ublkpy.uring.uapi import Feature, IoFlag, Op

from . import disk, kernel, load, program
from .devices import MIB, Device, Devices, held_open, until

SIZE = 8 * MIB
MODES = ["copy", "user-copy", "batch+copy", "batch+user-copy"]
ROOT = Path(__file__).parents[2]
CLIENT = "/memfd:client (deleted)"
_F_SEAL_FUTURE_WRITE = 0x10  # include/uapi/linux/fcntl.h


@pytest.fixture(autouse=True)
def only_where_the_driver_can(request: pytest.FixtureRequest, driver: None) -> None:
    can = Feature.SHMEM_ZC in inspect.features()
    if can is request.node.name.startswith("test_a_driver_without"):
        pytest.skip("this driver has UBLK_F_SHMEM_ZC" if can else "this driver has no UBLK_F_SHMEM_ZC")


class Store(Target):
    """A disk in a bytearray of the daemon, all in Python, that logs where the data of its requests is.

    As long as there is a file ``gate``, it answers nothing.
    """

    name = "store"

    def __init__(self, gate: Path | None = None) -> None:
        super().__init__({})
        self._bytes = bytearray(SIZE)
        self._gate = gate
        self._log = logging.getLogger("store")

    def open(self) -> Geometry:
        return Geometry(SIZE, physical_block=512, io_min=512, io_opt=512)

    def map(self, target_map: Map) -> None:
        target_map.fill(Routing.all(Upcall()))

    def upcall(self, requests: Sequence[Request]) -> None:
        while self._gate and self._gate.exists():
            time.sleep(0.01)
        for request in requests:
            where = slice(request.offset, request.offset + request.length)
            if request.op in (Op.READ, Op.WRITE):
                shared = IoFlag.SHMEM_ZC in request.flags
                self._log.info("%s of %s", request.op.name, mapping_of(request.buffer))
                assert request.buffer.readonly is (shared and request.op is Op.WRITE)
            if request.op is Op.READ:
                request.buffer[:] = self._bytes[where]
            elif request.op is Op.WRITE:
                self._bytes[where] = request.buffer
            request.done()


def mapping_of(buffer: memoryview) -> str:
    """The name of what is mapped there in this process."""
    with ffi.from_buffer(buffer) as place:
        address = int(ffi.cast("uintptr_t", place))
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(word, 16) for word in line.split()[0].split("-"))
        if begin <= address < end:
            return " ".join(line.split()[5:]) or "nameless memory"
    return "nothing"


class Memory:
    """A client's memfd, mapped."""

    def __init__(self, length: int = MIB) -> None:
        self.fd = os.memfd_create("client", os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, length)
        self._bytes = mmap.mmap(self.fd, length)

    def at(self, offset: int, length: int) -> memoryview:
        return memoryview(self._bytes)[offset : offset + length]


def serve(devices: Devices, target: Target, **options: object) -> Device:
    return devices.adopt(add(DeviceConfig(DeviceOptions({"shmem_zc": True, **options}), target)))


def write(device: Device, offset: int, data: memoryview) -> None:
    with held_open(device.node, os.O_WRONLY | os.O_DIRECT) as fd:
        assert os.pwritev(fd, [data], offset) == len(data)


def read(device: Device, offset: int, data: memoryview) -> None:
    with held_open(device.node, os.O_RDONLY | os.O_DIRECT) as fd:
        assert os.preadv(fd, [data], offset) == len(data)


def check_both_ways(device: Device, memory: Memory, offset: int = 0) -> None:
    """What is written from there is read back to there, and is really on the device."""
    data = disk.pattern(65536, seed=offset)
    memory.at(4096, 65536)[:] = data
    write(device, offset, memory.at(4096, 65536))
    memory.at(4096, 65536)[:] = bytes(65536)
    read(device, offset, memory.at(4608, 65536))
    assert memory.at(4608, 65536) == data
    assert disk.read(device.node, offset, 65536) == data


def registered(device: Device) -> list[int]:
    """The buffers that the driver has, as the state file tells."""
    known = device.status().known
    assert known
    return known.shmem


def send(device: Device, *fds: int, said: bytes = b"x") -> int:
    """The daemon's answer to a message of our own."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(shmem.socket_path(device.id)))
        socket.send_fds(client, [said], list(fds))
        return int(struct.unpack("i", client.recv(4))[0])


@contextmanager
def owner_of(memory: Memory, device: Device) -> Iterator[int]:
    """Another process shares the memory, and ends with the block."""
    source, sink = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(sink, b"%d" % shmem.register(device.id, memory.fd))
            signal.pause()
        finally:
            os._exit(1)
    os.close(sink)
    with open(source) as said:  # noqa: PTH123
        assert said.read(1), "it could not share it"
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


class Clients:
    """Threads that write and read all the time, in parts of a memory of their own; a difference is an error."""

    def __init__(self, device: Device, memory: Memory, number: int = 4) -> None:
        self._stop = threading.Event()
        self.rounds = [0] * number
        self._errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(device, memory, n)) for n in range(number)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        self.go_on()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def go_on(self) -> None:
        """Until each has done some more, or one has failed."""
        goal = [n + 3 for n in self.rounds]
        until(lambda: self._errors or all(map(operator.ge, self.rounds, goal)), "the clients go on", 50)

    def _run(self, device: Device, memory: Memory, n: int) -> None:
        length = 32768
        source, sink = memory.at(2 * n * length, length), memory.at((2 * n + 1) * length, length)
        try:
            with held_open(device.node, os.O_RDWR | os.O_DIRECT) as fd:
                while not self._stop.is_set():
                    self.rounds[n] += 1
                    source[:] = bytes([n, self.rounds[n] & 0xFF]) * (length // 2)
                    os.pwritev(fd, [source], n * MIB)
                    os.preadv(fd, [sink], n * MIB)
                    assert sink == source
        except BaseException as e:
            self._errors.append(e)


# -- data ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_requests_are_served_in_the_memory_of_the_client(devices: Devices, scratch: Path, mode: str) -> None:
    log = scratch / "log"
    device = serve(devices, Store(), mode=mode, log=log)
    memory = Memory()
    assert shmem.register(device.id, memory.fd) == 0
    check_both_ways(device, memory, 512)
    places = re.findall(r"(READ|WRITE) of (.*)", log.read_text().partition("as buffer 0")[2])
    assert places == [("WRITE", CLIENT), ("READ", CLIENT), ("READ", "nameless memory")]
    assert program.ublk("list").out.count(f"{mode}+shmem ") == 1
    assert "SHMEM_ZC" in program.ublk("list", "-n", str(device.id)).out
    assert registered(device) == [0]


@pytest.mark.parametrize("mode", MODES)
def test_a_file_behind_it(devices: Devices, scratch: Path, mode: str) -> None:
    file = disk.image(scratch / "image", SIZE)
    device = devices.loop(file, mode=mode, shmem_zc=True, queues=2)
    memories = [Memory(), Memory()]
    assert [shmem.register(device.id, memory.fd) for memory in memories] == [0, 1]
    for memory in [*memories, Memory()]:  # the last one is not shared
        check_both_ways(device, memory, MIB)
    with held_open(device.node, os.O_WRONLY | os.O_DIRECT) as fd:  # a request in two of them
        parts = [memory.at(8192, 4096) for memory in memories]
        parts[0][:], parts[1][:] = b"0" * 4096, b"1" * 4096
        assert os.pwritev(fd, parts, 0) == 8192
    assert file.read_bytes()[:8192] == b"0" * 4096 + b"1" * 4096
    load.verify(device.node, "--ioengine=libaio", "--iodepth=32", "--rw=randrw", "--bsrange=4k-128k", "--size=4m")


def test_zeroes_and_memory_of_the_target(devices: Devices) -> None:
    """What the engine answers itself is put into and taken from the client's memory, too."""

    class Mixed(Store):
        def map(self, target_map: Map) -> None:
            half = target_map.size // 2
            target_map.fill(Routing.all(Zero()))
            target_map.replace([Extent(0, half, Routing.all(target_map.add_memory(bytearray(half))))])

    device = serve(devices, Mixed())
    memory = Memory()
    shmem.register(device.id, memory.fd)
    check_both_ways(device, memory)
    read(device, SIZE // 2 - 512, memory.at(0, 1024))
    assert memory.at(0, 1024) == bytes(1024)


def test_memory_to_be_read_only(devices: Devices, scratch: Path) -> None:
    log = scratch / "log"
    device = serve(devices, Store(), rdonly_shmem_buf=True, log=log)
    memory = Memory()
    fcntl.fcntl(memory.fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)  # nobody else can write there any more
    shmem.register(device.id, memory.fd)
    check_both_ways(device, memory)
    places = re.findall(r"(READ|WRITE) of (.*)", log.read_text().partition("as buffer 0")[2])
    assert places == [("WRITE", CLIENT), ("READ", "nameless memory"), ("READ", "nameless memory")]


@pytest.mark.parametrize("mode", ["copy", "batch+user-copy"])
def test_sharing_begins_and_ends_under_load(devices: Devices, scratch: Path, mode: str) -> None:
    device = devices.loop(disk.image(scratch / "image", SIZE), mode=mode, shmem_zc=True, queues=2)
    memory = Memory()
    with Clients(device, memory) as clients:
        for _ in range(2):
            with owner_of(memory, device):
                assert registered(device) == [0]
                clients.go_on()
            until(lambda: not registered(device), "the buffer of a process that ended is taken back")
            clients.go_on()


def test_a_connection_that_stays_open_changes_nothing(devices: Devices) -> None:
    device = serve(devices, Store())
    first, second = Memory(), Memory()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(shmem.socket_path(device.id)))
        for number, memory in enumerate((first, second)):
            fcntl.fcntl(memory.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            socket.send_fds(client, [b"x"], [memory.fd])
            assert struct.unpack("i", client.recv(4)) == (number,)
    assert registered(device) == [0, 1]
    check_both_ways(device, second)


def test_as_many_as_there_is_room_for(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver has room for more, and would name one that the daemon does not know."""
    monkeypatch.setattr(daemon_shmem, "MAX_BUFFERS", 2)
    device = serve(devices, Store())
    memories = [Memory() for _ in range(3)]
    for memory in memories[:2]:
        shmem.register(device.id, memory.fd)
    with pytest.raises(OSError, match="too many buffers already") as caught:
        shmem.register(device.id, memories[2].fd)
    assert caught.value.errno == errno.ENOSPC
    assert registered(device) == [0, 1]
    check_both_ways(device, memories[2])


def test_the_example_of_the_documentation(devices: Devices) -> None:
    device = serve(devices, Store())
    (text,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "shmem.md").read_text(), re.DOTALL)
    text = text.replace("ublkb0", device.node.name).replace("register(0,", f"register({device.id},")
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert disk.read(device.node, 0, 4096) == b"hello".ljust(4096, b"\0")


# -- huge pages ----------------------------------------------------------------------------


@pytest.fixture
def huge(scratch: Path) -> Iterator[Path]:
    """A file of 4 MiB in huge pages."""
    with huge_pages(4), kernel.mounted("none", scratch / "huge", "-t", "hugetlbfs") as point:
        file = point / "file"
        with file.open("wb") as f:
            f.truncate(4 * MIB)
        yield file


@contextmanager
def huge_pages(wanted: int) -> Iterator[None]:
    """As many as that: those that the machine has from its boot, or else new ones."""
    count = Path("/proc/sys/vm/nr_hugepages")
    before = int(count.read_text())
    count.write_text(str(max(before, wanted)))
    try:
        assert int(count.read_text()) >= wanted, "no memory for huge pages; the kernel option hugepages= reserves it"
        yield
    finally:
        count.write_text(str(before))


def check_huge(device: Device, file: Path) -> None:
    with held_open(file, os.O_RDWR) as fd, mmap.mmap(fd, 4 * MIB) as mapped, memoryview(mapped) as view:
        data = disk.pattern(256 * 1024)
        view[2 * MIB - 4096 : 2 * MIB - 4096 + len(data)] = data  # across both pages
        write(device, 0, view[2 * MIB - 4096 : 2 * MIB - 4096 + len(data)])
        read(device, 0, view[4096 : 4096 + len(data)])
        assert view[4096 : 4096 + len(data)] == data


def test_huge_pages_from_the_start_and_after_a_recovery(devices: Devices, scratch: Path, huge: Path) -> None:
    log = scratch / "log"
    device = serve(devices, Store(), htlb=huge, recovery="queue", log=log)
    assert registered(device) == [0]
    check_huge(device, huge)
    assert log.read_text().count(f"of {huge}") >= 2
    assert "nameless" not in log.read_text().partition("as buffer 0")[2]


def test_recovery_shares_huge_pages_again(devices: Devices, scratch: Path, huge: Path) -> None:
    options = ["-t", "loop", "-f", str(disk.image(scratch / "image", SIZE)), "--shmem_zc", "--htlb", str(huge)]
    added = program.ublk("add", *options, "-r", "1", "--log", str(scratch / "log"))
    assert added.status == 0, added.err
    device = devices.adopt(0)
    check_huge(device, huge)
    device.kill_daemon()
    recover(device.id)
    assert registered(device) == [0]
    check_huge(device, huge)
    assert (scratch / "log").read_text().count(f"sharing {huge} as buffer 0") == 2


@pytest.mark.parametrize("kind", ["missing", "ordinary", "empty", "folder"])
def test_a_file_that_cannot_be_shared(devices: Devices, scratch: Path, huge: Path, kind: str) -> None:
    file = {"missing": scratch / "none", "ordinary": scratch / "file", "empty": huge, "folder": huge.parent}[kind]
    (scratch / "file").write_bytes(bytes(4096))
    os.truncate(huge, 0)
    added = program.ublk("add", "-t", "null", "--shmem_zc", "--htlb", str(file))
    assert (added.status, added.out, inspect.device_ids()) == (ExitCode.FAILED, "", [])
    assert str(file) in added.err
    assert "hugetlbfs" in added.err


def test_too_few_huge_pages(devices: Devices, huge: Path) -> None:
    os.truncate(huge, 1 << 30)
    added = program.ublk("add", "-t", "null", "--shmem_zc", "--htlb", str(huge))
    assert (added.status, added.out, inspect.device_ids()) == (ExitCode.FAILED, "", [])
    assert f"cannot share {huge}" in added.err
    assert "are there enough free huge pages?" in added.err


# -- recovery ------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 32])
def test_recovery_under_load(devices: Devices, scratch: Path, depth: int) -> None:
    """Requests in memory that only the old daemon had are copied; sharing it again is possible."""
    file = disk.image(scratch / "image", SIZE)
    device = devices.loop(file, shmem_zc=True, recovery="reissue", depth=depth)
    assert "user-copy+shmem " in program.ublk("list").out
    memory = Memory()
    assert shmem.register(device.id, memory.fd) == 0
    with Clients(device, memory) as clients:
        os.kill(device.pid, signal.SIGKILL)
        recover(device.id)
        clients.go_on()
    assert registered(device) == []
    assert shmem.register(device.id, memory.fd) == 0
    check_both_ways(device, memory)


# -- what does not go ----------------------------------------------------------------------


def test_bad_messages(devices: Devices, scratch: Path) -> None:
    log = scratch / "log"
    device = serve(devices, Store(), log=log)
    sealed, empty, odd, open_ended = Memory(), Memory(4096), Memory(4096 + 512), Memory()
    os.ftruncate(empty.fd, 0)
    for memory in (sealed, empty, odd):
        fcntl.fcntl(memory.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    plain = os.memfd_create("plain", 0)
    os.ftruncate(plain, 4096)
    reader = os.open(f"/proc/self/fd/{sealed.fd}", os.O_RDONLY)
    file = os.open(disk.image(Path("/run/file"), 4096), os.O_RDWR)
    folder = os.open(scratch, os.O_RDONLY)
    pipe, other_end = os.pipe()
    answers = {
        "no file": (send(device), errno.EINVAL),
        "garbage": (send(device, said=os.urandom(100_000)), errno.EINVAL),
        "two files": (send(device, sealed.fd, sealed.fd), errno.EINVAL),
        "many files": (send(device, *[sealed.fd] * 50), errno.EINVAL),
        "empty": (send(device, empty.fd), errno.EINVAL),
        "no whole page": (send(device, odd.fd), errno.EINVAL),
        "a pipe": (send(device, pipe), errno.EINVAL),
        "a folder": (send(device, folder), errno.EINVAL),
        "a file without a seal": (send(device, file), errno.EPERM),
        "can shrink": (send(device, open_ended.fd), errno.EPERM),
        "cannot be sealed": (send(device, plain), errno.EPERM),
        "read-only": (send(device, reader), errno.EACCES),
    }
    assert {what: -answer for what, (answer, _) in answers.items()} == {what: err for what, (_, err) in answers.items()}
    with pytest.raises(PermissionError, match=r"sealed against shrinking: memfd_create\(\) with MFD_ALLOW_SEALING"):
        shmem.register(device.id, plain)
    assert log.read_text().count("shared memory refused: ") == len(answers) + 1
    assert "not sealed against shrinking (F_SEAL_SHRINK)" in log.read_text()
    with socket.socket(socket.AF_UNIX) as idle:  # and one that says nothing
        idle.connect(str(shmem.socket_path(device.id)))
        assert shmem.register(device.id, sealed.fd) == 0
    with pytest.raises(FileExistsError, match="shared already"):
        shmem.register(device.id, sealed.fd)
    with pytest.raises(PermissionError):
        os.ftruncate(sealed.fd, 0)
    check_both_ways(device, sealed)
    for fd in (plain, reader, file, folder, pipe, other_end):
        os.close(fd)
    Path("/run/file").unlink()


def test_the_socket_is_for_root_and_goes_with_the_device(devices: Devices) -> None:
    path = shmem.socket_path(0)
    device = serve(devices, Store())
    assert path.is_socket()
    assert (stat.S_IMODE(path.stat().st_mode), path.stat().st_uid) == (0o600, 0)
    devices.remove(device)
    assert not path.exists()
    device = serve(devices, Store())
    device.kill_daemon()
    assert path.exists()
    with pytest.raises(ConnectionRefusedError, match="was it added with shmem_zc"):
        shmem.register(device.id, Memory().fd)
    devices.remove(device)
    assert not path.exists()
    devices.null()
    with pytest.raises(FileNotFoundError, match="no daemon shares memory for device 0"):
        shmem.register(0, Memory().fd)


def test_a_socket_that_cannot_be_made(devices: Devices) -> None:
    folder = shmem.socket_path(0).parent
    if folder.exists():
        folder.rmdir()
    folder.write_text("")
    try:
        added = program.ublk("add", "-t", "null", "--shmem_zc")
    finally:
        folder.unlink()
    assert (added.status, added.out, inspect.device_ids()) == (ExitCode.FAILED, "", [])
    assert f"cannot make the socket {shmem.socket_path(0)}: " in added.err


def test_a_target_that_answers_late(devices: Devices, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client is told so; when the driver comes back, the buffer is taken back at once."""
    monkeypatch.setattr(daemon_shmem, "DEADLINE", 2.0)
    gate, log = scratch / "gate", scratch / "log"
    device = serve(devices, Store(gate), log=log)
    memory = Memory()
    with Clients(device, Memory(), 1) as clients:
        gate.touch()
        with pytest.raises(TimeoutError, match="the device does not answer its requests"):
            shmem.register(device.id, memory.fd)
        gate.unlink()
        until(lambda: "buffer 0 is shared no more" in log.read_text(), "the late buffer is taken back")
        clients.go_on()
    assert registered(device) == []
    monkeypatch.undo()
    check_both_ways(device, memory)


def test_kill_while_the_driver_waits_to_register(devices: Devices, scratch: Path) -> None:
    """The requests that it waits for fail with the daemon, and the device can be deleted."""
    gate = scratch / "gate"
    device = serve(devices, Store(gate))
    gate.touch()
    reader = failing(lambda: disk.read(device.node, 0, 4096))
    until(lambda: int((device.sysfs / "inflight").read_text().split()[0]), "a request is in flight")
    client = failing(lambda: shmem.register(device.id, Memory().fd))
    until(lambda: helpers(), "the command is on its way")
    time.sleep(2)  # and waits in the driver
    device.kill_daemon()
    reader.join(20)
    client.join(20)
    assert not reader.is_alive()
    assert not client.is_alive()
    until(lambda: not helpers(), "the helper ends")
    devices.remove(device)


def test_del_while_the_driver_waits_to_register(devices: Devices, scratch: Path) -> None:
    gate = scratch / "gate"
    device = serve(devices, Store(gate))
    gate.touch()
    reader = threading.Thread(target=disk.read, args=(device.node, 0, 4096))
    reader.start()
    until(lambda: int((device.sysfs / "inflight").read_text().split()[0]), "a request is in flight")
    client = threading.Thread(target=register_if_possible, args=(device,))
    client.start()
    until(lambda: helpers(), "the command is on its way")
    threading.Timer(2, gate.unlink).start()
    delete(device.id, force=True)
    for thread in (reader, client):
        thread.join(20)
        assert not thread.is_alive()


def register_if_possible(device: Device) -> None:
    """The requests may end before the device does."""
    with contextlib.suppress(OSError):
        shmem.register(device.id, Memory().fd)


def failing(action: Callable[[], object]) -> threading.Thread:
    """Something that may take a while in a thread, and must end with an OSError."""

    def run() -> None:
        with pytest.raises(OSError):  # noqa: PT011 - whichever
            action()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def helpers() -> list[str]:
    """The processes that are registering something."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"ublkpy.daemon.regbuf" in path.read_bytes():
                found.append(path.parent.name)
        except OSError:  # it has just ended
            continue
    return found


# -- older kernels -------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["-r", "1"], ["--mode", "copy"]], ids=" ".join)
def test_a_driver_without(devices: Devices, more: list[str]) -> None:
    added = program.ublk("add", "-t", "null", "--shmem_zc", *more)
    assert (added.status, added.out, inspect.device_ids()) == (ExitCode.FAILED, "", [])
    assert "lacks UBLK_F_SHMEM_ZC, which shmem_zc needs" in added.err
    assert "Linux 7.1" in added.err
