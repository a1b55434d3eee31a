"""What there is: devices, and the driver's features."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ublkpy.driver import state
from ublkpy.driver.ctrl import Control, owner, reachable
from ublkpy.driver.disk import Disk
from ublkpy.errors import DriverError, NoDeviceError, UblkError, no_device
from ublkpy.system.spawn import isolated
from ublkpy.tgt.options import format_size
from ublkpy.uring.uapi import DevInfo, Feature, ParamGroups, State

_CLASS = Path("/sys/class/ublk-char")
_PARAMS_DEADLINE = 10.0


@dataclass(frozen=True)
class DeviceStatus:
    """A device as the driver knows it, and as its daemon described it if that was ublkpy's.

    ``disk`` is None before the start and after the stop, ``known`` for the devices of other servers. Nothing
    here comes from GET_PARAMS: it waits, where no signal reaches it, for a device that is being stopped.
    """

    info: DevInfo
    char_devno: str
    disk: Disk | None
    known: state.DeviceState | None

    @property
    def node(self) -> str:
        return f"/dev/ublkb{self.info.dev_id}"

    @property
    def pid(self) -> int | None:
        """The daemon, if it runs. On Linux 6.12 the driver still names one that died."""
        pid = self.info.ublksrv_pid
        if self.known:
            return self.known.pid if self.known.alive() else None
        return pid if pid > 0 and state.process_start_time(pid) is not None else None

    @property
    def size(self) -> int | None:
        """In bytes; None if nobody knows it."""
        if self.disk:
            return self.disk.size
        return self.known.target["dev_size"] if self.known else None

    @property
    def is_waiting(self) -> bool:
        """Whether it can be recovered: its daemon is gone, and the driver keeps requests, or the device, for another.

        Linux 6.12 may take some time to notice.
        """
        keeps = Feature.USER_RECOVERY in self.info.flags and self.info.state != State.DEAD
        return self.known is not None and self.pid is None and keeps

    @property
    def name(self) -> str | None:
        """The name that it was added with."""
        return self.known.config["device"].get("name") if self.known else None

    @property
    def summary(self) -> str:
        """For people: "/dev/ublkb0: loop on /srv/disk.img, 10G, batch+copy"."""
        if self.known is None:
            return f"{self.node}: not of ublkpy"
        backing = f" on {self.known.backing}" if self.known.backing else ""
        return f"{self.node}: {self.known.target['name']}{backing}, {format_size(self.size or 0)}, {self.known.mode}"

    @property
    def advice(self) -> str:
        """What to do about a device that nobody serves; empty for one that works."""
        if self.pid is not None:
            return ""
        dev_id = self.info.dev_id
        if self.is_waiting:
            return f"ublk recover -n {dev_id}"
        if self.known and self.info.state == State.DEAD and not self.known.within:
            return f"ublk start -n {dev_id}"
        return f"ublk del -n {dev_id}"

    def require_daemon(self, what: str) -> None:
        """UblkError for a device that cannot be ``what``, because a program serves it itself."""
        if self.known is None or not self.known.within:
            return
        dev_id, pid = self.info.dev_id, self.known.pid
        if self.pid is None:
            raise UblkError(
                f"device {dev_id} cannot be {what}: the program that served it itself, process {pid}, has ended",
                f"delete what is left of it: ublk del -n {dev_id}",
            )
        raise UblkError(
            f"device {dev_id} cannot be {what}: no daemon serves it, but a program itself, process {pid}",
            f"it can be deleted: ublk del -n {dev_id}; ublk add and Device.add() give a device a daemon",
        )

    def to_dict(self) -> dict[str, Any]:
        """The object of ``list --json``; docs/json.md describes it."""
        info, disk, known = self.info, self.disk, self.known
        return {
            "id": info.dev_id,
            "name": self.name,
            "node": self.node,
            "char_node": f"/dev/ublkc{info.dev_id}",
            "server": "ublkpy" if known else "foreign",
            "target": known.config["target"] if known else None,
            "backing": known.backing if known else None,
            "state": info.state.name,
            "advice": self.advice or None,
            "size": self.size,
            "logical_block_size": disk.logical_block if disk else None,
            "physical_block_size": disk.physical_block if disk else None,
            "attrs": [attr.name for attr in disk.attrs] if disk else None,
            "queues": info.nr_hw_queues,
            "queue_depth": info.queue_depth,
            "max_io_buf_bytes": info.max_io_buf_bytes,
            "io_desc_size": info.io_desc_size,
            "mode": known.mode if known else None,
            "flags": [flag.name for flag in info.flags],
            "pid": self.pid,
            "release": known.release if known else None,
            "queue_threads": [
                {"q_id": q.q_id, "tid": q.tid, "affinity": thread_affinity(q)} for q in (known.queues if known else [])
            ],
            "owner": {"uid": info.owner_uid, "gid": info.owner_gid},
        }


def device_ids() -> list[int]:
    """The ids of all devices, of every server."""
    if not _CLASS.exists():
        return []
    return sorted(int(p.name.removeprefix("ublkc")) for p in _CLASS.iterdir())


def reachable_ids() -> list[int]:
    """Those whose devices this user may ask for and delete: all for root, else his own."""
    return [dev_id for dev_id in device_ids() if reachable(dev_id)]


def incarnation(dev_id: int) -> int | None:
    """A number that no earlier or later device of this id has; None while it comes or goes.

    The inode of its folder in sysfs: the kernel uses no number twice (fs/kernfs/dir.c, __kernfs_new_node).
    """
    try:
        return (_CLASS / f"ublkc{dev_id}").stat().st_ino
    except OSError:
        return None


def status(dev_id: int) -> DeviceStatus:
    """One device; NoDeviceError if there is none."""
    with Control() as control:
        return _status(control, dev_id)


def list_devices() -> list[DeviceStatus]:
    """All devices that this user may ask for, by id."""
    found = []
    with Control() as control:
        for dev_id in reachable_ids():
            with contextlib.suppress(NoDeviceError, DriverError):  # another's meanwhile
                found.append(_status(control, dev_id))
    return found


def not_listed() -> list[str]:
    """A line for each user whose devices this one may not ask for."""
    others: dict[str, list[int]] = {}
    for dev_id in device_ids():
        if not reachable(dev_id):
            others.setdefault(owner(dev_id), []).append(dev_id)
    return [f"not shown: {', '.join(map(str, dev_ids))}, of {name}" for name, dev_ids in others.items()]


def features() -> Feature:
    """What this kernel's driver can do."""
    with Control() as control:
        return control.features()


