"""A new daemon for a device whose daemon died."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ublkpy.driver import inspect, state
from ublkpy.driver.ctrl import AUTO_ID, Control
from ublkpy.errors import ExitCode, UblkError
from ublkpy.life.recover import recover
from ublkpy.system.spawn import wait_end
from ublkpy.uring.uapi import DevInfo, Feature, State

from . import disk, load, program
from .devices import MIB, Device, Devices, until

WHOLE = disk.pattern(4 * MIB)


@pytest.fixture
def file(scratch: Path) -> Path:
    return disk.image(scratch / "image", 8 * MIB, WHOLE)


@pytest.fixture
def fail_io() -> None:
    if Feature.USER_RECOVERY_FAIL_IO not in inspect.features():
        pytest.skip("this driver has no UBLK_F_USER_RECOVERY_FAIL_IO (Linux 6.13)")


@pytest.fixture(params=["queue", "reissue", "fail"])
def recovery(request: pytest.FixtureRequest) -> str:
    """Each way to wait for a new daemon that this driver has."""
    if request.param == "fail":
        request.getfixturevalue("fail_io")
    return str(request.param)


@pytest.fixture
def waiting(devices: Devices, file: Path) -> Device:
    """A device without a daemon that could be recovered."""
    device = devices.loop(file, recovery="queue")
    device.kill_daemon()
    until(lambda: device.state is State.QUIESCED, "the driver has noticed")
    return device


# -- an idle device --------------------------------------------------------------------------


@pytest.mark.parametrize("queues", [1, 2])
def test_an_idle_device_is_recovered(devices: Devices, file: Path, recovery: str, queues: int) -> None:
    device = devices.loop(file, recovery=recovery, queues=queues)
    before = device.status()
    assert before.known
    device.kill_daemon()
    recover(device.id)
    after = device.status()
    assert after.known
    assert after.info.state is State.LIVE
    assert after.pid != before.pid
    assert after.known.config == before.known.config
    assert after.disk == before.disk
    assert disk.read(device.node, 0, 4 * MIB) == WHOLE
    disk.write(device.node, 0, b"new" * 512, 0)
    assert file.read_bytes()[: 3 * 512] == b"new" * 512


@pytest.mark.any_kernel
def test_the_installed_program_recovers(devices: Devices) -> None:
    device = devices.null(recovery="queue")
    device.kill_daemon()
    done = program.program("recover", "-n", str(device.id))
    assert (done.status, done.out) == (0, f"{device.node}\n"), done.err
    assert len(disk.read(device.node, 0, 4096)) == 4096


@pytest.mark.parametrize(
    ("switch", "flags"),
    [
        ("-r", Feature.USER_RECOVERY),
        ("-i", Feature.USER_RECOVERY | Feature.USER_RECOVERY_REISSUE),
    ],
)
def test_switches_of_ublksrv(devices: Devices, switch: str, flags: Feature) -> None:
    added = program.ublk("add", "-t", "null", switch, "1")
    assert added.status == 0, added.err
    assert flags in devices.adopt(0).status().info.flags


def test_the_switch_for_failing_requests(devices: Devices, fail_io: None) -> None:
    added = program.ublk("add", "-t", "null", "-e", "1")
    assert added.status == 0, added.err
    assert Feature.USER_RECOVERY | Feature.USER_RECOVERY_FAIL_IO in devices.adopt(0).status().info.flags


def test_a_driver_that_cannot_fail_requests_says_so() -> None:
    if Feature.USER_RECOVERY_FAIL_IO in inspect.features():
        pytest.skip("this driver has UBLK_F_USER_RECOVERY_FAIL_IO")
    refused = program.ublk("add", "-t", "null", "-e", "1")
    assert (refused.status, refused.out) == (ExitCode.FAILED, "")
    assert "lacks UBLK_F_USER_RECOVERY_FAIL_IO" in refused.err
    assert "hint:" in refused.err


def test_a_dead_daemon_is_advertised(devices: Devices, recovery: str) -> None:
    device = devices.null(recovery=recovery)
    device.kill_daemon()
    waiting = State.FAIL_IO if recovery == "fail" else State.QUIESCED
    until(lambda: device.state is waiting, "the driver has noticed")
    assert f"no daemon; run: ublk recover -n {device.id}" in program.ublk("list").out
    assert device.status().to_dict()["pid"] is None


def test_recovered_again_and_again(devices: Devices, file: Path) -> None:
    device = devices.loop(file, recovery="reissue")
    for _ in range(3):
        device.kill_daemon()
        recover(device.id)
    assert disk.read(device.node, 0, 4 * MIB) == WHOLE


def test_recovery_directly_after_the_kill(devices: Devices) -> None:
    device = devices.null(recovery="queue", queues=2)
    os.kill(device.pid, signal.SIGKILL)
    recover(device.id)
    assert device.state is State.LIVE


def test_a_recovered_device_is_deleted(devices: Devices) -> None:
    device = devices.null(recovery="queue")
    device.kill_daemon()
    recover(device.id)
    pid = device.pid
    devices.remove(device)
    assert not device.exists()
    assert wait_end(pid, 0)
    assert not (state.RUN_DIR / f"{device.id}.json").exists()


def test_a_waiting_device_is_deleted(devices: Devices, recovery: str) -> None:
    device = devices.null(recovery=recovery)
    device.kill_daemon()
    devices.remove(device)
    assert not device.exists()
    assert not (state.RUN_DIR / f"{device.id}.json").exists()


# -- requests without a daemon ---------------------------------------------------------------


@contextmanager
def reader(device: Device) -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits for the first block of the device."""
    argv = ["dd", f"if={device.node}", "iflag=direct", "bs=4096", "count=1", "status=none"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as dd:
        until(lambda: Path(f"/proc/{dd.pid}/stat").read_text().rpartition(")")[2].split()[0] == "D", "the read waits")
        yield dd


def test_requests_wait_for_the_new_daemon(waiting: Device) -> None:
    with reader(waiting) as dd:
        recover(waiting.id)
        answer, _ = dd.communicate(timeout=20)
    assert answer == WHOLE[:4096]


def test_waiting_requests_fail_when_the_device_is_deleted(devices: Devices, waiting: Device) -> None:
    with reader(waiting) as dd:
        devices.remove(waiting)
        assert dd.communicate(timeout=20)[0] == b""
    assert dd.returncode == 1


def test_requests_fail_until_there_is_a_new_daemon(devices: Devices, file: Path, fail_io: None) -> None:
    device = devices.loop(file, recovery="fail")
    device.kill_daemon()
    until(lambda: device.state is State.FAIL_IO, "the driver has noticed")
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        disk.read(device.node, 0, 4096)
    assert caught.value.errno in (errno.EIO, errno.EREMOTEIO)
    recover(device.id)
    assert disk.read(device.node, 0, 4096) == WHOLE[:4096]


@pytest.mark.parametrize("queues", [1, 2])
def test_reissued_requests_lose_nothing(devices: Devices, file: Path, queues: int) -> None:
    device = devices.loop(file, recovery="reissue", queues=queues)
    # the writes take a few seconds, the reads that verify them do not
    options = ["--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=4m", "--rate_iops=,400", "--verify=crc32c"]
    with load.running(device, *options, "--verify_fatal=1") as fio:
        for _ in range(2):
            done = device.completed("writes")
            until(lambda done=done: device.completed("writes") > done + 40, "fio goes on")  # type: ignore[misc]
            device.kill_daemon()
            recover(device.id)
        status, output = load.result(fio)
    assert status == 0, output
    assert disk.read(device.node, 0, 8 * MIB) == file.read_bytes()


def test_recovery_under_load_without_reissue(devices: Devices, file: Path) -> None:
    device = devices.loop(file, recovery="queue")
    with load.running(device, "--rw=randread", "--bs=4k", "--iodepth=16", "--time_based", "--runtime=50") as fio:
        device.kill_daemon()
        recover(device.id)
        fio.send_signal(signal.SIGTERM)
        load.result(fio)
    assert disk.read(device.node, 0, 4 * MIB) == WHOLE


@pytest.mark.timeout(120)
def test_recovery_with_every_tag_in_use(devices: Devices, file: Path) -> None:
    """Linux 6.12 may need its request timeout of 30 s to notice that the daemon is dead."""
    device = devices.loop(file, recovery="reissue", depth=1)
    options = ("--rw=randread", "--bs=4k", "--iodepth=8", "--time_based", "--runtime=1000")
    with load.running(device, *options) as fio:
        device.kill_daemon()
        recover(device.id)
        done = device.completed("reads")
        until(lambda: device.completed("reads") > done + 50, "the load goes on")
        assert fio.poll() is None
    assert disk.read(device.node, 0, 4 * MIB) == WHOLE


# -- what cannot be recovered ----------------------------------------------------------------


def test_a_device_added_without_recovery(devices: Devices) -> None:
    device = devices.null()
    device.kill_daemon()
    refused = program.ublk("recover", "-n", str(device.id))
    assert (refused.status, refused.out) == (ExitCode.FAILED, "")
    assert "added without recovery" in refused.err
    assert f"ublk start -n {device.id}" in refused.err


def test_a_living_device(devices: Devices) -> None:
    device = devices.null(recovery="queue")
    refused = program.ublk("recover", "-n", str(device.id))
    assert (refused.status, refused.out) == (ExitCode.BUSY, "")
    assert f"process {device.pid} serves it" in refused.err
    assert device.state is State.LIVE


@pytest.mark.any_kernel
def test_a_missing_device() -> None:
    refused = program.ublk("recover", "-n", "7")
    assert (refused.status, refused.out) == (ExitCode.NO_DEVICE, "")


def test_a_foreign_device(devices: Devices) -> None:
    wanted = DevInfo(AUTO_ID, 1, 8, 64 << 10, Feature.USER_RECOVERY)
    with Control() as control:
        device = devices.adopt(control.add(wanted).dev_id)
    with pytest.raises(UblkError, match="was not added by ublkpy"):
        recover(device.id)


def _state_file(device: Device) -> Path:
    return state.RUN_DIR / f"{device.id}.json"


@pytest.mark.any_kernel
def test_a_missing_state_file(waiting: Device) -> None:
    _state_file(waiting).unlink()
    with pytest.raises(UblkError, match=r"its state file /run/ublkpy/0\.json is gone") as caught:
        recover(waiting.id)
    assert "ublk del -n 0" in caught.value.hint


@pytest.mark.any_kernel
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda text: "", id="empty"),
        pytest.param(lambda text: text[: len(text) // 2], id="cut"),
        pytest.param(lambda text: "[]", id="not-an-object"),
        pytest.param(lambda text: json.dumps(json.loads(text) | {"version": 99}), id="another-version"),
        pytest.param(lambda text: json.dumps({**json.loads(text), "config": {}}), id="no-config"),
        pytest.param(lambda text: text.replace('"loop"', '"nonesuch"'), id="unknown-target"),
        pytest.param(lambda text: text.replace('"depth": 128', '"depth": "many"'), id="wrong-value"),
    ],
)
def test_a_damaged_state_file(waiting: Device, damage: object) -> None:
    assert callable(damage)
    whole = _state_file(waiting).read_text()
    _state_file(waiting).write_text(damage(whole))
    refused = program.ublk("recover", "-n", str(waiting.id))
    assert refused.status in (ExitCode.FAILED, ExitCode.USAGE)
    assert "Traceback" not in refused.err
    assert refused.err.startswith("ublk: error:")
    assert "hint:" in refused.err
    # nothing is lost: with the file mended, the device can be recovered
    _state_file(waiting).write_text(whole)
    recover(waiting.id)


