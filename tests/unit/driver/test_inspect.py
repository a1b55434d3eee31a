"""What there is, as far as it can be seen without the driver."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from ublkpy.driver import inspect
from ublkpy.driver.disk import Disk
from ublkpy.driver.inspect import DeviceStatus, thread_affinity
from ublkpy.driver.state import DeviceState, QueueState, process_start_time
from ublkpy.uring.uapi import Attr, DevInfo, Feature, State

NO_PROCESS = 1 << 22
INFO = DevInfo(3, 1, 128, 524288, Feature.USER_RECOVERY, state=State.LIVE, ublksrv_pid=os.getpid())
DISK = Disk("259:1", 1 << 30, 512, 4096, Attr(0))


@pytest.fixture
def known() -> DeviceState:
    """The state of a daemon that runs: this process."""
    pid = os.getpid()
    return DeviceState(3, 1, pid, process_start_time(pid) or 0, "copy", [], {"target": {"type": "null"}}, {}, "")


def test_ids_are_sorted_as_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "_CLASS", tmp_path)
    for dev_id in (10, 0, 2, 1048575):
        (tmp_path / f"ublkc{dev_id}").mkdir()
    assert inspect.device_ids() == [0, 2, 10, 1048575]


def test_no_driver_no_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "_CLASS", tmp_path / "no")
    assert inspect.device_ids() == []


def test_pid_of_our_daemon(known: DeviceState) -> None:
    assert DeviceStatus(INFO, "237:3", DISK, known).pid == os.getpid()


def test_pid_that_another_process_has_now_is_not_the_daemons(known: DeviceState) -> None:
    """The driver may still name a daemon that died, and the number may be in use again."""
    assert DeviceStatus(INFO, "237:3", DISK, replace(known, start_time=known.start_time + 1)).pid is None


@pytest.mark.parametrize(("pid", "alive"), [(os.getpid(), True), (NO_PROCESS, False), (-1, False), (0, False)])
def test_pid_of_a_foreign_daemon(pid: int, alive: bool) -> None:
    assert DeviceStatus(replace(INFO, ublksrv_pid=pid), "237:3", DISK, None).pid == (pid if alive else None)


def test_size_of_a_device_without_a_disk(known: DeviceState) -> None:
    assert DeviceStatus(INFO, "237:3", None, replace(known, target={"dev_size": 4096})).size == 4096
    assert DeviceStatus(INFO, "237:3", None, None).size is None


def test_advice_for_a_device_that_works(known: DeviceState) -> None:
    assert DeviceStatus(INFO, "237:3", DISK, known).advice == ""


@pytest.mark.parametrize(
    ("state", "ours", "advice"),
    [
        (State.QUIESCED, True, "ublk recover -n 3"),
        (State.FAIL_IO, True, "ublk recover -n 3"),
        (State.DEAD, True, "ublk start -n 3"),
        (State.DEAD, False, "ublk del -n 3"),
        (State.QUIESCED, False, "ublk del -n 3"),
    ],
)
def test_advice_for_a_device_without_daemon(known: DeviceState, state: State, ours: bool, advice: str) -> None:
    info = replace(INFO, state=state, ublksrv_pid=-1)
    assert DeviceStatus(info, "237:3", DISK, replace(known, pid=NO_PROCESS) if ours else None).advice == advice


@pytest.mark.parametrize(
    ("flags", "state", "waits"),
    [
        (Feature.USER_RECOVERY, State.QUIESCED, True),
        (Feature.USER_RECOVERY, State.FAIL_IO, True),
        (Feature.USER_RECOVERY, State.LIVE, True),
        (Feature.USER_RECOVERY, State.DEAD, False),
        (Feature(0), State.LIVE, False),
    ],
)
def test_what_can_be_recovered(known: DeviceState, flags: Feature, state: State, waits: bool) -> None:
    device = DeviceStatus(replace(INFO, state=state, flags=flags), "237:3", DISK, replace(known, pid=NO_PROCESS))
    assert device.is_waiting == waits
    assert not replace(device, known=None).is_waiting
    assert not replace(device, known=known).is_waiting


def test_affinity_of_a_thread_that_lives() -> None:
    assert thread_affinity(QueueState(0, os.getpid(), [4095])) == sorted(os.sched_getaffinity(0))


def test_affinity_of_a_thread_that_is_gone_is_what_it_was_given() -> None:
    assert thread_affinity(QueueState(0, NO_PROCESS, [4095])) == [4095]
