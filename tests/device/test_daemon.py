"""The process that serves a device: what it has taken on, and what it has let go of."""

from __future__ import annotations

import collections
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ublkpy.driver.delete import delete
from ublkpy.errors import BusyError

from . import disk, kernel, program
from .devices import MIB, Device, Devices, until

QUEUES = 2
# include/linux/sched.h
PF_MEMALLOC_NOIO = 0x00080000
PF_LOCAL_THROTTLE = 0x00100000


@dataclass(frozen=True)
class Daemon:
    """A daemon that the installed program has started, and so inherits nothing from the tests."""

    pid: int
    image: Path
    log: Path

    @property
    def proc(self) -> Path:
        return Path(f"/proc/{self.pid}")

    def status(self, name: str) -> str:
        lines = (self.proc / "status").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:"))

    def threads(self) -> list[Path]:
        """Its threads, without the kernel's own workers that come and go."""
        tasks = (self.proc / "task").iterdir()
        return [task for task in tasks if not (task / "comm").read_text().startswith("iou-wrk")]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    folder = Path(tempfile.mkdtemp(prefix="ublkpy-", dir="/dev/shm"))
    file, log = disk.image(folder / "image", MIB), folder / "log"
    try:
        added = program.program("add", "-t", "loop", "-f", str(file), "-q", str(QUEUES), "--log", str(log))
        assert added.status == 0, added.err
        device = Device(int(added.out.removeprefix("/dev/ublkb")))
        yield Daemon(device.pid, file, log)
        delete(device.id)
    finally:
        shutil.rmtree(folder)


def stat_of(task: Path) -> list[str]:
    """The fields of proc(5)'s stat behind the name; the first is number 3."""
    return (task / "stat").read_text().rpartition(")")[2].split()


def test_it_belongs_to_init_and_to_no_terminal(daemon: Daemon) -> None:
    _state, parent, group, session, terminal, *_ = stat_of(daemon.proc)
    assert (parent, terminal) == ("1", "0")
    assert int(session) != os.getsid(0)
    # no session leader: it can never get a terminal
    assert daemon.pid not in (int(group), int(session))
    assert not Path(f"/proc/{session}").exists()


def test_it_stands_in_the_root(daemon: Daemon) -> None:
    assert (daemon.proc / "cwd").readlink() == Path("/")


def test_it_has_its_own_mounts(daemon: Daemon) -> None:
    assert (daemon.proc / "ns/mnt").readlink() != Path("/proc/self/ns/mnt").readlink()
    assert "shared:" not in (daemon.proc / "mountinfo").read_text()


def test_its_memory_is_locked(daemon: Daemon) -> None:
    locked, resident = (int(daemon.status(name).split()[0]) for name in ("VmLck", "VmRSS"))
    assert locked > resident / 2


def test_it_is_not_chosen_when_memory_runs_out(daemon: Daemon) -> None:
    assert (daemon.proc / "oom_score_adj").read_text().strip() == "-1000"


def test_all_its_threads_are_io_flushers(daemon: Daemon) -> None:
    for task in daemon.threads():
        flags = int(stat_of(task)[6])
        assert flags & PF_MEMALLOC_NOIO, task
        assert flags & PF_LOCAL_THROTTLE, task


def test_one_thread_for_each_queue_and_one_for_the_rest(daemon: Daemon) -> None:
    assert len(daemon.threads()) == QUEUES + 1


def test_ctrl_c_is_not_for_it(daemon: Daemon) -> None:
    assert (
        int(daemon.status("SigIgn"), 16) >> (signal.SIGINT - 1) & 1
        or int(daemon.status("SigCgt"), 16) >> (signal.SIGINT - 1) & 1
    )


