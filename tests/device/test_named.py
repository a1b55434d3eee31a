"""A device with a name is found again when its daemon died."""

from __future__ import annotations

from pathlib import Path

import pytest

from ublkpy.errors import BusyError, ExitCode
from ublkpy.life.add import add
from ublkpy.uring.uapi import State

from . import disk, program
from .devices import MIB, Devices, configure, until


@pytest.fixture
def file(scratch: Path) -> Path:
    return disk.image(scratch / "image", MIB)


@pytest.mark.any_kernel
def test_a_name_is_one_devices(devices: Devices) -> None:
    device = devices.null(name="disk")
    with pytest.raises(BusyError, match=rf"{device.node} has the name disk already, and process {device.pid} serves"):
        add(configure("null", name="disk"))
    devices.null(name="another")


def test_a_new_daemon_in_the_background_is_a_matter_of_recover(devices: Devices) -> None:
    device = devices.null(name="disk", recovery="queue")
    device.kill_daemon()
    with pytest.raises(BusyError, match="waits for a daemon") as caught:
        add(configure("null", name="disk", recovery="queue"))
    assert caught.value.hint == f"give it one: ublk recover -n {device.id}"


def test_the_foreground_takes_it_up_again(devices: Devices, file: Path) -> None:
    device = devices.loop(file, name="disk", recovery="queue")
    disk.write(device.node, 0, b"new" * 512, 0)
    device.kill_daemon()
    with program.foreground("-t", "loop", "-f", str(file), "--name", "disk", "-r", "1") as command:
        assert command.out == f"{device.node}\n"
        assert (device.pid, device.state) == (command.pid, State.LIVE)
        assert disk.read(device.node, 0, 3 * 512) == b"new" * 512
        assert "keeps the options" not in command.err
        devices.remove(device)
        assert command.result().status == 0


def test_it_keeps_its_options(devices: Devices, file: Path) -> None:
    device = devices.loop(file, name="disk", recovery="queue")
    device.kill_daemon()
    with program.foreground("-t", "null", "--name", "disk") as command:
        known = device.status().known
        assert known
        assert known.backing == str(file)
        assert f"{device.node} keeps the options that it was added with" in command.err
        devices.remove(device)
        assert command.result().status == 0


def test_a_recovery_that_fails_leaves_the_device_waiting(devices: Devices, file: Path) -> None:
    device = devices.loop(file, name="disk", recovery="queue")
    device.kill_daemon()
    file.rename(file.with_name("away"))
    done = program.ublk("add", "--foreground", "--name", "disk", "-t", "null")
    assert done.status == ExitCode.FAILED
    assert str(file) in done.err
    until(lambda: device.state is State.QUIESCED, "it waits on")
    file.with_name("away").rename(file)
    with program.foreground("--name", "disk", "-t", "null") as command:
        assert device.pid == command.pid
        devices.remove(device)


def test_one_that_is_dead_makes_way(devices: Devices) -> None:
    device = devices.null(name="disk", id=7)
    device.kill_daemon()
    again = devices.null(name="disk", id=7)
    assert again.pid
    assert again.state is State.LIVE


def test_other_names_are_left_alone(devices: Devices) -> None:
    device = devices.null(name="disk")
    device.kill_daemon()
    devices.null(name="another")
    assert device.exists()
