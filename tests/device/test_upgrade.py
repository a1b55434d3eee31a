"""Another daemon for a device in use: no request fails, none is lost, none comes twice."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from ublkpy import Device as Api
from ublkpy.daemon.run import Start
from ublkpy.driver import inspect, state
from ublkpy.errors import BusyError, ExitCode, UblkError
from ublkpy.uring.uapi import Feature, State

from . import disk, kernel, load, program
from .devices import MIB, Devices, configure, until

_VERIFY = ("--rw=randwrite", "--bs=4k", "--size=16M", "--verify=crc32c", "--verify_backlog=64", "--time_based")


@pytest.fixture
def can_quiesce() -> None:
    if Feature.QUIESCE not in inspect.features():
        pytest.skip("this driver has no UBLK_F_QUIESCE (Linux 6.16)")


def test_a_driver_that_cannot_hold_requests_up_says_so(devices: Devices) -> None:
    if Feature.QUIESCE in inspect.features():
        pytest.skip("this driver has UBLK_F_QUIESCE")
    device = devices.null(recovery="reissue")
    for command in ("upgrade", "quiesce"):
        refused = program.ublk(command, "-n", str(device.id))
        assert refused.status == ExitCode.FAILED
        assert "lacks UBLK_F_QUIESCE" in refused.err
        assert "ublk recover" in refused.err
    assert device.status().info.state is State.LIVE


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("queues", "recovery"), [(1, "reissue"), (min(4, os.cpu_count() or 1), "queue")])
def test_twenty_upgrades_lose_nothing(
    can_quiesce: None, devices: Devices, scratch: Path, queues: int, recovery: str
) -> None:
    """Half of them for each number of queues; a depth that fio fills, so that all tags are busy now and then.

    Twenty on the first kernel, fewer on the others: they have the same QUIESCE_DEV. Four queues need
    a machine with four CPUs: python3 -m tests.vm -c 4.
    """
    device = devices.loop(disk.image(scratch / "image", 32 * MIB), queues=queues, depth=16, recovery=recovery)
    depth = ("--iodepth=16", f"--numjobs={min(queues, 2)}", "--offset_increment=16M")
    stalls = []
    with load.running(device, *_VERIFY, *depth, "--runtime=200") as fio:
        for _ in range(10 if kernel.FIRST == kernel.HERE else 3):
            before, done = device.pid, device.completed("writes")
            stalls.append(Api(device.id).upgrade() or 0)
            assert device.pid != before
            until(lambda done=done: device.completed("writes") > done + 50, "requests go on")  # type: ignore[misc]
            assert fio.poll() is None
        fio.send_signal(signal.SIGINT)
        status, output = load.result(fio)
    assert "error" not in output.lower(), output
    assert status in (0, 128), output
    print(f"{queues} queues: the longest of {len(stalls)} upgrades took {max(stalls) * 1000:.0f} ms")


def test_the_command(can_quiesce: None, devices: Devices) -> None:
    first, second = devices.null(recovery="queue"), devices.null(recovery="reissue")
    third = devices.null()
    done = program.ublk("upgrade", "-a")
    assert [line.partition(";")[0] for line in done.out.splitlines()] == [
        f"{first.node}: upgraded",
        f"{second.node}: upgraded",
    ]
    assert done.status == 0
    assert done.err == f"ublk: {third.node} stays as it is: ublk upgrade -n {third.id} says why\n"
    refused = program.ublk("upgrade", "-n", str(third.id))
    assert refused.status == ExitCode.FAILED
    assert f"device {third.id} was added without recovery" in refused.err


def test_what_watches_over_it_is_replaced_too(can_quiesce: None, devices: Devices) -> None:
    config = configure("null", size=8 * MIB, recovery="queue", supervise=True)
    device = devices.adopt(Api.add(config).dev_id)
    watch = state.watch_path(device.id)
    before = watch.read_text()
    Api(device.id).upgrade()
    assert watch.read_text() not in ("", before)
    assert not Path(f"/proc/{before}").exists()
    pid = device.pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: device.status().pid not in (None, pid), "it is brought back", 50)


def test_requests_that_are_not_answered_delay_it(
    can_quiesce: None, devices: Devices, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command gives up, the new daemon does not: there is no way back from QUIESCE_DEV. SIGTERM comes too early."""
    monkeypatch.setattr("ublkpy.life.upgrade._DEADLINE", 8.0)  # the new daemon has begun by then
    lower = devices.null()
    upper = devices.loop(lower.node, recovery="reissue", log=scratch / "log")
    old, below = upper.pid, lower.pid
    os.kill(below, signal.SIGSTOP)
    try:
        with subprocess.Popen(["dd", f"if={upper.node}", "of=/dev/null", "bs=4k", "count=1", "iflag=direct"]) as client:
            until(lambda: int(upper.queue("../inflight").split()[0]) == 1, "a request is on its way")
            with pytest.raises(UblkError, match=r"not quiesced after 8 s: .* process \d+ takes over") as caught:
                Api(upper.id).upgrade()
            assert str(lower.node) in caught.value.hint
            monkeypatch.setattr("ublkpy.life.upgrade._DEADLINE", 60.0)
            with pytest.raises(BusyError, match="another command is about to upgrade"):
                Api(upper.id).upgrade()
            os.kill(below, signal.SIGCONT)
            assert client.wait(30) == 0
    finally:
        os.kill(below, signal.SIGCONT)
    until(lambda: upper.status().pid not in (None, old) and upper.state is State.LIVE, "the new daemon serves", 50)
    assert f"{upper.node} goes on with process {upper.pid}" in (scratch / "log").read_text()
    assert "requests wait" not in (scratch / "log").read_text()


