"""From add to del, whatever happens in between."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ublkpy.daemon import end
from ublkpy.driver import inspect, state
from ublkpy.driver.ctrl import AUTO_ID, Control
from ublkpy.driver.delete import delete
from ublkpy.errors import BusyError, ExitCode, NoDeviceError, UblkError
from ublkpy.system.spawn import wait_end
from ublkpy.uring.ffi import lib
from ublkpy.uring.mode import fastest
from ublkpy.uring.uapi import DevInfo, Feature, State

from . import disk, load, program
from .devices import MIB, Device, Devices, held_open, until

LOAD = ("--rw=randwrite", "--bs=4k", "--iodepth=16", "--time_based", "--runtime=50")


@pytest.fixture
def foreign(devices: Devices) -> Device:
    """A device that another server has added and not started yet."""
    return devices.adopt(_add_foreign(AUTO_ID))


def _add_foreign(dev_id: int) -> int:
    wanted = DevInfo(dev_id, nr_hw_queues=1, queue_depth=8, max_io_buf_bytes=64 << 10, flags=Feature(0))
    with Control() as control:
        return control.add(wanted).dev_id


# -- adding ----------------------------------------------------------------------------------


@pytest.mark.any_kernel
def test_the_installed_program_adds_lists_and_deletes(devices: Devices) -> None:
    added = program.program("add", "-t", "null", "-n", "5")
    device = devices.adopt(5)
    assert (added.status, added.out, added.err) == (0, "/dev/ublkb5\n", "")
    with held_open(device.node):
        assert device.state is State.LIVE
    assert "/dev/ublkb5" in program.program("list").out
    deleted = program.program("del", "-n", "5")
    assert (deleted.status, deleted.out, deleted.err) == (0, "", "")
    assert not device.exists()


def test_the_lowest_free_id(devices: Devices) -> None:
    first, second = devices.null(), devices.null()
    assert (first.id, second.id) == (0, 1)
    devices.remove(first)
    assert devices.null().id == 0


def test_a_chosen_id(devices: Devices) -> None:
    device = devices.null(id=300)
    assert device.id == 300
    assert device.node.is_block_device()


def test_an_id_in_use_harms_nobody(devices: Devices, scratch: Path) -> None:
    device = devices.loop(disk.image(scratch / "image", MIB, b"kept" * 128))
    before = device.status()
    with pytest.raises(BusyError, match=f"id {device.id} is in use"):
        devices.null(id=device.id)
    assert device.status() == before
    assert disk.read(device.node, 0, 512) == b"kept" * 128


def test_a_file_in_use_harms_nobody(devices: Devices, scratch: Path) -> None:
    file = disk.image(scratch / "image", MIB)
    device = devices.loop(file)
    with pytest.raises(BusyError, match="in use by another device"):
        devices.loop(file)
    assert inspect.device_ids() == [device.id]


def test_read_only_devices_share_a_file(devices: Devices, scratch: Path) -> None:
    file = disk.image(scratch / "image", MIB, disk.pattern(MIB))
    for device in (devices.loop(file, read_only=True), devices.loop(file, read_only=True)):
        assert disk.read(device.node, 0, MIB) == file.read_bytes()


@pytest.mark.logs
def test_more_queues_than_cpus(devices: Devices, caplog: pytest.LogCaptureFixture) -> None:
    device = devices.null(queues=64)
    cpus = os.cpu_count() or 1
    assert device.status().info.nr_hw_queues == cpus
    assert f"{cpus} of 64 queues" in caplog.text
    assert len(list((device.sysfs / "mq").iterdir())) == cpus


# -- listing ---------------------------------------------------------------------------------


@pytest.mark.any_kernel
def test_list_without_devices() -> None:
    done = program.ublk("list")
    assert (done.status, done.out) == (0, "")
    assert "no ublk devices" in done.err


@pytest.mark.any_kernel
def test_list_columns(devices: Devices, scratch: Path) -> None:
    file = disk.image(scratch / "image", MIB)
    loop, null = devices.loop(file, queues=2), devices.null(depth=64)
    modes = [fastest(inspect.features(), 64, user_copy=user_copy).name for user_copy in (False, True)]
    lines = program.ublk("list").out.splitlines()
    assert lines[0].split() == ["ID", "NODE", "TARGET", "SIZE", "STATE", "QUEUES", "MODE", "PID", "BACKING"]
    assert lines[1].split() == ["0", "/dev/ublkb0", "loop", "1M", "LIVE", "2x128", modes[0], str(loop.pid), str(file)]
    assert lines[2].split() == ["1", "/dev/ublkb1", "null", "64M", "LIVE", "1x64", modes[1], str(null.pid), "-"]
    assert len(lines) == 3


@pytest.mark.any_kernel
def test_list_details_are_laid_out_as_in_ublksrv(devices: Devices, scratch: Path) -> None:
    file = disk.image(scratch / "image", 2 * MIB)
    device = devices.loop(file, queues=2, depth=32, max_io_buf_bytes=64 << 10, offset=1 * MIB)
    char = os.stat(f"/dev/ublkc{device.id}").st_rdev  # noqa: PTH116
    block = device.node.stat().st_rdev
    expected = [
        r"dev id 0: nr_hw_queues 2 queue_depth 32 block size 512 dev_capacity 2048",
        rf"\tmax rq size 65536 daemon pid {device.pid} state LIVE",
        r"\tflags 0x[0-9a-f]+ \[ URING_CMD_COMP_IN_TASK CMD_IOCTL_ENCODE( [A-Z_]+)* \]",
        rf"\tublkc: {os.major(char)}:{os.minor(char)} ublkb: {os.major(block)}:{os.minor(block)} owner: 0:0",
        r"\tqueue 0: tid \d+ affinity\((\d+ )+\)",
        r"\tqueue 1: tid \d+ affinity\((\d+ )+\)",
        rf'\ttarget \{{"backing_file":"{re.escape(str(file))}","dev_size":1048576,"direct_io":1,"name":"loop",'
        r'"offset":2048,"type":0\}',
    ]
    lines = program.ublk("list", "-n", str(device.id)).out.splitlines()
    assert len(lines) == len(expected)
    for line, regex in zip(lines, expected, strict=True):
        assert re.fullmatch(regex, line), f"{line!r} is not {regex}"


@pytest.mark.any_kernel
def test_queue_threads_are_tasks_of_the_daemon(devices: Devices) -> None:
    device = devices.null(queues=2)
    known = device.status().known
    assert known
    tids = {queue.tid for queue in known.queues}
    assert len(tids) == 2
    for tid in tids:
        assert Path(f"/proc/{device.pid}/task/{tid}").exists()


@pytest.mark.any_kernel
def test_affinity_is_what_the_threads_have_now(devices: Devices) -> None:
    device = devices.null()
    known = device.status().known
    assert known
    (cpu,) = os.sched_getaffinity(known.queues[0].tid)
    other = min(os.sched_getaffinity(0) - {cpu})
    os.sched_setaffinity(known.queues[0].tid, {other})
    assert f"affinity({other} )" in program.ublk("list", "-n", str(device.id)).out


@pytest.mark.any_kernel
def test_list_as_json(devices: Devices, scratch: Path) -> None:
    file = disk.image(scratch / "image", MIB)
    device = devices.loop(file)
    (listed,) = json.loads(program.ublk("list", "--json").out)["devices"]
    assert listed["id"] == device.id
    assert listed["node"] == str(device.node)
    assert listed["pid"] == device.pid
    assert listed["state"] == "LIVE"
    assert listed["size"] == MIB
    assert listed["backing"] == str(file)
    assert json.loads(program.ublk("list", "-n", "0", "--json").out)["device"] == listed


@pytest.mark.any_kernel
def test_list_of_a_missing_device() -> None:
    done = program.ublk("list", "-n", "7")
    assert (done.status, done.out) == (ExitCode.NO_DEVICE, "")
    assert "no ublk device 7" in done.err


# -- the devices of others -------------------------------------------------------------------


def test_a_foreign_device_is_listed(foreign: Device) -> None:
    assert "foreign" in program.ublk("list").out.splitlines()[1].split()
    (listed,) = json.loads(program.ublk("list", "--json").out)["devices"]
    assert (listed["server"], listed["target"], listed["pid"]) == ("foreign", None, None)
    dump = program.ublk("list", "-n", str(foreign.id))
    assert dump.status == 0
    assert "daemon pid -1 state DEAD" in dump.out


def test_a_foreign_device_is_deleted(foreign: Device) -> None:
    assert program.ublk("del", "-n", str(foreign.id)).status == 0
    assert not foreign.exists()


def test_a_state_file_of_an_earlier_device_is_not_believed(devices: Devices, scratch: Path) -> None:
    earlier = devices.null(id=9)
    file = state.RUN_DIR / "9.json"
    shutil.copy(file, scratch)
    devices.remove(earlier)
    foreign = devices.adopt(_add_foreign(9))
    shutil.copy(scratch / "9.json", file)
    assert foreign.status().known is None
    devices.remove(foreign)
    file.unlink()  # whose it is cannot be known: it stays until the id is used again


# -- deleting --------------------------------------------------------------------------------


@pytest.mark.any_kernel
def test_del_of_a_missing_device() -> None:
    done = program.ublk("del", "-n", "7")
    assert (done.status, done.out) == (ExitCode.NO_DEVICE, "")
    assert "no ublk device 7" in done.err


def test_del_of_several_goes_on_after_a_missing_one(devices: Devices) -> None:
    for _ in range(3):
        devices.null()
    done = program.ublk("del", "-n", "0", "-n", "7", "2")
    assert done.status == ExitCode.NO_DEVICE
    assert inspect.device_ids() == [1]


def test_del_all(devices: Devices, foreign: Device) -> None:
    devices.null()
    devices.null()
    assert program.ublk("del", "-a").status == 0
    assert inspect.device_ids() == []


@pytest.mark.any_kernel
def test_del_all_of_nothing() -> None:
    assert program.ublk("del", "-a").status == 0


def test_del_async(devices: Devices) -> None:
    device = devices.null()
    pid = device.pid
    assert program.ublk("del", "--async", "-n", str(device.id)).status == 0
    until(lambda: not device.exists(), "the device is gone")
    assert wait_end(pid, 20)


def test_del_async_on_a_kernel_without_that_command(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 6.9. The command is replaced by a number that no kernel knows."""

    class Old:
        UBLK_U_CMD_DEL_DEV_ASYNC = lib.UBLK_U_CMD_DEL_DEV_ASYNC + 0x60

        def __getattr__(self, name: str) -> object:
            return getattr(lib, name)

    monkeypatch.setattr("ublkpy.driver.ctrl.lib", Old())
    device = devices.null()
    pid = device.pid
    # Not by us: what we have open is open in the forked command, too.
    with held_open(device.node) as fd:
        opener = subprocess.Popen(["sleep", "60"], stdin=fd)
    done = program.ublk("del", "--async", "-n", str(device.id))
    assert (done.status, done.err) == (0, "")
    assert wait_end(pid, 20)
    assert not device.exists()
    assert _id_taken(device.id)
    opener.kill()
    opener.wait()
    until(lambda: not _id_taken(device.id), "the id is free")


