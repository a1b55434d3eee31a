"""Errors: exit codes, the way through the pipe, and a cure for each failure of a control command."""

from __future__ import annotations

import errno
import inspect
import os

import pytest

from ublkpy import errors
from ublkpy.errors import (
    BusyError,
    ConfigError,
    DriverError,
    ExitCode,
    InterruptedByUser,
    NoDeviceError,
    UblkError,
    command_error,
    from_dict,
)

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, UblkError)]
KNOWN = sorted(errors._COMMAND_ERRORS)


@pytest.mark.parametrize(
    ("cls", "code"),
    [
        (UblkError, 1),
        (ConfigError, 2),
        (NoDeviceError, 3),
        (BusyError, 4),
        (DriverError, 5),
        (InterruptedByUser, 130),
    ],
)
def test_exit_code(cls: type[UblkError], code: int) -> None:
    assert cls("x").exit_code == code


def test_each_exit_code_has_a_meaning_of_its_own() -> None:
    codes = [cls.exit_code for cls in CLASSES]
    assert sorted({*codes, ExitCode.OK}) == sorted(ExitCode)
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("cls", CLASSES)
def test_dict_round_trip(cls: type[UblkError]) -> None:
    again = from_dict(cls("what", "cure").to_dict())
    assert type(again) is cls
    assert (again.message, again.hint, str(again)) == ("what", "cure", "what")


def test_hint_may_be_absent() -> None:
    assert from_dict(UblkError("what").to_dict()).hint == ""


@pytest.mark.parametrize(("command", "err"), KNOWN, ids=[f"{c}-{errno.errorcode[e]}" for c, e in KNOWN])
def test_known_command_error_has_a_cure_and_names_the_device(command: str, err: int) -> None:
    error = command_error(command, err, 4711)
    assert error.hint
    assert "{" not in error.message + error.hint
    if "{id}" in errors._COMMAND_ERRORS[command, err][1]:
        assert "4711" in error.message


@pytest.mark.parametrize(
    ("command", "err", "cls", "message"),
    [
        ("ADD_DEV", errno.EEXIST, BusyError, "device id 5 is in use"),
        ("ADD_DEV", errno.EACCES, DriverError, "the driver allows no more devices"),
        ("GET_DEV_INFO", errno.ENODEV, NoDeviceError, "there is no ublk device 5"),
        ("STOP_DEV", errno.ENODEV, NoDeviceError, "there is no ublk device 5"),
        ("DEL_DEV", errno.EPERM, DriverError, "no permission for DEL_DEV on device 5"),
        ("DEL_DEV", errno.EACCES, DriverError, "no permission for DEL_DEV on device 5"),
        ("DEL_DEV_ASYNC", errno.EOPNOTSUPP, UblkError, "this kernel's ublk driver has no DEL_DEV_ASYNC"),
        ("START_DEV", errno.ENOMEM, UblkError, "START_DEV of device 5: the kernel has no memory for it"),
        ("START_DEV", errno.EIO, UblkError, "START_DEV of device 5 failed: Input/output error"),
    ],
)
def test_command_error(command: str, err: int, cls: type[UblkError], message: str) -> None:
    error = command_error(command, err, 5)
    assert type(error) is cls
    assert error.message == message


@pytest.mark.parametrize("command", ["ADD_DEV", "DEL_DEV", "START_DEV"])
def test_every_errno_gives_a_message_and_a_cure(command: str) -> None:
    for err in errno.errorcode:
        error = command_error(command, err, 5)
        assert error.message, os.strerror(err)
        assert error.hint, os.strerror(err)


@pytest.mark.parametrize(("command", "err"), KNOWN)
def test_messages_end_without_a_full_stop(command: str, err: int) -> None:
    error = command_error(command, err, 5)
    assert not error.message.endswith(".")
    assert not error.hint.endswith(".")
