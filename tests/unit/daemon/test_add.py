"""From a configuration to a daemon: what the command hears of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from ublkpy.config import DeviceConfig, Draft, build
from ublkpy.daemon import add, spawn
from ublkpy.daemon.ctrl import CONTROL
from ublkpy.errors import BusyError, DriverError, UblkError

OpenFds = Callable[[], set[str]]


def test_daemon_that_serves() -> None:
    def body(ready: spawn.Ready) -> int:
        ready.done({"dev_id": 7, "queues": 1})
        return 0

    assert add.start_daemon(body, new=True) == {"dev_id": 7, "queues": 1}


def test_daemon_that_says_why_not(open_fds: OpenFds) -> None:
    def body(ready: spawn.Ready) -> int:
        ready.failed(BusyError("device id 7 is in use", "choose another"))
        return 1

    before = open_fds()
    with pytest.raises(BusyError, match="device id 7 is in use"):
        add.start_daemon(body, new=True)
    assert open_fds() == before


def test_daemon_that_dies_in_silence() -> None:
    def body(ready: spawn.Ready) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    with pytest.raises(UblkError, match="the daemon died while it set the device up") as caught:
        add.start_daemon(body, new=True)
    assert "log" in caught.value.hint


def test_daemon_that_never_gets_ready_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def body(ready: spawn.Ready) -> int:
        (tmp_path / "pid").write_text(str(os.getpid()))
        while True:
            signal.pause()

    monkeypatch.setattr(add, "READY_DEADLINE", 0.3)
    with pytest.raises(UblkError, match=r"the daemon was not ready within 0\.3 s"):
        add.start_daemon(body, new=True)
    assert spawn.wait_end(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.skipif(CONTROL.exists(), reason=f"{CONTROL} exists: nothing to be said about its absence")
@pytest.mark.parametrize(
    "use", [add.add, lambda config: add.add_in_foreground(config, print)], ids=["daemon", "foreground"]
)
def test_without_driver_the_backing_is_left_alone(
    tmp_path: Path, use: Callable[[DeviceConfig], int], open_fds: OpenFds
) -> None:
    config = build(Draft(target_type="loop", target={"file": tmp_path / "no.img"}))
    before = open_fds()
    with pytest.raises(DriverError):
        use(config)
    assert open_fds() == before


def test_node_that_does_not_appear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(add, "_NODE_DEADLINE", 0.05)
    with pytest.raises(UblkError, match="/dev/ublkb1048575 cannot be opened: No such file") as caught:
        add._wait_node(1048575)
    assert "udev" in caught.value.hint
