"""Running right here, with the driver's file replaced so that no driver is touched."""

import asyncio
import os
from pathlib import Path

import pytest

from tests.vm import host
from tests.vm.errors import SetupError
from tests.vm.run import TIMED_OUT, Job
from ublkpy.system.spawn import wait_end


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for /dev/ublk-control, not there yet, on a machine where we are root and that cannot load modules."""
    monkeypatch.setattr(host, "CONTROL", tmp_path / "ublk-control")
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return host.CONTROL


def run(command: str, folder: Path, seconds: float = 20) -> int:
    return asyncio.run(host.run(Job(command=command, folder=folder, seconds=seconds)))


def test_no_driver(control: Path) -> None:
    with pytest.raises(SetupError, match="modprobe ublk_drv"):
        run("true", control.parent)


def test_not_root(control: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control.touch()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SetupError, match="Run as root"):
        run("true", control.parent)


def test_status_folder_and_environment(control: Path, capfd: pytest.CaptureFixture[str]) -> None:
    control.touch()
    assert run("pwd; echo $UBLKPY_KERNEL; exit 7", control.parent) == 7
    folder, series = capfd.readouterr().out.splitlines()
    assert folder == str(control.parent)
    assert os.uname().release.startswith(series + ".")


def test_a_hung_command_ends_with_its_children(control: Path) -> None:
    control.touch()
    pid = control.parent / "pid"
    assert run(f"sleep 60 & echo $! > {pid}; wait", control.parent, seconds=1) == TIMED_OUT
    assert wait_end(int(pid.read_text()), 10), "the child of the command lives on"


def test_a_command_that_is_killed(control: Path) -> None:
    control.touch()
    assert run("kill -TERM $$", control.parent) == 143