def params(dev_id: int) -> ParamGroups:
    """The parameters of a device, whoever serves it. NoDeviceError if there is none.

    Asked in another process: while the device is being stopped, GET_PARAMS waits where no signal reaches it.
    """

    def ask() -> ParamGroups:
        with Control() as control:
            return control.param_groups(dev_id)

    try:
        found: ParamGroups = isolated(f"the parameters of device {dev_id}", ask, _PARAMS_DEADLINE)
    except TimeoutError as e:
        raise UblkError(
            f"the driver does not tell the parameters of device {dev_id}, because another command holds it",
            "it may be on its way to be stopped; ublk list shows its state",
        ) from e
    return found


def find_by_cookie(cookie: int) -> int | None:
    """The id of the device that was added with this cookie."""
    with Control() as control:
        for dev_id in reachable_ids():
            with contextlib.suppress(NoDeviceError, DriverError):  # gone since we looked, or another's
                if control.info(dev_id).ublksrv_flags == cookie:
                    return dev_id
    return None


def thread_affinity(queue: state.QueueState) -> list[int]:
    """The CPUs that a thread of a queue runs on now; those it was given if it is gone."""
    try:
        return sorted(os.sched_getaffinity(queue.tid))
    except OSError:
        return queue.affinity


def _status(control: Control, dev_id: int) -> DeviceStatus:
    info = control.info(dev_id)
    try:
        known = state.read(dev_id)
    except UblkError:
        known = None
    # An id that another server uses meanwhile: the file is left over.
    if known and known.cookie != info.ublksrv_flags:
        known = None
    return DeviceStatus(info, _char_devno(dev_id), Disk.read(dev_id), known)


def _char_devno(dev_id: int) -> str:
    """ "major:minor" of the character device."""
    try:
        return (_CLASS / f"ublkc{dev_id}" / "dev").read_text().strip()
    except OSError as e:
        raise no_device(dev_id) from e