def test_it_holds_only_the_files_that_it_needs(daemon: Daemon) -> None:
    links = {int(fd.name): str(fd.readlink()) for fd in (daemon.proc / "fd").iterdir()}
    assert (links[0], links[1], links[2]) == (os.devnull, os.devnull, str(daemon.log))
    rest = collections.Counter(re.sub(r"\[\d+\]|ublkc\d+", "", link) for fd, link in links.items() if fd > 2)
    per_queue = {"anon_inode:[io_uring]": QUEUES, "anon_inode:[eventfd]": QUEUES}
    assert rest == {str(daemon.image): 1, "/dev/": 1, "socket:": 3} | per_queue


def test_its_log(daemon: Daemon) -> None:
    lines = daemon.log.read_text().splitlines()
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
    assert lines
    for line in lines:
        assert re.fullmatch(rf"{stamp} (ublkb\d+|ublk)\[{daemon.pid}\]: [A-Z]+: .+", line), line
    assert re.fullmatch(rf"{stamp} ublkb(\d+)\[\d+\]: INFO: serving /dev/ublkb\1", lines[-1])
    assert daemon.log.stat().st_mode & 0o777 == 0o600


def test_its_state_file_and_socket_are_private(daemon: Daemon) -> None:
    files = list(Path("/run/ublkpy").iterdir())
    assert {file.suffix for file in files} == {".json", ".sock"}
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


@pytest.mark.any_kernel
def test_the_end_is_logged(devices: Devices, scratch: Path) -> None:
    log = scratch / "log"
    device = devices.null(log=log)
    devices.remove(device)
    until(lambda: f"/dev/ublkb{device.id} has ended" in log.read_text(), "the daemon logs its end")


@pytest.mark.any_kernel
def test_logs_of_later_devices_are_appended(devices: Devices, scratch: Path) -> None:
    log = scratch / "log"
    for dev_id in (3, 4):
        devices.remove(devices.null(id=dev_id, log=log))
    assert re.search("serving /dev/ublkb3.*serving /dev/ublkb4", log.read_text(), re.DOTALL)


# -- file systems ----------------------------------------------------------------------------


def test_it_keeps_no_file_system_mounted(devices: Devices, scratch: Path) -> None:
    lower = devices.loop(disk.image(scratch / "image", 16 * MIB))
    kernel.run("mkfs.ext4", "-q", "-F", lower.node)
    with kernel.mounted(lower.node, scratch / "mnt"):
        with pytest.raises(BusyError):
            devices.remove(lower)
        devices.null()  # its daemon starts while the other's file system is mounted
    devices.remove(lower)
    assert not lower.exists()


def test_it_keeps_no_file_system_of_a_kernel_loop_device(devices: Devices, scratch: Path) -> None:
    with kernel.kernel_loop(disk.image(scratch / "image", 16 * MIB)) as node:
        kernel.run("mkfs.ext4", "-q", "-F", node)
        with kernel.mounted(node, scratch / "mnt"):
            devices.null()
        # exclusive: fails as long as the file system lives anywhere
        os.close(os.open(node, os.O_RDWR | os.O_EXCL))


def test_a_backing_on_a_file_system_that_it_left(devices: Devices, scratch: Path) -> None:
    """The daemon detaches the mount that its own file is on; the open file works, and keeps the disk in use."""
    lower = devices.loop(disk.image(scratch / "image", 32 * MIB))
    kernel.run("mkfs.ext4", "-q", "-F", lower.node)
    with kernel.mounted(lower.node, scratch / "mnt") as point:
        file = disk.image(point / "image", 4 * MIB)
        upper = devices.loop(file)
        disk.write(upper.node, MIB, b"deep" * 1024)
        assert file.read_bytes()[MIB : MIB + 4096] == b"deep" * 1024
        devices.remove(upper)


def test_its_death_under_a_mounted_file_system_hangs_nothing(devices: Devices, scratch: Path) -> None:
    device = devices.loop(disk.image(scratch / "image", 16 * MIB))
    kernel.run("mkfs.ext4", "-q", "-F", device.node)
    with kernel.mounted(device.node, scratch / "mnt") as point:
        (point / "file").write_bytes(bytes(MIB))
        device.kill_daemon()
    devices.remove(device)
    assert not device.exists()
