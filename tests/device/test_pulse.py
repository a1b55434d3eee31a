"""Daemons that run, but do not do their work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ublkpy.daemon import pulse

from . import program
from .devices import Device, Devices, until


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemons are children of this process, and have its numbers."""
    monkeypatch.setattr("ublkpy.daemon.server.PERIOD", 0.5)
    monkeypatch.setattr(pulse, "_PATIENCE", 2.0)


@contextmanager
def stopped(device: Device) -> Iterator[int]:
    """Its daemon holds still for as long as the block lasts."""
    pid = device.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGCONT)


def trouble(device: Device) -> str | None:
    """What `ublk list` says."""
    (found,) = [d for d in json.loads(program.ublk("list", "--json").out)["devices"] if d["id"] == device.id]
    said: str | None = found["trouble"]
    return said


@pytest.mark.any_kernel
@pytest.mark.parametrize(("recovery", "cure"), [("none", "ublk del --force -n 0"), ("queue", "ublk recover -n 0")])
def test_a_daemon_that_does_not_answer(devices: Devices, recovery: str, cure: str) -> None:
    device = devices.null(recovery=recovery)
    assert trouble(device) is None
    with stopped(device) as pid:
        said = trouble(device)
        assert said
        assert said.startswith("its daemon does not answer; if that lasts, run: ")
        assert said.endswith(cure)
        assert (str(pid) in said) == (recovery != "none")
        listed = program.ublk("list")
        assert listed.out.splitlines()[1].endswith(f"({said})")
        assert said in program.ublk("list", "-n", "0").err
        assert json.loads(program.ublk("list", "-n", "0", "--json").out)["device"]["trouble"] == said
    assert trouble(device) is None


@pytest.mark.any_kernel
@pytest.mark.parametrize("what", ["read", "flush"])
def test_a_backing_that_does_not_answer(devices: Devices, scratch: Path, what: str) -> None:
    """One device on another: the daemon of the upper one is well, its requests are not."""
    log = scratch / "log"
    lower = devices.null()
    upper = devices.loop(lower.node, log=log)
    said = ""

    def is_stuck() -> bool:
        nonlocal said
        said = trouble(upper) or ""
        return bool(said)

    read = ["dd", f"if={upper.node}", "of=/dev/null", "bs=4k", "count=1", "iflag=direct"]
    argv = read if what == "read" else ["sync", str(upper.node)]
    with stopped(lower):
        client = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
        until(is_stuck, "it is found")
        assert said.startswith("requests wait, and none was answered for ")
        assert said.endswith(f"look after {lower.node}, or run: ublk del --force -n {upper.id}")
        assert "requests wait, and none was answered for" in log.read_text()
    assert client.wait(30) == 0
    assert trouble(upper) is None
    until(lambda: "requests are answered again" in log.read_text(), "that is told, too")


def test_requests_that_come_and_go_are_no_trouble(devices: Devices) -> None:
    device = devices.null()
    argv = ["fio", "--name=load", f"--filename={device.node}", "--direct=1", "--rw=randread", "--bs=4k", "--thread"]
    with subprocess.Popen([*argv, "--time_based", "--runtime=4"], stdout=subprocess.DEVNULL) as fio:
        while fio.poll() is None:
            assert trouble(device) is None
    assert fio.returncode == 0