def _id_taken(dev_id: int) -> bool:
    with Control() as control:
        try:
            control.info(dev_id)
        except NoDeviceError:
            return False
    return True


def test_del_ends_the_daemon_and_its_file(devices: Devices) -> None:
    device = devices.null()
    pid = device.pid
    devices.remove(device)
    assert wait_end(pid, 0)
    assert not (state.RUN_DIR / f"{device.id}.json").exists()
    assert not device.node.exists()


def test_del_under_load_ends_the_load(devices: Devices, scratch: Path) -> None:
    device = devices.loop(disk.image(scratch / "image", 8 * MIB), queues=2)
    with load.running(device, *LOAD) as fio:
        devices.remove(device)
        status, output = load.result(fio)
    assert status != 0, output
    assert not device.exists()


def test_del_waits_for_openers_only_so_long(devices: Devices) -> None:
    device = devices.null()
    with held_open(device.node):
        with pytest.raises(UblkError, match=rf"held open by process {os.getpid()} \("):
            delete(device.id, timeout=1)
        assert not device.node.exists()
    until(lambda: not device.exists(), "the device goes with its last opener")


@pytest.mark.parametrize("moment", ["_find_user", "_stop"])
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "foreign"])
def test_a_device_that_takes_over_the_id_meanwhile_is_left_alone(
    devices: Devices, monkeypatch: pytest.MonkeyPatch, moment: str, ours: bool
) -> None:
    def new(dev_id: int) -> Device:
        return devices.null(id=dev_id) if ours else devices.adopt(_add_foreign(dev_id))

    def take_over(*args: object, **kwargs: object) -> None:
        monkeypatch.undo()
        delete(3)
        new(3)

    device = new(3)
    monkeypatch.setattr(f"ublkpy.driver.delete.{moment}", take_over)
    with pytest.raises(NoDeviceError, match="the device that had the id 3 is gone"):
        delete(3, force=True)
    assert device.state is (State.LIVE if ours else State.DEAD)
    assert (state.RUN_DIR / "3.json").exists() is ours
    if ours:
        assert len(disk.read(device.node, 0, 4096)) == 4096


