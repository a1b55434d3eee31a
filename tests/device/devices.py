"""Devices under test."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ublkpy.config import DeviceConfig, DeviceOptions, Draft, build
from ublkpy.driver import inspect
from ublkpy.driver.delete import delete
from ublkpy.errors import NoDeviceError
from ublkpy.life.add import add
from ublkpy.system.spawn import wait_end
from ublkpy.uring.uapi import State

MIB = 1 << 20


@dataclass(frozen=True)
class Device:
    """A device that was added."""

    id: int

    @property
    def node(self) -> Path:
        return Path(f"/dev/ublkb{self.id}")

    @property
    def sysfs(self) -> Path:
        return Path(f"/sys/block/ublkb{self.id}")

    @property
    def pid(self) -> int:
        """The daemon; the test fails when there is none."""
        pid = self.status().pid
        assert pid is not None, f"nobody serves {self.node}"
        return pid

    @property
    def state(self) -> State:
        return self.status().info.state

    def status(self) -> inspect.DeviceStatus:
        return inspect.status(self.id)

    def exists(self) -> bool:
        return self.id in inspect.device_ids()

    def queue(self, name: str) -> str:
        """A file of the request queue in sysfs."""
        return (self.sysfs / "queue" / name).read_text().strip()

    def completed(self, what: str) -> int:
        """How many requests the block layer has seen completed: reads, writes, discards or flushes."""
        field = {"reads": 0, "writes": 4, "discards": 11, "flushes": 15}[what]
        return int((self.sysfs / "stat").read_text().split()[field])

    def settled(self, what: str) -> int:
        """The same, when nothing is under way: who waits for a request is woken before it is counted."""
        until(lambda: (self.sysfs / "inflight").read_text().split() == ["0", "0"], "no request is under way")
        return self.completed(what)

    def kill_daemon(self) -> None:
        """SIGKILL, and wait until the process is gone."""
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        assert wait_end(pid, 60), f"process {pid} survived SIGKILL"


def configure(target: str, **options: Any) -> DeviceConfig:
    """A configuration from parsed values; those of every device and those of the target share one namespace."""
    device = {name: value for name, value in options.items() if name in DeviceOptions.options}
    own = {name: value for name, value in options.items() if name not in device}
    return build(Draft(device=device, target_type=target, target=own))


class Devices:
    """Adds devices and removes them again at the end of the test, the latest first."""

    def __init__(self) -> None:
        self._known: list[Device] = []

    def null(self, **options: Any) -> Device:
        return self.add("null", **{"size": 64 * MIB} | options)

    def loop(self, file: Path, **options: Any) -> Device:
        return self.add("loop", file=file, **options)

    def add(self, target: str, **options: Any) -> Device:
        return self.adopt(add(configure(target, **options)))

    def adopt(self, dev_id: int) -> Device:
        """Have a device that came about in another way removed, too."""
        device = Device(dev_id)
        self._known.append(device)
        return device

    def remove(self, device: Device) -> None:
        """Now, as the test's own act."""
        delete(device.id)

    def close(self) -> None:
        for device in reversed(self._known):
            with contextlib.suppress(NoDeviceError):
                delete(device.id)


def until(condition: Callable[[], object], what: str, seconds: float = 20.0) -> None:
    """Poll until ``condition`` holds; the test fails when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.01)


@contextlib.contextmanager
def held_open(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """An open file for as long as the block lasts."""
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
