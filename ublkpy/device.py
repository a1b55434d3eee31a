"""A ublk device, for Python programs: all that the ``ublk`` command does, and devices of the program's own.

::

    from ublkpy import Device

    with Device(Ram({"size": 1 << 30}), queues=2) as device:  # served by this program, see docs/write-a-target.md
        print(device.node)

    device = Device.add("disk.yaml")  # by a daemon
    device.resize(2 << 30)
    device.delete()

Every method raises ``ublkpy.errors.UblkError``, which has a message and a hint, and needs the privileges that the
command needs. None is bound to a thread. Most of them fork for a moment, but not what serves and deletes a device of
this program.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ublkpy.errors import ConfigError, NoDeviceError, UblkError

if TYPE_CHECKING:
    from ublkpy.config import DeviceConfig
    from ublkpy.driver.inspect import DeviceStatus
    from ublkpy.life.within import Session
    from ublkpy.tgt.base import Progress, Target
    from ublkpy.uring.uapi import ParamGroups

_log = logging.getLogger(__name__)

# Each method imports what it needs: the command starts quicker.


@functools.total_ordering
class Device:
    """The device with an id, whether it exists or not; or that of a target, served by threads of this process.

    As a context manager, it is deleted at the end of the block, in use or not; with ``async with``, the event loop goes
    on meanwhile. A target's device is served from the beginning of the block on, or from ``serve`` until ``delete``.
    """

    def __init__(self, what: int | Target, **options: Any) -> None:
        """``options`` are those of every device, such as ``queues=2``, for a target. ConfigError for what makes no
        sense."""
        self._session: Session | None = None
        if not isinstance(what, int):
            from ublkpy.life.within import Session

            self._session = Session(what, options)
        elif options:
            raise ConfigError(
                f"device {what} is there, or not, as it was added: it takes no {', '.join(options)}",
                "give options to Device(target, ...), or to Device.add()",
            )
        else:
            self._dev_id = what

    @classmethod
    def add(
        cls,
        what: DeviceConfig | Target | str | Path,
        on_ready: Callable[[int], None] = lambda dev_id: None,
        **options: Any,
    ) -> Device:
        """Serve a new device, described by a YAML file or a DeviceConfig, from a daemon of its own; or that of a
        target, with ``options``.

        ``on_ready`` is called with the id once the node can be opened; what it raises takes the device back.
        """
        from ublkpy.config import DeviceConfig, Draft, build, parse_options, read_yaml
        from ublkpy.life.add import add
        from ublkpy.tgt.base import Target

        if isinstance(what, Target):
            config = DeviceConfig(parse_options(options), what)
        elif options:
            raise ConfigError(
                f"{', '.join(options)}: options are for a target; {what} says its own",
                "say them there, or leave them out",
            )
        else:
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
    def dev_id(self) -> int:
        """Its id. NoDeviceError for a target that is not served yet, or no longer."""
        return self._session.dev_id if self._session else self._dev_id

    @property
    def target(self) -> Target | None:
        """What this program serves; None for a device with an id."""
        return self._session.target if self._session else None

    @property
    def node(self) -> str:
        """The block device."""
        return f"/dev/ublkb{self.dev_id}"

    def __eq__(self, other: object) -> bool:
        """Devices with an id are the same if that is."""
        if not isinstance(other, Device) or self._session or other._session:
            return self is other
        return self._dev_id == other._dev_id

    def __hash__(self) -> int:
        return id(self) if self._session else hash(self._dev_id)

    def __lt__(self, other: Device) -> bool:
        return self.dev_id < other.dev_id

    def __repr__(self) -> str:
        if self._session:
            where = f" at /dev/ublkb{self._session.dev_id}" if self._session.is_serving else ""
            return f"<Device of target {self._session.target.name}{where}>"
        return f"Device({self._dev_id})"

    def __enter__(self) -> Device:
        if self._session:
            self._session.serve()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self._leave()
        except UblkError as e:
            if error is None:
                raise
            _log.error("%s", e.message)  # and what ended the block goes on

    async def __aenter__(self) -> Device:
        import asyncio  # slow, and no command needs it

        try:
            await _in_thread(self.__enter__)
        except asyncio.CancelledError:
            await _in_thread(self._leave)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await _in_thread(lambda: self.__exit__(kind, error, tb))

    def _leave(self) -> None:
        if self._session:
            self._session.delete(force=True)
            return
        from ublkpy.driver.users import openers

        with contextlib.suppress(NoDeviceError):  # deleted in the block
            # Who has it open, perhaps this very program, may be waiting for us.
            self.delete(force=True, wait=not openers(self.dev_id, server=False))

    def serve(self) -> None:
        """Have threads of this process serve the target's device, from when this returns until ``delete``, or the end
        of the program. BusyError if they do already."""
        if not self._session:
            raise ConfigError(
                f"device {self.dev_id} is known by its id alone: there is no target to serve it with",
                "Device(target) has one; a device that was stopped is served again with start()",
            )
        self._session.serve()

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
        """Stop and delete it. BusyError if it is in use, unless ``force``, which also kills a stuck daemon.

        That of a target may be gone already. If it went by itself, because a queue failed, UblkError says so.
        """
        if session := self._session or self._served_here():
            session.delete(force=force)
            return
        from ublkpy.driver.delete import delete

        delete(self.dev_id, force=force, wait=wait)

    def _served_here(self) -> Session | None:
        """Who waits for STOP_DEV of a device that he serves may wait for ever: daemon/server.py."""
        from ublkpy.life.within import find

        return find(self.dev_id)

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

    def resync(self, *, force: bool = False, tell: Callable[[Progress], None] = lambda _: None) -> None:
        """Bring back legs of a mirror that had failed, and wait until they are in sync; ``force``: also onto files that
        hold something else. ``tell`` hears now and then how far it is. UblkError if it is given up.
        """
        from ublkpy.life.resync import resync

        resync(self.dev_id, force=force, tell=tell)

    def set_affinity(self, q_id: int, cpus: Collection[int]) -> None:
        """Have the threads of a queue run on these CPUs, for as long as the daemon lives."""
        from ublkpy.life.affinity import set_affinity

        set_affinity(self.dev_id, q_id, cpus)

    def _supervise(self, config: DeviceConfig) -> None:
        if config.device.supervise:
            from ublkpy.life.supervise import supervise

            supervise(self.dev_id)


async def _in_thread(action: Callable[[], Any]) -> None:
    """Not on the event loop; cancelled only when it is done."""
    import asyncio

    working = asyncio.ensure_future(asyncio.to_thread(action))
    try:
        await asyncio.shield(working)
    except asyncio.CancelledError:
        while not working.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([working])
        if error := working.exception():
            _log.error("%s", error)
        raise
