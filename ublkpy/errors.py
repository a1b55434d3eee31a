"""What can go wrong, as messages with a cause and a cure, and exit codes.

Everything that a user can cause or mend is an ``UblkError``; the command line
prints its message and hint on stderr and ends with its exit code. Any other
exception is a bug of ours and shows its traceback.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

__all__ = [
    "BusyError",
    "ConfigError",
    "DriverError",
    "ExitCode",
    "InterruptedByUser",
    "NoDeviceError",
    "UblkError",
]


class ExitCode(IntEnum):
    """Exit status of the ``ublk`` command.

    USAGE is a mistake that the command line or the configuration file shows by itself, or that this file cannot
    be read; what only this machine lacks, such as a backing or its right size, is FAILED: the same words may
    work later.
    """

    OK = 0
    """Done."""
    FAILED = 1
    """Anything else that the user can understand."""
    USAGE = 2
    """Command line or configuration."""
    NO_DEVICE = 3
    """No such device."""
    BUSY = 4
    """In use, or exists already."""
    NO_DRIVER = 5
    """No driver, or no privilege."""
    INTERRUPTED = 130
    """Ctrl-C, as a shell has it."""


class UblkError(Exception):
    """A failure that the user can understand: what happened, and what to do.

    ``message`` is what happened, ``hint`` the cure, best a command to run, or
    empty. Both are full sentences without a final full stop. Targets raise it too.
    """

    exit_code = ExitCode.FAILED
    """What the ``ublk`` command ends with."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def to_dict(self) -> dict[str, Any]:
        """The error as it travels from the daemon to the command that waits for it: ``kind`` (the class's name),
        ``message`` and ``hint``, without what a class has besides.
        """
        return {"kind": type(self).__name__, "message": self.message, "hint": self.hint}


class ConfigError(UblkError):
    """A command line, YAML file or option that cannot work; ``keys`` are the options that do not go together."""

    exit_code = ExitCode.USAGE

    def __init__(self, message: str, hint: str = "", keys: Sequence[str] = ()) -> None:
        super().__init__(message, hint)
        self.keys = keys


class NoDeviceError(UblkError):
    """The driver knows no device with this id."""

    exit_code = ExitCode.NO_DEVICE


class BusyError(UblkError):
    """The device or id is in use."""

    exit_code = ExitCode.BUSY


class DriverError(UblkError):
    """The ublk driver is not loaded, or this user may not use it, or the device."""

    exit_code = ExitCode.NO_DRIVER


class InterruptedByUser(UblkError):
    """Ctrl-C, or a signal to end, came before the work was done."""

    exit_code = ExitCode.INTERRUPTED


_KINDS = {
    cls.__name__: cls for cls in (UblkError, ConfigError, NoDeviceError, BusyError, DriverError, InterruptedByUser)
}


def from_dict(data: dict[str, Any]) -> UblkError:
    """The inverse of ``UblkError.to_dict``."""
    return _KINDS[data["kind"]](data["message"], data["hint"])


def no_device(dev_id: int) -> NoDeviceError:
    """The error for an id that the driver does not know."""
    return NoDeviceError(f"there is no ublk device {dev_id}", "ublk list shows the devices that exist")


# A row for each (control command, errno) whose cause we know: the error's
# class, its message and its cure. {id} is the device's id.
_COMMAND_ERRORS: dict[tuple[str, int], tuple[type[UblkError], str, str]] = {
    ("ADD_DEV", errno.EEXIST): (
        BusyError,
        "device id {id} is in use",
        "choose another id, leave -n out to get a free one, or run: ublk del -n {id}",
    ),
    ("ADD_DEV", errno.EACCES): (
        DriverError,
        "the driver allows no more devices",
        "raise its parameter ublks_max: /sys/module/ublk_drv/parameters/ublks_max",
    ),
    ("ADD_DEV", errno.EINVAL): (
        UblkError,
        "the driver refused these device parameters",
        "see the kernel log (dmesg); fewer queues, a smaller depth or other recovery options may work",
    ),
    ("SET_PARAMS", errno.EINVAL): (
        UblkError,
        "the driver refused the target's block sizes or limits",
        "check the size and block size options of the target",
    ),
    ("START_DEV", errno.EEXIST): (
        BusyError,
        "the block device of an earlier life of id {id} is still held open",
        "close whatever uses /dev/ublkb{id} (see: fuser -v /dev/ublkb{id}) and try again",
    ),
    ("TRY_STOP_DEV", errno.EBUSY): (
        BusyError,
        "device {id} is open",
        "see what uses it with: fuser -v /dev/ublkb{id}",
    ),
    ("REG_BUF", errno.EEXIST): (
        BusyError,
        "some of this memory is shared with device {id} already",
        "share it once, in one piece",
    ),
    ("REG_BUF", errno.EFAULT): (
        UblkError,
        "the driver cannot pin this memory for device {id}",
        "it must be memory as that of a memfd or of a hugetlbfs file, and there must be enough of it",
    ),
    ("START_USER_RECOVERY", errno.EBUSY): (
        BusyError,
        "device {id} is still held by its old daemon, or is not waiting for a new one",
        "see its state with: ublk list -n {id}",
    ),
}


def command_error(command: str, err: int, dev_id: int) -> UblkError:
    """The failure ``err`` (a positive errno) of a control command as an error for people."""
    known = _COMMAND_ERRORS.get((command, err))
    if known:
        cls, message, hint = known
        return cls(message.format(id=dev_id), hint.format(id=dev_id))
    if err == errno.ENODEV:
        return no_device(dev_id)
    if err in (errno.EPERM, errno.EACCES):
        return DriverError(f"no permission for {command} on device {dev_id}", "run it as root, for example with sudo")
    if err == errno.EOPNOTSUPP:
        return UblkError(f"this kernel's ublk driver has no {command}", "ublk features shows what it has")
    if err == errno.ENOMEM:
        return UblkError(
            f"{command} of device {dev_id}: the kernel has no memory for it", "use a smaller depth or fewer queues"
        )
    return UblkError(f"{command} of device {dev_id} failed: {os.strerror(err)}", "the kernel log (dmesg) may say more")