def test_a_deletion_that_comes_late_is_for_its_own_device_only(devices: Devices) -> None:
    device = devices.null()
    cookie = device.status().info.ublksrv_flags
    with pytest.raises(NoDeviceError):
        delete(device.id, cookie + 1)
    argv = [sys.executable, "-m", end.__name__, "terminal", str(device.id)]
    late = subprocess.run([*argv, str(cookie + 1), "--force"], capture_output=True, text=True, timeout=30)
    assert (late.returncode, late.stderr) == (0, "")
    assert device.state is State.LIVE
    assert (state.RUN_DIR / f"{device.id}.json").exists()
    assert subprocess.run([*argv, str(cookie)], timeout=30).returncode == 0
    assert not device.exists()


# -- daemons that die or hang ----------------------------------------------------------------


def test_del_after_the_daemon_was_killed(devices: Devices) -> None:
    device = devices.null()
    device.kill_daemon()
    until(lambda: device.state is State.DEAD, "the driver has noticed")
    assert "no daemon; run: ublk start -n 0" in program.ublk("list").out
    devices.remove(device)
    assert not device.exists()


def test_del_at_once_after_a_kill_under_load(devices: Devices, scratch: Path) -> None:
    device = devices.loop(disk.image(scratch / "image", 8 * MIB))
    with load.running(device, *LOAD) as fio:
        os.kill(device.pid, signal.SIGKILL)
        devices.remove(device)
        status, output = load.result(fio)
    assert status != 0, output


