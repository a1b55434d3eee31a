"""A ublk@.service, as systemctl and the journal show it."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

from tests.device.devices import Device, until
from tests.device.kernel import run
from ublkpy.driver import inspect


@dataclass(frozen=True)
class Unit:
    """The instance of this name."""

    name: str

    @property
    def full_name(self) -> str:
        return f"ublk@{self.name}.service"

    def show(self, name: str) -> str:
        """A property, as `systemctl show` has it."""
        return run("systemctl", "show", "--value", "-p", name, self.full_name).strip()

    @property
    def pid(self) -> int:
        return int(self.show("MainPID"))

    @property
    def device(self) -> Device:
        """The device that bears the unit's name."""
        found = [device.info.dev_id for device in inspect.list_devices() if device.name == self.name]
        assert len(found) == 1, f"devices of {self.full_name}: {found}"
        return Device(found[0])

    @property
    def mode(self) -> str:
        known = self.device.status().known
        assert known
        return known.mode

    def systemctl(self, verb: str) -> None:
        run("systemctl", verb, self.full_name)

    def journal(self, *options: str) -> str:
        run("journalctl", "--sync")
        return run("journalctl", "-b", "-o", "cat", "-u", self.full_name, *options)

    def until_restarted(self, before: int) -> None:
        """Wait until another process than `before` serves."""
        until(
            lambda: self.show("ActiveState") == "active" and self.pid not in (0, before),
            f"{self.full_name} is restarted",
            60,
        )

    def status(self) -> str:
        """`systemctl status`, which fails for a unit that does not run."""
        argv = ["systemctl", "status", "--no-pager", "--full", self.full_name]
        return subprocess.run(argv, capture_output=True, text=True, timeout=30).stdout
