"""/dev/ublk-control: what is said when it cannot be used."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ublkpy.driver import ctrl
from ublkpy.driver.ctrl import CONTROL, Control, require_driver
from ublkpy.errors import DriverError, UblkError

InChild = Callable[[Callable[[], object]], Any]
OpenFds = Callable[[], set[str]]

no_driver = pytest.mark.skipif(CONTROL.exists(), reason=f"{CONTROL} exists: nothing to be said about its absence")


@no_driver
@pytest.mark.parametrize("use", [Control, require_driver])
def test_no_driver(use: Callable[[], object]) -> None:
    with pytest.raises(DriverError) as caught:
        use()
    assert caught.value.message == f"{CONTROL} does not exist: the ublk driver is not loaded"
    assert "modprobe ublk_drv" in caught.value.hint


@pytest.fixture
def control_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ordinary file where the driver would be."""
    path = tmp_path / "ublk-control"
    path.touch()
    monkeypatch.setattr(ctrl, "CONTROL", path)
    return path


def test_no_permission(control_file: Path, in_child: InChild) -> None:
    control_file.chmod(0o600)

    def use() -> list[str]:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        else:
            control_file.chmod(0)
        with pytest.raises(DriverError) as caught:
            Control()
        return [caught.value.message, caught.value.hint]

    if os.geteuid() == 0:
        for folder in control_file.parents:
            if folder.name.startswith("pytest-"):
                folder.chmod(0o755)
        control_file.parent.chmod(0o755)
    message, hint = in_child(use)
    assert message == f"no permission to open {control_file}"
    assert hint.startswith("run it as root, for example with sudo; or")
    assert "ublk udev install" in hint


@pytest.mark.parametrize("err", [errno.ENOSYS, errno.EPERM])
def test_no_io_uring(control_file: Path, err: int) -> None:
    error = ctrl._open_error(OSError(err, os.strerror(err)))
    assert "io_uring" in error.message
    assert "kernel.io_uring_disabled=0" in error.hint


@pytest.mark.parametrize("err", [errno.EMFILE, errno.ENOMEM, errno.EIO])
def test_other_reasons_are_told(control_file: Path, err: int) -> None:
    error = ctrl._open_error(OSError(err, os.strerror(err)))
    assert isinstance(error, DriverError)
    assert os.strerror(err) in error.message


@pytest.mark.parametrize(
    "command",
    [
        lambda control: control.info(5),
        lambda control: control.params(5),
        lambda control: control.param_groups(5),
        lambda control: control.features(),
        lambda control: control.affinity(5, 0),
        lambda control: control.start(5, -1),
        lambda control: control.stop(5, 1.0),
        lambda control: control.delete(5, 1.0),
        lambda control: control.delete_async(5, 1.0),
        lambda control: control.start_recovery(5),
        lambda control: control.end_recovery(5, -1),
    ],
)
def test_every_command_turns_an_errno_into_an_error(
    control_file: Path, command: Callable[[Control], object], open_fds: OpenFds
) -> None:
    """The file knows no commands; so its kernel says EOPNOTSUPP."""
    before = open_fds()
    with Control() as control, pytest.raises(UblkError) as caught:
        command(control)
    assert caught.value.message.startswith("this kernel's ublk driver has no ")
    assert open_fds() == before