@pytest.mark.logs
def test_a_daemon_that_does_not_answer_is_killed_only_by_force(devices: Devices, scratch: Path) -> None:
    device = devices.loop(disk.image(scratch / "image", 8 * MIB))
    pid = device.pid
    with load.running(device, *LOAD) as fio:
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(UblkError, match="does not answer") as caught:
            delete(device.id, timeout=2)
        assert f"ublk del --force -n {device.id}" in caught.value.hint
        assert not wait_end(pid, 0)
        delete(device.id, force=True, timeout=2)
        status, output = load.result(fio)
    assert status != 0, output
    assert wait_end(pid, 0)


@contextmanager
def slowed_down(pid: int) -> Iterator[None]:
    """A process that works for a moment now and then, as if its disk were slow."""
    done = threading.Event()

    def pace() -> None:
        while not done.wait(0.005):
            os.kill(pid, signal.SIGSTOP)
            done.wait(0.5)
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=pace)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_a_slow_daemon_is_not_a_stuck_one(devices: Devices, scratch: Path) -> None:
    """What is in the page cache takes many times the deadline to be written, and arrives."""
    data = disk.pattern(MIB)
    image = disk.image(scratch / "image", len(data))
    device = devices.loop(image, depth=1, max_io_buf_bytes=16384)
    with held_open(device.node, os.O_RDWR) as fd:
        os.write(fd, data)
        with slowed_down(device.pid):
            delete(device.id, force=True, wait=False, timeout=2)
    assert image.read_bytes() == data
    until(lambda: not device.exists(), "the device is gone when nobody has it open any more")


def test_dirty_pages_of_a_device_with_recovery_are_written_at_del(devices: Devices, scratch: Path) -> None:
    """On such a device, the driver's stop fails new requests before it writes them."""
    data = disk.pattern(MIB)
    image = disk.image(scratch / "image", len(data))
    device = devices.loop(image, recovery="queue")
    with held_open(device.node, os.O_RDWR) as fd:
        os.write(fd, data)
        delete(device.id, wait=False)
    assert image.read_bytes() == data
    until(lambda: not device.exists(), "the device is gone when nobody has it open any more")


@contextmanager
def stuck(device: Device, *reader: str) -> Iterator[None]:
    """A daemon that does not answer, and a program that waits for it."""
    os.kill(device.pid, signal.SIGSTOP)
    reads = subprocess.Popen(reader, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: (device.sysfs / "inflight").read_text().split()[0] != "0", "the read is under way")
        yield
    finally:
        if device.exists():
            os.kill(device.pid, signal.SIGCONT)
        reads.wait(30)