def test_a_quiesce_that_takes_too_long_says_what_comes(
    can_quiesce: None, devices: Devices, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ublkpy.life.upgrade._DEADLINE", 2.0)
    lower = devices.null()
    upper = devices.loop(lower.node, recovery="reissue", log=scratch / "log")
    below = lower.pid
    os.kill(below, signal.SIGSTOP)
    try:
        with subprocess.Popen(["dd", f"if={upper.node}", "of=/dev/null", "bs=4k", "count=1", "iflag=direct"]) as client:
            until(lambda: int(upper.queue("../inflight").split()[0]) == 1, "a request is on its way")
            with pytest.raises(UblkError, match=r"not quiesced after 2 s: .* it can be recovered when it has"):
                Api(upper.id).quiesce()
            os.kill(below, signal.SIGCONT)
            assert client.wait(30) == 0
    finally:
        os.kill(below, signal.SIGCONT)
    until(lambda: upper.status().is_waiting and upper.state is State.QUIESCED, "its daemon has ended")
    Api(upper.id).recover()


def test_a_new_daemon_that_dies_while_it_waits(
    can_quiesce: None, devices: Devices, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver has taken tags by then: the old one ends when it has answered, and a supervisor goes on."""
    monkeypatch.setattr("ublkpy.life.upgrade._DEADLINE", 2.0)
    lower = devices.null()
    config = configure("loop", file=lower.node, recovery="reissue", supervise=True, log=scratch / "log")
    upper = devices.adopt(Api.add(config).dev_id)
    old, below = upper.pid, lower.pid
    os.kill(below, signal.SIGSTOP)
    try:
        with subprocess.Popen(["dd", f"if={upper.node}", "of=/dev/null", "bs=4k", "count=1", "iflag=direct"]) as client:
            until(lambda: int(upper.queue("../inflight").split()[0]) == 1, "a request is on its way")
            with pytest.raises(UblkError, match=r"process \d+ takes over") as caught:
                Api(upper.id).upgrade()
            os.kill(int(caught.value.message.split("process ")[1].split()[0]), signal.SIGKILL)
            os.kill(below, signal.SIGCONT)
            assert client.wait(30) == 0
    finally:
        os.kill(below, signal.SIGCONT)
    until(lambda: upper.status().pid not in (None, old) and upper.state is State.LIVE, "it is brought back", 50)
    assert len(disk.read(upper.node, 0, 4096)) == 4096


@pytest.mark.logs
def test_after_a_new_daemon_that_fails_a_supervisor_goes_on(
    can_quiesce: None, devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after any other daemon that died; without one, the device waits."""

    def fails(dev_id: int) -> Start:
        raise UblkError("the new version does not work")

    watched = devices.adopt(Api.add(configure("null", size=8 * MIB, recovery="queue", supervise=True)).dev_id)
    alone = devices.null(recovery="queue")
    pid = watched.pid
    monkeypatch.setattr("ublkpy.life.upgrade.prepare", fails)
    for device in (watched, alone):
        with pytest.raises(UblkError, match="the new version does not work"):
            Api(device.id).upgrade()
    until(lambda: watched.status().pid not in (None, pid) and watched.state is State.LIVE, "it is brought back", 50)
    assert alone.status().is_waiting
    Api(alone.id).recover()


def test_one_that_is_called_by_its_name(can_quiesce: None, devices: Devices) -> None:
    device = devices.null(recovery="queue", name="scratch")
    before = device.pid
    assert program.ublk("upgrade", "scratch").status == 0
    assert device.pid != before
    assert program.ublk("list", "-n", "scratch").out == program.ublk("list", "-n", str(device.id)).out
    refused = program.ublk("upgrade", "scratsh")
    assert (refused.status, refused.out) == (ExitCode.NO_DEVICE, "")
    assert "no device has the name scratsh" in refused.err


def test_a_file_and_what_is_open(can_quiesce: None, devices: Devices, scratch: Path) -> None:
    """Buffered pages, an open file and a lock on the backing all survive."""
    file = disk.image(scratch / "image", 8 * MIB)
    device = devices.loop(file, recovery="queue")
    with device.node.open("r+b") as opened:
        opened.write(b"before" * 1000)
        Api(device.id).upgrade()
        opened.seek(6000)
        opened.write(b"after." * 1000)
        opened.flush()
        os.fsync(opened.fileno())
    assert file.read_bytes()[:12000] == b"before" * 1000 + b"after." * 1000


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "was added without recovery"),
        ({"recovery": "fail"}, "its requests would fail"),
        ({"recovery": "queue", "mode": "batch+copy"}, "in mode batch\\+copy: the driver fails what comes"),
    ],
)
def test_what_cannot_be_upgraded(can_quiesce: None, devices: Devices, options: dict[str, str], why: str) -> None:
    if "mode" in options and Feature.BATCH_IO not in inspect.features():
        pytest.skip("this driver has no UBLK_F_BATCH_IO (Linux 7.0)")
    device = devices.null(**options)
    pid = device.pid
    with pytest.raises(UblkError, match=why):
        Api(device.id).upgrade()
    assert (device.state, device.pid) == (State.LIVE, pid)


