"""A daemon that is killed at any point of its bring-up or its upgrade, alone or with the command that waits for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ublkpy import Device as Api
from ublkpy.daemon import cdev, channel, run, server
from ublkpy.driver import inspect, state
from ublkpy.driver.ctrl import Control
from ublkpy.errors import ExitCode
from ublkpy.life import add, leftovers, upgrade
from ublkpy.uring.queue import Memory, Queue
from ublkpy.uring.uapi import Feature, State

from . import disk, program
from .devices import MIB, Devices, configure, until

Step = tuple[Any, str]
"""What the daemon has just done when it dies: in this module or class, this function."""

QUEUES: dict[str, Step] = {
    "opening the character device": (cdev, "open_cdev"),
    "mapping a queue": (Memory, "__init__"),
    "making a ring and fetching": (Queue, "__init__"),
    "fetching all": (server.Server, "_start_workers"),
    "the state file": (state, "write"),
    "the socket": (channel.Channel, "__init__"),
}
STEPS: dict[str, Step] = {
    "ADD_DEV": (Control, "add"),
    "SET_PARAMS": (Control, "set_params"),
    **QUEUES,
    "START_DEV": (Control, "start"),
    "opening the block device": (run, "wait_node"),
}
RECOVERY_STEPS: dict[str, Step] = {
    "START_USER_RECOVERY": (Control, "start_recovery"),
    **QUEUES,
    "END_USER_RECOVERY": (Control, "end_recovery"),
    "opening the block device": (run, "wait_node"),
}
UPGRADE_STEPS: dict[str, Step] = {
    "leaving the command": (run, "harden"),
    "QUIESCE_DEV": (Control, "quiesce"),
    "the end of the old daemon": (upgrade, "wait_end"),
    "opening the target": (upgrade, "prepare"),
    **RECOVERY_STEPS,
}

PARTLY_FETCHED = Feature.QUIESCE | Feature.IO_DESC_SIZE
CANNOT_CANCEL = "this driver (Linux 6.16 to 7.2) cannot cancel commands that came for a part of a quiesced device"


def dying_after(step: Step, *, with_command: bool) -> Callable[[], None]:
    """For the command's process: the daemon that it forks dies right after this step, or both do."""

    def prepare() -> None:
        command = os.getpid()
        place, name = step
        function = getattr(place, name)

        def and_die(*args: Any, **values: Any) -> Any:
            done = function(*args, **values)
            if os.getpid() != command:
                if with_command:
                    os.kill(command, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        setattr(place, name, and_die)

    return prepare


def check_machine(devices: Devices) -> None:
    """It can add a device, with the same id, and serve it."""
    assert len(disk.read(devices.null(id=0).node, 0, 4096)) == 4096


@pytest.mark.parametrize("step", STEPS)
def test_the_command_cleans_up(devices: Devices, step: str) -> None:
    done = program.ublk("add", "-t", "null", "-q", "2", prepare=dying_after(STEPS[step], with_command=False))
    assert (done.status, done.out) == (ExitCode.FAILED, "")
    assert "the daemon died while it set the device up" in done.err
    assert inspect.device_ids() == []
    assert not list(state.RUN_DIR.glob("0.*"))
    check_machine(devices)


@pytest.mark.parametrize("step", STEPS)
def test_what_is_left_of_both_is_removed(devices: Devices, step: str) -> None:
    done = program.ublk("add", "-t", "null", "-q", "2", prepare=dying_after(STEPS[step], with_command=True))
    assert (done.status, done.out) == (-signal.SIGKILL, "")
    until(lambda: inspect.status(0).info.state is State.DEAD, "the driver has noticed", 60)
    assert "no daemon; run: ublk " in program.ublk("list").out
    removed = program.ublk("del", "--dead")
    assert (removed.status, removed.out) == (0, ""), removed.err
    assert "deleted device 0" in removed.err
    assert inspect.device_ids() == []
    assert not list(state.RUN_DIR.glob("0.*"))
    check_machine(devices)


@pytest.mark.parametrize("step", RECOVERY_STEPS)
def test_a_recovery(devices: Devices, scratch: Path, step: str) -> None:
    """The device goes on waiting, and the next recovery succeeds."""
    if step == "making a ring and fetching" and inspect.features() & PARTLY_FETCHED == Feature.QUIESCE:
        pytest.skip(CANNOT_CANCEL)
    _check_a_recovery_after(devices, scratch, step)


def test_a_recovery_in_each_mode(devices: Devices, scratch: Path, mode: str) -> None:
    _check_a_recovery_after(devices, scratch, "mapping a queue", mode=mode)


def _check_a_recovery_after(devices: Devices, scratch: Path, step: str, mode: str = "auto") -> None:
    data = disk.pattern(MIB)
    device = devices.loop(disk.image(scratch / "image", MIB, data), queues=2, recovery="reissue", mode=mode)
    device.kill_daemon()
    for _ in range(2):
        dies = dying_after(RECOVERY_STEPS[step], with_command=False)
        done = program.ublk("recover", "-n", str(device.id), prepare=dies)
        assert (done.status, done.out) == (ExitCode.FAILED, "")
        assert "the daemon died" in done.err
        until(lambda: device.status().is_waiting, "nobody serves it any more", 60)
    Api(device.id).recover()
    assert disk.read(device.node, 0, MIB) == data


@pytest.mark.parametrize("with_command", [False, True], ids=["daemon", "both"])
@pytest.mark.parametrize("step", UPGRADE_STEPS)
def test_an_upgrade(devices: Devices, scratch: Path, step: str, with_command: bool) -> None:
    """Either the old daemon goes on, or the device waits for ``ublk recover``; its requests are served in the end."""
    if Feature.QUIESCE not in inspect.features():
        pytest.skip("this driver has no UBLK_F_QUIESCE (Linux 6.16)")
    if step == "making a ring and fetching" and Feature.IO_DESC_SIZE not in inspect.features():
        pytest.skip(CANNOT_CANCEL)
    data = disk.pattern(MIB)
    device = devices.loop(disk.image(scratch / "image", MIB, data), queues=2, recovery="reissue")
    old = device.pid
    dies = dying_after(UPGRADE_STEPS[step], with_command=with_command)
    done = program.ublk("upgrade", "-n", str(device.id), prepare=dies)
    assert (done.status, done.out) == (-signal.SIGKILL if with_command else ExitCode.FAILED, "")
    if step == "leaving the command":
        assert device.pid == old
    else:
        until(lambda: device.status().is_waiting, "nobody serves it any more", 60)
        assert with_command or f"ublk recover -n {device.id}" in done.err
        Api(device.id).recover()
    assert disk.read(device.node, 0, MIB) == data


def test_what_is_not_dead_stays(devices: Devices) -> None:
    served, waiting, stopped = devices.null(), devices.null(recovery="queue"), devices.null()
    waiting.kill_daemon()
    Api(stopped.id).stop()
    assert program.ublk("del", "--dead") == program.Result(0, "", "")
    assert [served.exists(), waiting.exists(), stopped.exists()] == [True, True, True]
    Api(stopped.id).start()
    Api(waiting.id).recover()


def test_files_of_devices_that_are_gone(devices: Devices) -> None:
    served = devices.null(id=3)
    for name in ("4.json", "4.json.new", "5.sock"):
        (state.RUN_DIR / name).touch()
    (state.RUN_DIR / "notes").touch()
    try:
        stale = [state.RUN_DIR / name for name in ("4.json", "4.json.new", "5.sock")]
        assert leftovers.stale_files() == stale
        assert f"left by devices that are gone: {', '.join(map(str, stale))}" in program.ublk("list").err
        done = program.ublk("del", "--dead")
        assert (done.status, done.out) == (0, "")
        assert [path for path in stale if path.exists()] == []
        assert program.ublk("list").err == ""
        assert served.status().known
    finally:
        (state.RUN_DIR / "notes").unlink()


def test_a_device_of_a_dead_daemon_of_another_server(devices: Devices) -> None:
    """What the driver alone knows of is removed as well."""
    device = devices.adopt(add.add(configure("null")))
    state.remove(device.id)
    device.kill_daemon()
    until(lambda: device.status().info.state is State.DEAD, "the driver has noticed", 60)
    done = program.ublk("del", "--dead")
    assert (done.status, done.err) == (0, f"ublk: deleted device {device.id}\n")
    assert not device.exists()