@pytest.mark.logs
def test_force_deletes_a_device_on_which_an_open_is_stuck(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    """As udev's, or of a partition scan."""
    monkeypatch.setattr("ublkpy.driver.delete._OPEN_DEADLINE", 2.0)
    device = devices.null()
    pid = device.pid
    with stuck(device, "blockdev", "--rereadpt", str(device.node)):
        with pytest.raises(BusyError, match="cannot be opened: its daemon does not answer"):
            delete(device.id)
        delete(device.id, force=True, timeout=2)
        assert wait_end(pid, 0)
        assert not device.exists()


def test_a_stuck_device_holds_nothing_else_up(devices: Devices) -> None:
    device = devices.null()
    with stuck(device, "dd", f"if={device.node}", "iflag=direct", "count=1"):
        with pytest.raises(UblkError, match="did not stop within 2 s: its server holds requests") as caught:
            delete(device.id, timeout=2)
        assert f"process {device.pid} (" in caught.value.message
        # the driver goes on with the stop, and holds the device's mutex
        assert f"process {device.pid} (" in caught.value.message
        listed = program.ublk("list")
        assert (listed.status, listed.out.splitlines()[1].split()[:5]) == (
            0,
            ["0", "/dev/ublkb0", "null", "64M", "LIVE"],
        )
        assert program.ublk("list", "-n", "0").status == 0
        added = program.ublk("add", "-t", "null", "--json")
        assert added.status == 0, added.err
        devices.remove(devices.adopt(1))
    until(lambda: not device.exists() or device.state is State.DEAD, "the stop has gone through")


def test_sigterm_to_the_daemon_deletes_its_device(devices: Devices) -> None:
    device = devices.null()
    pid = device.pid
    os.kill(pid, signal.SIGTERM)
    assert wait_end(pid, 30)
    assert not device.exists()


# -- in the foreground -----------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_foreground(devices: Devices, number: signal.Signals) -> None:
    with program.foreground("-t", "null") as command:
        device = devices.adopt(0)
        assert command.out == "/dev/ublkb0\n"
        with held_open(device.node):
            assert device.pid == command.pid
        command.signal(number)
        done = command.result()
    assert done.status == 0, done.err
    assert not device.exists()
    assert "ublkb0: INFO: serving /dev/ublkb0" in done.err
    assert "Traceback" not in done.err


def test_del_ends_the_foreground(devices: Devices) -> None:
    with program.foreground("-t", "null") as command:
        devices.remove(devices.adopt(0))
        assert command.result().status == 0


def test_a_second_signal_does_not_disturb_the_end(devices: Devices) -> None:
    with program.foreground("-t", "null") as command:
        devices.adopt(0)
        command.signal(signal.SIGINT)
        until(lambda: "asked to end" in command.err, "the first signal has arrived")
        command.signal(signal.SIGINT)
        assert command.result().status == 0
    assert inspect.device_ids() == []


@pytest.mark.any_kernel
def test_children_of_another_do_not_disturb_the_foreground(devices: Devices) -> None:
    """It is their parent where it took the place of the program that started them, or is the first process."""

    def have_children() -> None:
        for n in range(200):
            if os.fork() == 0:
                time.sleep(n * 0.02)
                os._exit(0)

    with program.running("add", "--foreground", "-t", "null", prepare=have_children) as command:
        until(lambda: command.out or command.err.count("error"), "the node is printed")
        assert command.out == "/dev/ublkb0\n", command.err
        devices.remove(devices.adopt(0))
        assert command.result().status == 0


@pytest.mark.any_kernel
def test_the_foreground_says_what_it_added_as_json(devices: Devices) -> None:
    with program.foreground("-t", "null", "--json") as command:
        device = devices.adopt(0)
        assert json.loads(command.out)["device"]["node"] == str(device.node)
        devices.remove(device)
        assert command.result().status == 0


# -- over and over ---------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_twelve_lives_leave_nothing(devices: Devices, scratch: Path) -> None:
    file = disk.image(scratch / "image", MIB)
    for _ in range(2):  # what is made once
        devices.remove(devices.loop(file))
    fds, memory = _fds(), _available_memory()
    for _ in range(12):
        devices.remove(devices.loop(file))
    assert _fds() == fds
    # the kernel frees some of it later
    until(lambda: _available_memory() > memory - 64 * MIB, "the memory is free again")


def _fds() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208


def _available_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) * 1024
