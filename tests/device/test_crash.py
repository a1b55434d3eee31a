"""A daemon that is killed at any point of its bring-up, alone or with the command that waits for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from ublkpy import Device as Api
from ublkpy.daemon import channel, run, server
from ublkpy.driver import inspect, state
from ublkpy.driver.ctrl import Control
from ublkpy.errors import ExitCode
from ublkpy.life import add, leftovers
from ublkpy.uring.queue import Memory, Queue
from ublkpy.uring.uapi import State

from . import disk, program
from .devices import Devices, configure, until

# What the daemon has just done when it dies: in this module or class, this function.
STEPS: dict[str, tuple[Any, str]] = {
    "ADD_DEV": (Control, "add"),
    "SET_PARAMS": (Control, "set_params"),
    "opening the character device": (server, "_open_cdev"),
    "mapping a queue": (Memory, "__init__"),
    "making a ring and fetching": (Queue, "__init__"),
    "fetching all": (server.Server, "_start_workers"),
    "the state file": (state, "write"),
    "the socket": (channel.Channel, "__init__"),
    "START_DEV": (Control, "start"),
    "opening the block device": (run, "wait_node"),
}


def dying_after(step: str, *, with_command: bool) -> Callable[[], None]:
    """For the command's process: the daemon that it forks dies right after this step, or both do."""

    def prepare() -> None:
        command = os.getpid()
        place, name = STEPS[step]
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
    done = program.ublk("add", "-t", "null", "-q", "2", prepare=dying_after(step, with_command=False))
    assert (done.status, done.out) == (ExitCode.FAILED, "")
    assert "the daemon died while it set the device up" in done.err
    assert inspect.device_ids() == []
    assert not list(state.RUN_DIR.glob("0.*"))
    check_machine(devices)


@pytest.mark.parametrize("step", STEPS)
def test_what_is_left_of_both_is_removed(devices: Devices, step: str) -> None:
    done = program.ublk("add", "-t", "null", "-q", "2", prepare=dying_after(step, with_command=True))
    assert (done.status, done.out) == (-signal.SIGKILL, "")
    until(lambda: inspect.status(0).info.state is State.DEAD, "the driver has noticed", 60)
    assert "no daemon; run: ublk " in program.ublk("list").out
    removed = program.ublk("del", "--dead")
    assert (removed.status, removed.out) == (0, ""), removed.err
    assert "deleted device 0" in removed.err
    assert inspect.device_ids() == []
    assert not list(state.RUN_DIR.glob("0.*"))
    check_machine(devices)


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
