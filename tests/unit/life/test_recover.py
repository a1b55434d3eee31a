"""Which devices can be recovered, and what is said of the others."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from ublkpy.driver import inspect
from ublkpy.driver.disk import Disk
from ublkpy.driver.inspect import DeviceStatus
from ublkpy.driver.state import DeviceState, process_start_time
from ublkpy.errors import BusyError, NoDeviceError, UblkError
from ublkpy.life import recover
from ublkpy.life.recover import _check_same, _recoverable
from ublkpy.tgt.base import Geometry
from ublkpy.uring.uapi import Attr, DevInfo, Feature, State

KNOWN = DeviceState(3, 1, 1 << 22, 1, "copy", [], {"target": {"type": "null"}}, {}, "")
DEAD = DeviceStatus(
    DevInfo(3, 1, 128, 524288, Feature.USER_RECOVERY, state=State.QUIESCED),
    "237:3",
    Disk("259:1", 1 << 30, 512, 4096, Attr(0)),
    KNOWN,
)


def test_dead_daemon_with_recovery() -> None:
    assert _recoverable(DEAD) is KNOWN


def test_live_daemon_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recover, "_RELEASE_DEADLINE", 0.0)
    pid = os.getpid()
    live = replace(DEAD, known=replace(KNOWN, pid=pid, start_time=process_start_time(pid) or 0))
    with pytest.raises(BusyError, match=f"device 3 needs no recovery: process {pid} serves it"):
        _recoverable(live)


def test_device_without_recovery() -> None:
    with pytest.raises(UblkError, match="device 3 was added without recovery") as caught:
        _recoverable(replace(DEAD, info=replace(DEAD.info, flags=Feature(0))))
    assert "ublk start -n 3" in caught.value.hint


def test_foreign_device(run_dir: Path) -> None:
    with pytest.raises(UblkError) as caught:
        _recoverable(replace(DEAD, known=None))
    assert caught.value.message == (f"device 3 was not added by ublkpy, or its state file {run_dir}/3.json is gone")


def test_damaged_state_file_is_the_reason_that_is_told(run_dir: Path) -> None:
    run_dir.mkdir()
    (run_dir / "3.json").write_text("{")
    with pytest.raises(UblkError, match="is damaged"):
        _recoverable(replace(DEAD, known=None))


def test_what_the_old_daemon_still_holds_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "status", lambda dev_id: DEAD)
    tries = iter([BusyError("in use"), BusyError("in use"), None])

    def action() -> str:
        error = next(tries)
        if error:
            raise error
        return "free"

    assert recover._when_released(3, action) == "free"


def test_what_is_never_let_go_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def action() -> str:
        raise BusyError("in use")

    monkeypatch.setattr(inspect, "status", lambda dev_id: DEAD)
    monkeypatch.setattr(recover, "_RELEASE_DEADLINE", 0.1)
    with pytest.raises(UblkError, match=r"not free after 0\.1 s: in use") as caught:
        recover._when_released(3, action)
    assert not isinstance(caught.value, BusyError)  # a service manager does not try such a one again


def test_a_faster_recovery_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def action() -> str:
        raise BusyError("in use")

    pid = os.getpid()
    live = replace(DEAD, known=replace(KNOWN, pid=pid, start_time=process_start_time(pid) or 0))
    monkeypatch.setattr(inspect, "status", lambda dev_id: live)
    monkeypatch.setattr(recover, "ask", lambda *_: {})  # it answers
    with pytest.raises(BusyError, match="needs no recovery"):
        recover._when_released(3, action)


@pytest.mark.parametrize(
    "now",
    [
        Geometry(1 << 30),
        Geometry((1 << 30) + 512),
        Geometry(1 << 30, io_min=512, physical_block=512),
        Geometry(1 << 30, rotational=True),
    ],
)
def test_backing_that_can_still_serve_the_disk(now: Geometry) -> None:
    assert _check_same(DEAD, now) == 1 << 30


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (Geometry((1 << 30) - 512), "has 1G, but its backing now has "),
        (Geometry(1 << 30, logical_block=4096), "has blocks of 512 bytes, but its backing now takes only 4096"),
        (Geometry(1 << 30, read_only=True), "can be written, but its backing no longer can"),
    ],
)
def test_backing_that_lost_what_the_disk_has(now: Geometry, message: str) -> None:
    with pytest.raises(UblkError, match=message):
        _check_same(DEAD, now)


def test_device_that_is_just_being_deleted() -> None:
    with pytest.raises(NoDeviceError):
        _check_same(replace(DEAD, disk=None), Geometry(1 << 30))


def test_read_only_disk_on_a_read_only_backing() -> None:
    assert DEAD.disk
    read_only = replace(DEAD, disk=replace(DEAD.disk, attrs=Attr.READ_ONLY))
    _check_same(read_only, Geometry(1 << 30, read_only=True))
