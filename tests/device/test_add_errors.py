"""What can be wrong with an add: a message, a cure, an exit code, and nothing left."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import ublkpy.tgt.loop
import ublkpy.tgt.null  # noqa: F401 - loaded here, because an ordinary user might not be able to
from ublkpy.driver import inspect, state
from ublkpy.driver.ctrl import CONTROL
from ublkpy.driver.state import RUN_DIR
from ublkpy.errors import ExitCode
from ublkpy.uring.uapi import Feature, State

from . import disk, kernel, program
from .devices import MIB, Devices, until

NOBODY = 65534


def expect_refusal(done: program.Result, status: int, message: str, hint: str) -> None:
    assert done.status == status, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    error, _, rest = done.err.partition("\n")
    assert message in error, done.err
    assert hint in rest, done.err
    assert inspect.device_ids() == []
    assert list(state.RUN_DIR.glob("*")) == []


# -- the command line ------------------------------------------------------------------------


@pytest.mark.any_kernel
@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("", "no target given"),
        ("-t lop", "did you mean loop"),
        ("-t null --dept 4", "--depth"),
        ("-t null -f x", "No such option '-f'"),
        ("-t loop", "needs -f or --file"),
        ("-t null -q 0", "1 to 4096"),
        ("-t null -q many", "not a whole number"),
        ("-t null -d 0", "1 to 4096"),
        ("-t null -d 4097", "1 to 4096"),
        ("-t null --max_io_buf_bytes 1k", "4096 to 33554432"),
        ("-t null --max_io_buf_bytes 5000", "not a multiple of 4096"),
        ("-t null --max_io_buf_bytes 64M", "4096 to 33554432"),
        ("-t null -n 1048576", "-1 to 1048575"),
        ("-t null --size 12x", "not a size such as"),
        ("-t null --size 100", "512 or more"),
        ("-t null --size 1000", "not a multiple of 512"),
        ("-t null --recovery maybe", "none, queue, reissue, fail"),
        ("-t null -i 1 -e 1", "cannot be combined"),
        ("-t null -r 1 --recovery fail", "cannot be combined"),
    ],
)
def test_a_wrong_command_line(args: str, words: str) -> None:
    done = program.ublk("add", *args.split())
    assert (done.status, done.out) == (ExitCode.USAGE, ""), done.err
    assert words in done.err
    assert "Traceback" not in done.err


# -- the backing -----------------------------------------------------------------------------


@pytest.fixture
def bad_files(scratch: Path) -> Path:
    """A folder of things that cannot be backings."""
    (scratch / "folder").mkdir()
    (scratch / "empty").touch()
    disk.image(scratch / "good", MIB)
    disk.image(scratch / "odd", MIB + 100)
    os.mkfifo(scratch / "fifo")
    (scratch / "loop").symlink_to("loop")
    return scratch


@pytest.mark.any_kernel
@pytest.mark.parametrize(
    ("args", "status", "message", "hint"),
    [
        ("missing", ExitCode.FAILED, "missing does not exist", "truncate -s 1G"),
        ("folder", ExitCode.FAILED, "folder is a directory", "name a file in it"),
        ("empty", ExitCode.FAILED, "empty is empty", "truncate -s 1G"),
        ("fifo", ExitCode.FAILED, "fifo is neither a regular file nor a block device", ""),
        ("loop", ExitCode.FAILED, "Too many levels of symbolic links", ""),
        ("good/below", ExitCode.FAILED, "Not a directory", ""),
        ("odd", ExitCode.FAILED, "is not a multiple of the block size 512", f"truncate -s {MIB + 512}"),
        ("good -o 4096", ExitCode.FAILED, "offset 2M is not inside", ""),
        ("good --size 2M", ExitCode.FAILED, "too short for 2M", f"truncate -s {2 * MIB}"),
        ("good -o 100B", ExitCode.USAGE, "100B is not a multiple of 512", ""),
    ],
)
def test_a_wrong_backing(bad_files: Path, args: str, status: ExitCode, message: str, hint: str) -> None:
    name, *options = args.split()
    done = program.ublk("add", "-t", "loop", "-f", str(bad_files / name), *options)
    expect_refusal(done, status, message, hint)


@pytest.mark.any_kernel
def test_a_backing_on_a_read_only_file_system(scratch: Path) -> None:
    with kernel.mounted("none", scratch / "ro", "-t", "tmpfs") as point:
        file = disk.image(point / "image", MIB)
        kernel.run("mount", "-o", "remount,ro", point)
        done = program.ublk("add", "-t", "loop", "-f", str(file))
        expect_refusal(done, ExitCode.FAILED, "Read-only file system", "--read-only")


@pytest.mark.any_kernel
def test_the_read_only_switch_that_the_hint_names(devices: Devices, scratch: Path) -> None:
    done = program.ublk("add", "-t", "loop", "-f", str(disk.image(scratch / "image", MIB)), "--read-only")
    assert done.status == 0, done.err
    devices.adopt(0)


def test_a_file_system_without_direct_io(devices: Devices, scratch: Path) -> None:
    with kernel.mounted("none", scratch / "ramfs", "-t", "ramfs") as point:
        file = disk.image(point / "image", MIB, disk.pattern(MIB))
        done = program.ublk("add", "-t", "loop", "-f", str(file), "--direct")
        expect_refusal(done, ExitCode.FAILED, "cannot be used with O_DIRECT", "--buffered_io")
        device = devices.loop(file)
        known = device.status().known
        assert known
        assert known.target["direct_io"] == 0
        assert disk.read(device.node, 0, MIB) == disk.pattern(MIB)
        devices.remove(device)


# -- the driver ------------------------------------------------------------------------------


@contextmanager
def without_control() -> Iterator[None]:
    hidden = CONTROL.rename(CONTROL.with_name("ublk-control.hidden"))
    try:
        yield
    finally:
        hidden.rename(CONTROL)


@pytest.mark.any_kernel
@pytest.mark.parametrize(
    "args", ["add -t null", "add -t null --foreground", "list", "list --json", "del -n 0", "recover -n 0", "features"]
)
def test_no_driver(args: str) -> None:
    with without_control():
        done = program.ublk(*args.split())
    expect_refusal(done, ExitCode.NO_DRIVER, "/dev/ublk-control does not exist", "modprobe ublk_drv")


@pytest.mark.any_kernel
@pytest.mark.parametrize("args", ["add -t null", "list", "del -n 0", "features"])
def test_an_ordinary_user(args: str) -> None:
    done = program.ublk(*args.split(), prepare=become_nobody)
    expect_refusal(done, ExitCode.NO_DRIVER, "no permission to open /dev/ublk-control", "as root")


def test_an_ordinary_user_with_access_to_the_node() -> None:
    CONTROL.chmod(0o666)
    try:
        done = program.ublk("add", "-t", "null", prepare=become_nobody)
    finally:
        CONTROL.chmod(0o600)
    expect_refusal(done, ExitCode.NO_DRIVER, "lacks CAP_SYS_ADMIN", "as root")


def become_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


@pytest.mark.parametrize("args", ["add -t null", "list"])
def test_io_uring_switched_off(args: str) -> None:
    switch = Path("/proc/sys/kernel/io_uring_disabled")
    before = switch.read_text()
    switch.write_text("2")
    try:
        done = program.ublk(*args.split())
    finally:
        switch.write_text(before)
    expect_refusal(done, ExitCode.NO_DRIVER, "io_uring is not available", "kernel.io_uring_disabled=0")


@pytest.mark.parametrize("switch", [[], ["--foreground"]], ids=["daemon", "foreground"])
def test_an_id_in_use(devices: Devices, switch: list[str]) -> None:
    device = devices.null()
    done = program.ublk("add", "-t", "null", "-n", str(device.id), *switch)
    assert (done.status, done.out) == (ExitCode.BUSY, ""), done.err
    assert f"device id {device.id} is in use" in done.err
    assert f"ublk del -n {device.id}" in done.err
    assert inspect.device_ids() == [device.id]
    assert device.state is State.LIVE


# -- the log ---------------------------------------------------------------------------------


@pytest.mark.any_kernel
def test_a_log_in_a_missing_folder(scratch: Path) -> None:
    done = program.ublk("add", "-t", "null", "--log", str(scratch / "missing" / "log"))
    expect_refusal(done, ExitCode.FAILED, "missing/log: No such file or directory", "--log FILE")


@pytest.mark.any_kernel
def test_a_log_that_is_a_folder(scratch: Path) -> None:
    done = program.ublk("add", "-t", "null", "--log", str(scratch))
    assert done.err.count("cannot open the log") == 1
    expect_refusal(done, ExitCode.FAILED, f"cannot open the log {scratch}: Is a directory", "--log FILE")


@pytest.mark.any_kernel
def test_a_log_on_a_full_disk_stops_nobody(devices: Devices) -> None:
    device = devices.null(log=Path("/dev/full"))
    assert len(disk.read(device.node, 0, 4096)) == 4096


# -- the state file --------------------------------------------------------------------------


@pytest.mark.any_kernel
def test_a_state_folder_that_is_a_file() -> None:
    RUN_DIR.mkdir(exist_ok=True)
    aside = RUN_DIR.rename(RUN_DIR.with_name("ublkpy.aside"))
    RUN_DIR.touch()
    try:
        done = program.ublk("add", "-t", "null")
    finally:
        RUN_DIR.unlink()
        aside.rename(RUN_DIR)
    expect_refusal(done, ExitCode.FAILED, f"{RUN_DIR} is not a folder", "remove it")


# -- nobody hears the name of the device -----------------------------------------------------


def stdout_to(path: str) -> None:
    os.dup2(os.open(path, os.O_WRONLY), 1)


@pytest.mark.any_kernel
@pytest.mark.parametrize("options", [(), ("--json",), ("--foreground",), ("--foreground", "--json")], ids=" ".join)
def test_a_full_stdout(options: tuple[str, ...]) -> None:
    done = program.ublk("add", "-t", "null", *options, prepare=lambda: stdout_to("/dev/full"))
    assert (done.status, inspect.device_ids()) == (ExitCode.FAILED, [])
    assert "ublk: error: cannot print the name of the new device: No space left on device" in done.err
    assert "Traceback" not in done.err


@pytest.mark.any_kernel
@pytest.mark.parametrize("args", ["list", "list --json", "list -n 0", "list -n 0 --json", "features"])
def test_a_full_stdout_of_other_commands(devices: Devices, args: str) -> None:
    devices.null()
    done = program.ublk(*args.split(), prepare=lambda: stdout_to("/dev/full"))
    expected = "ublk: error: cannot write to stdout: No space left on device\n"
    assert (done.status, done.err) == (ExitCode.FAILED, expected)


@pytest.mark.any_kernel
@pytest.mark.parametrize("options", [(), ("--foreground",)], ids=" ".join)
def test_a_reader_that_has_gone(options: tuple[str, ...]) -> None:
    def into_the_void() -> None:
        read_end, write_end = os.pipe()
        os.close(read_end)
        os.dup2(write_end, 1)

    done = program.ublk("add", "-t", "null", *options, prepare=into_the_void)
    assert (done.status, inspect.device_ids()) == (ExitCode.FAILED, [])
    assert "cannot print the name of the new device: Broken pipe" in done.err


# -- interruptions ---------------------------------------------------------------------------


def _usual_seconds() -> float:
    """How long an add takes here and now."""
    started = time.monotonic()
    done = program.ublk("add", "-t", "null", "-q", "2")
    seconds = time.monotonic() - started
    assert done.status == 0
    assert program.ublk("del", "-n", "0").status == 0
    return seconds


def expect_all_or_nothing(devices: Devices, done: program.Result) -> None:
    """After Ctrl-C: either the add was through, or nothing is left of it."""
    if done.status == 0:
        device = devices.adopt(0)
        assert done.out == f"{device.node}\n"
        assert device.state is State.LIVE
        devices.remove(device)
    else:
        assert (done.status, done.out, done.err.strip()) == (ExitCode.INTERRUPTED, "", "ublk: interrupted")
        assert inspect.device_ids() == []


def test_ctrl_c_at_any_moment(devices: Devices) -> None:
    usual = _usual_seconds()
    statuses = []
    for n in range(8):
        with program.running("add", "-t", "null", "-q", "2") as command:
            time.sleep(usual * (n + 1) / 9)  # the moments that matter, spread over the whole add
            command.signal(signal.SIGINT)
            done = command.result()
        statuses.append(done.status)
        expect_all_or_nothing(devices, done)
    assert ExitCode.INTERRUPTED in statuses


def test_ctrl_c_while_the_daemon_appears(devices: Devices) -> None:
    for _ in range(5):
        with program.running("add", "-t", "null") as command:
            command.daemon()
            command.signal(signal.SIGINT)
            expect_all_or_nothing(devices, command.result())


@pytest.mark.parametrize("after", [0.0, 0.25, 0.5, 0.75], ids=lambda share: f"{share:.0%}")
def test_a_daemon_killed_during_the_add(devices: Devices, after: float) -> None:
    if Feature.QUIESCE not in inspect.features():
        pytest.skip("this driver (before Linux 6.16) loses the partition scan's read of a daemon killed in START_DEV")
    usual = _usual_seconds()
    with program.running("add", "-t", "null", "-q", "2") as command:
        pid = command.daemon()
        time.sleep(usual * after)
        os.kill(pid, signal.SIGKILL)
        done = command.result()
    if done.status == 0:  # too late: the add was through
        devices.adopt(0)
        return
    expect_refusal(done, ExitCode.FAILED, "the daemon died while it set the device up", "hint:")


def test_a_daemon_asked_to_end_during_the_add(devices: Devices) -> None:
    with program.running("add", "-t", "null", "-q", "2") as command:
        os.kill(command.daemon(), signal.SIGTERM)
        done = command.result()
    if done.status == 0:
        device = devices.adopt(0)
        until(lambda: not device.exists(), "the device is gone")
        return
    assert (done.out, inspect.device_ids()) == ("", [])
    assert done.err.startswith("ublk: error:")
