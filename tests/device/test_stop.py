"""Devices that are stopped, started again, and told which CPUs to use."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest

from ublkpy import Device as Api
from ublkpy.daemon.channel import KEEP, held
from ublkpy.driver import delete, inspect, state
from ublkpy.errors import BusyError, ConfigError, ExitCode, UblkError
from ublkpy.uring.uapi import Feature, State

from . import disk, program
from .devices import MIB, Devices, held_open


def test_stop_and_start(devices: Devices, scratch: Path) -> None:
    data = disk.pattern(4 * MIB)
    file = disk.image(scratch / "image", 8 * MIB, data)
    device = devices.loop(file, queues=2, depth=7, read_only=True)
    pid, before = device.pid, device.status()
    assert program.ublk("stop", "-n", str(device.id)) == program.Result(0, "", "")
    assert not device.node.exists()
    assert not Path(f"/proc/{pid}").exists()
    assert device.status().info.state is State.DEAD
    assert f"no daemon; run: ublk start -n {device.id}" in program.ublk("list").out
    started = program.ublk("start", "-n", str(device.id))
    assert (started.status, started.out) == (0, f"{device.node}\n"), started.err
    after = device.status()
    assert after.known
    assert before.known
    assert after.known.config == before.known.config | {
        "device": {**before.known.config["device"], "id": device.id},
    }
    assert after.disk == before.disk
    assert disk.read(device.node, 0, 4 * MIB) == data


def test_dirty_pages_are_written(devices: Devices, scratch: Path) -> None:
    file = disk.image(scratch / "image", 8 * MIB)
    device = devices.loop(file, recovery="queue")
    device.node.write_bytes(b"dirty" * 1000)
    Api(device.id).stop()
    assert file.read_bytes()[:5000] == b"dirty" * 1000


def test_a_stopped_device_is_deleted(devices: Devices) -> None:
    device = devices.null()
    Api(device.id).stop()
    Api(device.id).stop()  # is no error: it is as wanted
    devices.remove(device)
    assert not device.exists()


def test_a_device_that_is_in_use(devices: Devices) -> None:
    device = devices.null()
    with held_open(device.node, os.O_RDONLY | os.O_EXCL):
        refused = program.ublk("stop", "-n", str(device.id))
        assert refused.status == ExitCode.BUSY
        assert device.status().info.state is State.LIVE
        assert program.ublk("stop", "-n", str(device.id), "--force").status == 0
    assert device.status().info.state is State.DEAD


def test_safe_refuses_whatever_is_open(devices: Devices) -> None:
    device = devices.null()
    if Feature.SAFE_STOP_DEV not in inspect.features():
        refused = program.ublk("stop", "-n", str(device.id), "--safe")
        assert refused.status == ExitCode.FAILED
        assert "lacks UBLK_F_SAFE_STOP_DEV" in refused.err
        assert device.status().info.state is State.LIVE
        pytest.skip("this driver has no UBLK_F_SAFE_STOP_DEV (Linux 7.0)")
    with held_open(device.node), pytest.raises(BusyError, match=rf"is open in .*process {os.getpid()} "):
        Api(device.id).stop(safe=True)
    assert device.status().info.state is State.LIVE
    Api(device.id).stop(safe=True)
    assert device.status().info.state is State.DEAD
    Api(device.id).start()
    assert len(disk.read(device.node, 0, 4096)) == 4096


@pytest.mark.any_kernel
def test_safe_and_force() -> None:
    refused = program.ublk("stop", "-n", "0", "--safe", "--force")
    assert refused.status == ExitCode.USAGE
    assert "exclude each other" in refused.err


def test_a_device_whose_daemon_died_is_started(devices: Devices) -> None:
    device = devices.null(size=3 * MIB)
    device.kill_daemon()
    Api(device.id).start()
    assert device.status().info.state is State.LIVE
    assert device.status().size == 3 * MIB


def test_a_device_that_is_served_is_not_started(devices: Devices) -> None:
    device = devices.null()
    refused = program.ublk("start", "-n", str(device.id))
    assert refused.status == ExitCode.BUSY
    assert f"device {device.id} is not stopped: it is LIVE" in refused.err
    assert device.status().info.state is State.LIVE


def test_a_device_that_waits_is_recovered_rather_than_started(devices: Devices) -> None:
    device = devices.null(recovery="queue")
    device.kill_daemon()
    Api(device.id).recover()
    device.kill_daemon()
    with pytest.raises(BusyError) as caught:
        Api(device.id).start()
    assert "recover" in caught.value.hint or "LIVE" in caught.value.message


def test_what_cannot_be_started_yet_can_be_tried_again(devices: Devices, scratch: Path) -> None:
    file = disk.image(scratch / "image", 8 * MIB)
    device = devices.loop(file)
    Api(device.id).stop()
    file.rename(scratch / "away")
    with pytest.raises(UblkError, match="does not exist"):
        Api(device.id).start()
    assert device.status().info.state is State.DEAD
    (scratch / "away").rename(file)
    Api(device.id).start()
    assert device.status().info.state is State.LIVE


@pytest.mark.any_kernel
def test_nothing_to_start() -> None:
    refused = program.ublk("start", "-n", "3")
    assert (refused.status, refused.out) == (ExitCode.NO_DEVICE, "")


@pytest.mark.any_kernel
def test_the_daemon_hears_only_what_it_understands(devices: Devices) -> None:
    device = devices.null()
    for packet in (
        b"{",
        b"[]",
        b'"x"',
        b'{"do": "dance"}',
        b'{"do": "resize"}',
        b'{"do": "hold", "on": 1}',
        b'{"do": "resize", "x": 2}',
        b"{}",
    ):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as daemon:
            daemon.settimeout(10)
            daemon.connect(str(state.channel_path(device.id)))
            daemon.send(packet)
            assert "error" in json.loads(daemon.recv(65536))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.connect(str(state.channel_path(device.id)))
        Api(device.id).stop()
    assert device.status().info.state is State.DEAD


@pytest.mark.any_kernel
@pytest.mark.logs
def test_only_force_stops_a_daemon_that_does_not_answer(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ublkpy.life.stop._ANSWER", 1.0)
    assert delete.stop.__kwdefaults__
    monkeypatch.setitem(delete.stop.__kwdefaults__, "timeout", 3.0)
    device = devices.null()
    pid = device.pid
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(UblkError, match="does not answer within"):
        Api(device.id).stop()
    Api(device.id).stop(force=True)
    assert state.process_start_time(pid) is None
    assert device.state is State.DEAD
    Api(device.id).start()
    assert device.status().info.state is State.LIVE


def test_who_has_given_up_is_not_obeyed(devices: Devices, scratch: Path) -> None:
    """An order that the daemon hears too late; and one that ends with the process that gave it."""
    file = disk.image(scratch / "image", 8 * MIB)
    device = devices.loop(file)
    os.kill(device.pid, signal.SIGSTOP)
    try:
        for order in (b'{"do": "hold", "what": "keep"}', b'{"do": "resize", "size": 4194304, "done": true}'):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as daemon:
                daemon.connect(str(state.channel_path(device.id)))
                daemon.send(order)
    finally:
        os.kill(device.pid, signal.SIGCONT)
    with held(device.id, KEEP, 10):
        pass
    assert device.status().size == 8 * MIB
    devices.remove(device)
    assert not state.read(device.id)


@pytest.mark.any_kernel
def test_a_stop_that_was_refused_changes_no_end_that_comes_later(devices: Devices, scratch: Path) -> None:
    """The device loses its tags then, queue by queue, as one that somebody began to quiesce."""
    device = devices.null(queues=2, recovery="queue", log=scratch / "log")
    with held_open(device.node, os.O_RDONLY | os.O_EXCL), pytest.raises(BusyError):
        Api(device.id).stop()
    devices.remove(device)
    assert "giving it up" not in (scratch / "log").read_text()
    assert "has ended" in (scratch / "log").read_text()
    assert not state.read(device.id)


def test_the_socket_is_for_the_owner_alone(devices: Devices) -> None:
    path = state.channel_path(devices.null().id)
    assert path.stat().st_mode & 0o777 == 0o600


def test_queues_run_where_they_are_told(devices: Devices) -> None:
    device = devices.null(queues=2)
    known = device.status().known
    assert known
    for name in ("set-affinity", "set_affinity"):
        for cpus, spelled in (({0, 1}, "0-1"), ({1}, "[1]"), ({0}, "0")):
            done = program.ublk(name, "-n", str(device.id), "-q", "1", "--cpuset", spelled)
            assert done == program.Result(0, "", "")
            assert os.sched_getaffinity(known.queues[1].tid) == cpus
    assert f"queue 1: tid {known.queues[1].tid} affinity(0 )" in program.ublk("list", "-n", str(device.id)).out


def test_all_threads_of_a_queue(devices: Devices) -> None:
    if Feature.PER_IO_DAEMON not in inspect.features():
        pytest.skip("this driver has no UBLK_F_PER_IO_DAEMON (Linux 6.16)")
    device = devices.null(threads_per_queue=3)
    Api(device.id).set_affinity(0, {1})
    known = device.status().known
    assert known
    assert [os.sched_getaffinity(queue.tid) for queue in known.queues] == [{1}] * 3


def test_what_is_no_place_to_run(devices: Devices) -> None:
    device = devices.null()
    with pytest.raises(ConfigError, match="has no queue 1") as caught:
        Api(device.id).set_affinity(1, {0})
    assert caught.value.hint == "it has 1, from 0 on"
    with pytest.raises(UblkError, match="cannot have queue 0 run on CPUs 4000"):
        Api(device.id).set_affinity(0, {4000})
    refused = program.ublk("set-affinity", "-n", str(device.id), "-q", "0", "--cpuset", "3-1")
    assert refused.status == ExitCode.USAGE
    assert "'3-1' is not a set of CPUs such as 0-3,5" in refused.err
    device.kill_daemon()
    with pytest.raises(UblkError, match="nobody serves"):
        Api(device.id).set_affinity(0, {0})
