"""A device that comes back by itself when its daemon dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ublkpy import Device as Api
from ublkpy.driver import inspect, state
from ublkpy.errors import ExitCode
from ublkpy.life import supervise
from ublkpy.system.spawn import wait_end
from ublkpy.uring.uapi import Feature, State

from . import disk, load, program
from .devices import MIB, Device, Devices, configure, until


@pytest.fixture
def watched(devices: Devices, scratch: Path) -> Iterator[Device]:
    file = disk.image(scratch / "image", 16 * MIB)
    config = configure("loop", file=file, recovery="reissue", supervise=True, log=scratch / "log")
    device = devices.adopt(Api.add(config).dev_id)
    yield device
    if device.exists():
        devices.remove(device)
    until(lambda: not watchers(), "its watcher ends with it")


def watchers() -> list[int]:
    """Those who hold the lock of a watcher."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(str(fd.readlink()).startswith(f"{state.RUN_DIR}/0.watch") for fd in (process / "fd").iterdir()):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def comes_back(device: Device, pid: int) -> None:
    until(lambda: device.status().pid not in (None, pid), "it comes back", 50)
    until(lambda: device.status().info.state is State.LIVE, "and lives", 50)


@pytest.mark.timeout(150)
def test_it_comes_back_under_load(watched: Device) -> None:
    options = ("--rw=randwrite", "--bs=4k", "--size=8M", "--iodepth=8", "--verify=crc32c", "--verify_backlog=32")
    with load.running(watched, *options, "--time_based", "--runtime=120") as fio:
        for _ in range(2):
            pid, done = watched.pid, watched.completed("writes")
            os.kill(pid, signal.SIGKILL)
            comes_back(watched, pid)
            until(lambda done=done: watched.completed("writes") > done + 50, "requests go on", 50)  # type: ignore[misc]
            assert fio.poll() is None
        fio.send_signal(signal.SIGINT)
        status, output = load.result(fio)
    assert "error" not in output.lower(), output
    assert status in (0, 128), output
    assert len(watchers()) == 1


def test_what_is_meant_is_no_crash(watched: Device) -> None:
    """Quiesced and stopped devices stay so; after both, it watches on."""
    if Feature.QUIESCE in inspect.features():
        Api(watched.id).quiesce()
        time.sleep(3 * supervise._LOOK)
        assert watched.status().info.state is State.QUIESCED
        Api(watched.id).recover()
        Api(watched.id).upgrade()
    Api(watched.id).stop()
    time.sleep(3 * supervise._LOOK)
    assert watched.status().info.state is State.DEAD
    Api(watched.id).start()
    until(lambda: len(watchers()) == 1, "one watches")
    pid = watched.pid
    watched.kill_daemon()
    comes_back(watched, pid)


def test_it_gives_up_in_the_end(devices: Devices, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that cannot be opened any more is tried a bounded number of times."""
    monkeypatch.setattr(supervise, "BACK_OFF", (0.0, 0.1, 0.1))
    file, log = disk.image(scratch / "image", MIB), scratch / "log"
    config = configure("loop", file=file, recovery="queue", supervise=True, log=log)
    device = devices.adopt(Api.add(config).dev_id)
    file.rename(scratch / "away")
    device.kill_daemon()
    try:
        until(lambda: "given up after 3 tries" in log.read_text(), "it gives up", 50)
    except AssertionError:
        raise AssertionError(log.read_text()) from None
    assert log.read_text().count("does not exist") == 3
    until(lambda: not watchers(), "it ends")
    (scratch / "away").rename(file)
    Api(device.id).recover()
    assert len(disk.read(device.node, 0, 4096)) == 4096
    assert len(watchers()) == 1
    (watcher,) = watchers()
    devices.remove(device)
    assert wait_end(watcher, 20)


def test_it_ends_with_its_device(watched: Device, devices: Devices) -> None:
    (watcher,) = watchers()
    devices.remove(watched)
    assert wait_end(watcher, 20)


@pytest.mark.any_kernel
def test_not_in_the_foreground() -> None:
    refused = program.ublk("add", "-t", "null", "-r", "1", "--supervise", "--foreground")
    assert (refused.status, refused.out) == (ExitCode.USAGE, "")
    assert "--foreground excludes supervise" in refused.err


@pytest.mark.any_kernel
def test_not_without_recovery() -> None:
    refused = program.ublk("add", "-t", "null", "--supervise")
    assert (refused.status, refused.out) == (ExitCode.USAGE, "")
    assert "choose a recovery" in refused.err
