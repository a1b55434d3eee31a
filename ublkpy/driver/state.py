"""The state file of a device: all that ``recover`` and ``list`` need to know.

One JSON file a device in /run/ublkpy, or a folder of the user's own, replaced
atomically: written beside, synced, renamed. It is read only where nobody else
can have written it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ublkpy import folders
from ublkpy.errors import UblkError
from ublkpy.folders import RUN_DIR as RUN_DIR
from ublkpy.folders import run_dir as run_dir
from ublkpy.shmem import socket_path
from ublkpy.uring import libc
from ublkpy.version import __version__

VERSION = 2

_PF_EXITING = 0x4  # include/linux/sched.h
_SIGKILL = 1 << (signal.SIGKILL - 1)
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


@dataclass(frozen=True)
class QueueState:
    """A thread that serves a queue, and the CPUs that it was given."""

    q_id: int
    tid: int
    affinity: list[int]


@dataclass(frozen=True)
class DeviceState:
    """What a daemon says about its device.

    ``cookie`` also stands in the driver's ``ublksrv_flags``: a device with another value is not the one
    that this file is about. ``start_time`` (clock ticks since boot) tells a process from a later one with
    the same pid. ``queues`` lists the threads of each queue in turn. ``target`` is what the target says of itself
    for ``list``, ``shmem`` the numbers of the buffers that clients share, ``segments`` the shared memory segments that
    its disk is in, and which go with the file. ``kept``: the daemon has ended, and somebody
    means to go on with the device. ``within``: that process is no daemon, but a program that serves the device itself,
    and has other things to do. ``release``: the version of ublkpy that the daemon runs.
    """

    dev_id: int
    cookie: int
    pid: int
    start_time: int
    mode: str
    queues: list[QueueState]
    config: dict[str, Any]
    target: dict[str, Any]
    backing: str
    shmem: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    kept: bool = False
    within: bool = False
    release: str = __version__

    def alive(self) -> bool:
        """Whether the daemon that wrote this is still running."""
        return process_start_time(self.pid) == self.start_time


def check_folder() -> None:
    """UblkError unless state files can be kept."""
    try:
        folders.make(run_dir())
    except OSError as e:
        raise UblkError(f"cannot make {run_dir()}: {os.strerror(e.errno or errno.EIO)}") from e


def write(state: DeviceState) -> None:
    """Replace the device's file; a crash leaves the old or the new one, never a part. Raises UblkError."""
    path = _path(state.dev_id)
    new = _unfinished(state.dev_id)
    text = json.dumps({"version": VERSION, **asdict(state)}, indent=1)
    try:
        folders.make(run_dir())
        new.unlink(missing_ok=True)  # of a daemon that was killed meanwhile
        with os.fdopen(os.open(new, _NEW_FILE, 0o600), "w") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        new.replace(path)
    except OSError as e:
        with contextlib.suppress(OSError):
            new.unlink()
        raise UblkError(
            f"cannot write the state file {path}: {os.strerror(e.errno or errno.EIO)}",
            f"is there room in {path.parent}?",
        ) from e


def read(dev_id: int) -> DeviceState | None:
    """The device's state; None when there is no file. UblkError when it is not ours to understand."""
    path = _path(dev_id)
    try:
        if path.parent.exists():
            folders.trusted(path.parent)
        with os.fdopen(folders.open_own(path)) as f:
            data = json.load(f)
        if data.pop("version") != VERSION:
            raise UblkError(
                f"{path} was written by another version of ublkpy", f"delete the device: ublk del -n {dev_id}"
            )
        data["queues"] = [QueueState(**queue) for queue in data["queues"]]
        return DeviceState(**data)
    except FileNotFoundError:
        return None
    except OSError as e:
        why = "it is a link" if e.errno == errno.ELOOP else os.strerror(e.errno or 0)
        raise UblkError(f"cannot read {path}: {why}", f"remove it, and delete the device: ublk del -n {dev_id}") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise damaged(dev_id, e) from e


def damaged(dev_id: int, why: Exception) -> UblkError:
    """The error for a state file that cannot be understood."""
    return UblkError(
        f"{_path(dev_id)} is damaged: {type(why).__name__}: {why}",
        f"remove it, and delete the device with: ublk del -n {dev_id}",
    )


def remove(dev_id: int, cookie: int | None = None) -> None:
    """Remove the device's file, the memory that it names, and a socket that is left; with ``cookie``, only if it is
    that device's.
    """
    state = None
    with contextlib.suppress(UblkError):
        state = read(dev_id)
    if state and cookie not in (None, state.cookie):
        return
    for segment in state.segments if state else ():
        libc.shm_remove(segment)
    # A user whose folders went when he logged out has no files to remove.
    with contextlib.suppress(UblkError):
        for path in (_path(dev_id), _unfinished(dev_id), channel_path(dev_id), watch_path(dev_id), socket_path(dev_id)):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()


def channel_path(dev_id: int) -> Path:
    """Where the device's daemon hears orders."""
    return run_dir() / f"{dev_id}.sock"


def watch_path(dev_id: int) -> Path:
    """What the process that supervises the device holds locked."""
    return run_dir() / f"{dev_id}.watch"


def process_start_time(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None when there is none, or it is dying or dead."""
    try:
        # The name, in parentheses, may hold anything; fields count from behind it (proc(5)).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        pending = re.findall(r"^S(?:ig|hd)Pnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    exiting = int(fields[6]) & _PF_EXITING or any(int(mask, 16) & _SIGKILL for mask in pending)
    return None if fields[0] in "ZX" or exiting else int(fields[19])


def _unfinished(dev_id: int) -> Path:
    return run_dir() / f"{dev_id}.json.new"


def _path(dev_id: int) -> Path:
    return run_dir() / f"{dev_id}.json"
