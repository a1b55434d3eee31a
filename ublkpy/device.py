"""A ublk device, for Python programs: all that the ``ublk`` command does.

::

    from ublkpy import Device

    device = Device.add("disk.yaml")
    device.resize(2 << 30)
    device.delete()

Every method raises ``ublkpy.errors.UblkError``, which has a message and a hint, and needs the privileges that the
command needs. None is bound to a thread, but most of them fork, and so want a process without threads of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ublkpy.errors import NoDeviceError

if TYPE_CHECKING:
    from ublkpy.config import DeviceConfig
    from ublkpy.driver.inspect import DeviceStatus
    from ublkpy.uring.uapi import ParamGroups

# Each method imports what it needs: the command starts quicker.


@dataclass(frozen=True, order=True)
class Device:
    """The device with this id, whether it exists or not."""

    dev_id: int

    @classmethod
    def add(cls, what: DeviceConfig | str | Path, on_ready: Callable[[int], None] = lambda dev_id: None) -> Device:
        """Serve a new device, configured or described by a YAML file, from a daemon of its own.

        ``on_ready`` is called with the id once the node can be opened; what it raises takes the device back.
        """
        from ublkpy.config import DeviceConfig, Draft, build, read_yaml
        from ublkpy.life.add import add

        config = what if isinstance(what, DeviceConfig) else build(Draft(), read_yaml(Path(what)))
        device = cls(add(config, on_ready))
        device._supervise(config)
        return device

    @classmethod
    def all(cls) -> list[Device]:
        """The devices of every server, by id."""
        from ublkpy.driver.inspect import device_ids

        return [cls(dev_id) for dev_id in device_ids()]

    @property
    def node(self) -> str:
        """The block device."""
        return f"/dev/ublkb{self.dev_id}"

    def exists(self) -> bool:
        """Whether the driver knows the id."""
        try:
            self.status()
        except NoDeviceError:
            return False
        return True

    def status(self) -> DeviceStatus:
        """What the driver and the daemon say of it; ``status().to_dict()`` is the object of ``ublk list --json``."""
        from ublkpy.driver.inspect import status

        return status(self.dev_id)

    def params(self) -> ParamGroups:
        """The parameters of its disk as the driver holds them, with the kernel's names and units, in groups."""
        from ublkpy.driver.inspect import params

        return params(self.dev_id)

    def delete(self, *, force: bool = False, wait: bool = True) -> None:
        """Stop and delete it. BusyError if it is in use, unless ``force``, which also kills a stuck daemon."""
        from ublkpy.driver.delete import delete

        delete(self.dev_id, force=force, wait=wait)

    def stop(self, *, safe: bool = False, force: bool = False) -> None:
        """Take the block device away, but keep the id and what it was, for ``start``.

        BusyError if it is in use, unless ``force``; with ``safe``, also if anybody has it open.
        """
        from ublkpy.life.stop import stop

        stop(self.dev_id, safe=safe, force=force)

    def start(self) -> None:
        """Serve it again after ``stop``, or after its daemon died without recovery."""
        from ublkpy.life.stop import start

        self._supervise(start(self.dev_id))

    def recover(self) -> None:
        """Start a new daemon for it, after the old one died or it was quiesced."""
        from ublkpy.life.recover import recover

        self._supervise(recover(self.dev_id))

    def quiesce(self) -> None:
        """Have requests wait, and the daemon end, until ``recover``."""
        from ublkpy.life.upgrade import quiesce

        quiesce(self.dev_id)

    def upgrade(self) -> float | None:
        """Replace its daemon by one of this version, without a failed request; for how many seconds they waited.

        None if a systemd unit did it, whose daemon it was.
        """
        from ublkpy.life import supervise
        from ublkpy.life.upgrade import upgrade

        seconds = upgrade(self.dev_id)
        supervise.renew(self.dev_id)
        return seconds

    def resize(self, size: int, *, force: bool = False) -> None:
        """Give it, and its backing where that can, so many bytes. BusyError for a cut in use, unless ``force``."""
        from ublkpy.life.resize import resize

        resize(self.dev_id, size, force=force)

    def set_affinity(self, q_id: int, cpus: Collection[int]) -> None:
        """Have the threads of a queue run on these CPUs, for as long as the daemon lives."""
        from ublkpy.life.affinity import set_affinity

        set_affinity(self.dev_id, q_id, cpus)

    def _supervise(self, config: DeviceConfig) -> None:
        if config.device.supervise:
            from ublkpy.life.supervise import supervise

            supervise(self.dev_id)