def test_a_backing_that_is_gone(waiting: Device, file: Path) -> None:
    moved = file.rename(file.with_name("elsewhere"))
    with pytest.raises(UblkError, match=f"backing file {file} does not exist"):
        recover(waiting.id)
    assert waiting.state is State.QUIESCED
    moved.rename(file)
    recover(waiting.id)
    assert disk.read(waiting.node, 0, 4 * MIB) == WHOLE


def test_a_backing_of_another_size(waiting: Device, file: Path) -> None:
    os.truncate(file, 4 * MIB)
    with pytest.raises(UblkError, match="has 8M, but its backing now has 4M"):
        recover(waiting.id)
    os.truncate(file, 8 * MIB)
    recover(waiting.id)


def test_only_one_of_two_recoveries_wins(waiting: Device) -> None:
    with program.running("recover", "-n", "0") as one, program.running("recover", "-n", "0") as other:
        statuses = {one.result().status, other.result().status}
    assert 0 in statuses, (one.err, other.err)
    assert len(statuses) == 2, "both succeeded"
    assert waiting.state is State.LIVE
    assert disk.read(waiting.node, 0, 4 * MIB) == WHOLE


@pytest.mark.parametrize("after", [0.0, 0.1, 0.2, 0.3])
def test_a_recovery_whose_daemon_dies_can_be_repeated(waiting: Device, after: float) -> None:
    with program.running("recover", "-n", "0") as command:
        pid = command.daemon()
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
        done = command.result()
    if done.status != 0:
        assert "the daemon died" in done.err
    recover(waiting.id)
    assert disk.read(waiting.node, 0, 4 * MIB) == WHOLE


def test_a_recovery_interrupted_by_the_user_can_be_repeated(waiting: Device) -> None:
    with program.running("recover", "-n", "0") as command:
        command.signal(signal.SIGINT)
        command.result()
    if waiting.status().pid is None:
        recover(waiting.id)
    assert disk.read(waiting.node, 0, 4 * MIB) == WHOLE