def test_a_target_that_cannot_be_opened_any_more(can_quiesce: None, devices: Devices, scratch: Path) -> None:
    """That is found before the device is quiesced, and the old daemon goes on."""
    file = disk.image(scratch / "image", 8 * MIB)
    device = devices.loop(file, recovery="queue")
    file.rename(scratch / "away")
    with pytest.raises(UblkError, match="does not exist"):
        Api(device.id).upgrade()
    assert device.status().info.state is State.LIVE
    assert len(disk.read(device.node, 0, 4096)) == 4096
    (scratch / "away").rename(file)
    Api(device.id).upgrade()


def test_quiesce_and_recover(can_quiesce: None, devices: Devices, scratch: Path) -> None:
    """Requests wait, for as long as it takes."""
    device = devices.loop(disk.image(scratch / "image", 32 * MIB), recovery="queue", depth=8)
    with load.running(device, *_VERIFY, "--iodepth=16", "--runtime=60") as fio:
        assert program.ublk("quiesce", "-n", str(device.id)) == program.Result(0, "", "")
        assert device.status().info.state is State.QUIESCED
        assert device.status().pid is None
        done = device.completed("writes")
        assert f"run: ublk recover -n {device.id}" in program.ublk("list").out
        assert device.completed("writes") == done
        assert program.ublk("recover", "-a") == program.Result(0, f"{device.node}\n", "")
        until(lambda: device.completed("writes") > done + 50, "requests go on")
        fio.send_signal(signal.SIGINT)
        status, output = load.result(fio)
    assert "error" not in output.lower(), output
    assert status in (0, 128), output


def test_a_quiesced_device_is_deleted(can_quiesce: None, devices: Devices) -> None:
    device = devices.null(recovery="queue")
    Api(device.id).quiesce()
    devices.remove(device)
    assert not device.exists()


def test_a_stopped_daemon_is_no_place_to_wait(can_quiesce: None, devices: Devices) -> None:
    """It does not answer: nothing is done to the device, and the message says what to do."""
    device = devices.null(recovery="queue")
    pid = device.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(UblkError, match="does not answer within") as caught:
            Api(device.id).upgrade()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert "ublk recover" in caught.value.hint
    until(lambda: device.state is State.LIVE, "the device lives")
