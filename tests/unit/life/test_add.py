"""From a configuration to a daemon: what the command hears of it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from ublkpy.config import DeviceConfig, Draft, build
from ublkpy.daemon import run
from ublkpy.daemon.plan import Plan
from ublkpy.driver.ctrl import CONTROL
from ublkpy.errors import BusyError, DriverError, UblkError
from ublkpy.life import add, foreground
from ublkpy.system import log, process, spawn

OpenFds = Callable[[], set[str]]


def test_daemon_that_serves() -> None:
    def body(ready: spawn.Ready) -> int:
        ready.done({"dev_id": 7, "queues": 1, "seconds": 0.5})
        return 0

    assert run.hear(spawn.daemon(body), new=True, timeout=60) == run.Started(7, 1, 0.5)


def test_daemon_that_says_why_not(open_fds: OpenFds) -> None:
    def body(ready: spawn.Ready) -> int:
        ready.failed(BusyError("device id 7 is in use", "choose another"))
        return 1

    before = open_fds()
    with pytest.raises(BusyError, match="device id 7 is in use"):
        run.hear(spawn.daemon(body), new=True, timeout=60)
    assert open_fds() == before


def test_daemon_that_dies_in_silence() -> None:
    def body(ready: spawn.Ready) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    with pytest.raises(UblkError, match="the daemon died while it set the device up") as caught:
        run.hear(spawn.daemon(body), new=True, timeout=60)
    assert "log" in caught.value.hint


def slow(folder: Path) -> Callable[[spawn.Ready], int]:
    """A daemon that does not get ready, and notes in which way it is ended."""

    def body(ready: spawn.Ready) -> int:
        def on_term(number: int, frame: object) -> None:
            (folder / "asked").touch()
            os._exit(0)

        signal.signal(signal.SIGTERM, on_term)
        (folder / "new").write_text(str(os.getpid()))
        (folder / "new").rename(folder / "pid")
        while True:
            signal.pause()

    return body


@pytest.mark.parametrize("new", [True, False])
def test_daemon_that_never_gets_ready_is_ended(tmp_path: Path, new: bool) -> None:
    """In good order, which deletes the device, only if that is new."""
    with pytest.raises(UblkError, match=r"the daemon was not ready within 0\.5 s"):
        run.hear(spawn.daemon(slow(tmp_path)), new=new, timeout=0.5)
    assert spawn.wait_end(int((tmp_path / "pid").read_text()), 0)
    assert (tmp_path / "asked").exists() is new


@pytest.mark.parametrize("new", [True, False])
def test_ctrl_c_takes_a_new_device_back_and_lets_a_recovery_go_on(tmp_path: Path, new: bool) -> None:
    def press(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    finger = subprocess.Popen(
        ["sh", "-c", f"until [ -e {tmp_path}/pid ]; do sleep 0.05; done; kill -INT {os.getpid()}"]
    )
    try:
        with pytest.raises(KeyboardInterrupt):
            run.hear(spawn.daemon(slow(tmp_path)), new=new, timeout=60)
    finally:
        finger.wait(10)
        signal.signal(signal.SIGINT, before)
    pid = int((tmp_path / "pid").read_text())
    assert spawn.wait_end(pid, 0) is new
    assert (tmp_path / "asked").exists() is new
    spawn.wait_end(pid, 5, kill=True)


@pytest.mark.skipif(CONTROL.exists(), reason=f"{CONTROL} exists: nothing to be said about its absence")
@pytest.mark.parametrize("use", [add.add, lambda config: foreground.serve(config, print)], ids=["daemon", "foreground"])
def test_without_driver_the_backing_is_left_alone(
    tmp_path: Path, use: Callable[[DeviceConfig], int], open_fds: OpenFds
) -> None:
    config = build(Draft(target_type="loop", target={"file": tmp_path / "no.img"}))
    before = open_fds()
    with pytest.raises(DriverError):
        use(config)
    assert open_fds() == before


def test_node_that_does_not_appear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_NODE_DEADLINE", 0.05)
    with pytest.raises(UblkError, match="/dev/ublkb1048575 cannot be opened: No such file") as caught:
        run.wait_node(1048575)
    assert "udev" in caught.value.hint


def test_in_the_foreground_the_disks_of_the_targets_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a daemon: the target may open them later."""
    file = tmp_path / "disk.img"
    file.write_bytes(bytes(1 << 20))
    kept: list[Path] = []

    def leave(paths: Iterable[Path] = ()) -> None:
        kept.extend(paths)
        raise UblkError("far enough")

    monkeypatch.setattr(foreground, "make_plan", lambda config: Plan(config, config.open(), 1))
    monkeypatch.setattr(log, "to_terminal", lambda: None)
    monkeypatch.setattr(process, "harden", lambda: None)
    monkeypatch.setattr(process, "leave_mounts", leave)
    config = build(Draft(target_type="loop", target={"file": file}))
    with pytest.raises(UblkError, match="far enough"):
        foreground.serve(config, print)
    config.target.close()
    assert kept == [file]
