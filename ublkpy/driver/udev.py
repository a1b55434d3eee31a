"""udev, which gives the nodes of an unprivileged device to its owner: set up, and waited for."""

from __future__ import annotations

import errno
import grp
import os
import subprocess
import sys
import time
from pathlib import Path

from ublkpy.driver import owner
from ublkpy.driver.ctrl import CONTROL, char_path
from ublkpy.errors import DriverError, UblkError
from ublkpy.folders import user_name

GROUP = "ublk"
RULES = Path("/etc/udev/rules.d/59-ublkpy.rules")
_TEMPLATE = Path(__file__).with_name("udev.rules")
_SOCKET = Path("/run/udev/control")
# udev(7). Those of other servers do as well.
_FOLDERS = [Path(p) for p in ("/etc/udev", "/run/udev", "/usr/local/lib/udev", "/usr/lib/udev", "/lib/udev")]
OWNED_DEADLINE = 30.0
_CURE = "have root run: ublk udev install"


def install() -> list[str]:
    """Make the group, write the rules, have udev apply them; what was done and is left to do. Raises UblkError."""
    _require_root()
    said = [f"wrote {RULES}"]
    text = rules(sys.executable)
    if not _has_group():
        _run("groupadd", "--system", GROUP)
        said.append(f"made the group {GROUP}")
    _write(text)
    said.append(_apply())
    said += [f"warning: {path} is not root's alone, and udev will run what is in it as root" for path in _open_parts()]
    said.append(f"who is in the group {GROUP} may add devices of his own: usermod -aG {GROUP} NAME, then a new login")
    return said


def remove() -> list[str]:
    """Take the rules away again. Raises UblkError."""
    _require_root()
    try:
        RULES.unlink()
    except FileNotFoundError:
        return [f"there is no {RULES}"]
    except OSError as e:
        raise UblkError(f"cannot remove {RULES}: {e.strerror}") from e
    said = [f"removed {RULES}", _apply()]
    if CONTROL.exists():  # which udev leaves as it is
        os.chown(CONTROL, 0, 0)
        CONTROL.chmod(0o600)
        said.append(f"closed {CONTROL} to all but root")
    return [*said, f"the group {GROUP} stays; it goes with: groupdel {GROUP}"]


def rules(python: str) -> str:
    """The rules, for an installation with this interpreter. UblkError for a path that they cannot name."""
    if not python or any(c in python for c in "'\"\\\n"):
        raise UblkError(
            f"udev's rules cannot name the interpreter {python!r}",
            "install ublkpy in a folder without quotes in its name",
        )
    # In rules, $ and % begin substitutions.
    path = python.replace("%", "%%").replace("$", "$$")
    return _TEMPLATE.read_text().replace("@GROUP@", GROUP).replace("@OWNER@", f"'{path}' -I -m {owner.__name__}")


def check_set_up() -> None:
    """DriverError if udev will give nobody his device: it could not even be deleted by him."""
    if not any("ublkc" in text for folder in _FOLDERS for text in _texts(folder / "rules.d")):
        raise DriverError("udev has no rules that give a user his devices", _CURE)
    if not _SOCKET.exists():
        raise DriverError("udev does not run, which gives a user his devices", "start systemd-udevd, as root")


def wait_owned(dev_id: int) -> None:
    """Wait until the character device is ours. Raises UblkError."""
    path, deadline = char_path(dev_id), time.monotonic() + OWNED_DEADLINE
    while not os.access(path, os.R_OK | os.W_OK):
        if time.monotonic() > deadline:
            raise UblkError(
                f"udev did not give {path} to {user_name(os.geteuid())} within {OWNED_DEADLINE:g} s",
                f"{_CURE}; and ublk del -n {dev_id}",
            )
        time.sleep(0.01)


def why_closed(number: int) -> str:
    """What to do about a block device that its owner cannot open, for the errno of that."""
    if number == errno.EPERM:
        return "the driver opens it to the user and group alone that added it; see newgrp(1)"
    return _CURE


def _require_root() -> None:
    if os.geteuid() != 0:
        raise DriverError("only root can set udev up", "run it with sudo")


def _has_group() -> bool:
    try:
        grp.getgrnam(GROUP)
    except KeyError:
        return False
    return True


def _write(text: str) -> None:
    new = RULES.with_suffix(".new")  # which udev does not read
    try:
        RULES.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(text)
        new.chmod(0o644)
        new.replace(RULES)
    except OSError as e:
        raise UblkError(f"cannot write {RULES}: {e.strerror}") from e


def _apply() -> str:
    if not _SOCKET.exists():
        return "udev does not run: the rules apply when it does"
    _run("udevadm", "control", "--reload")
    for subsystem, name in (("misc", CONTROL.name), ("ublk-char", "*"), ("block", "ublkb*")):
        _run("udevadm", "trigger", f"--subsystem-match={subsystem}", f"--sysname-match={name}", "--settle")
    found = "" if CONTROL.exists() else f"; {CONTROL} comes with: modprobe ublk_drv"
    return f"udev has applied the rules{found}"


def _run(*argv: str) -> None:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # su keeps the user's
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=180, env=os.environ | {"PATH": path})
    except OSError as e:
        raise UblkError(f"cannot run {argv[0]}: {e.strerror}", "install it, or do by hand what it does") from e
    except subprocess.TimeoutExpired as e:
        raise UblkError(f"{' '.join(argv)} is not done after {e.timeout:g} s", "what does udev wait for?") from e
    if done.returncode:
        raise UblkError(f"{' '.join(argv)} failed: {done.stderr.strip() or done.stdout.strip()}")


def _open_parts() -> list[Path]:
    """The first of the folders and files that udev will run which others than root can change."""
    parts = dict.fromkeys(
        part for file in (Path(sys.executable), Path(sys.executable).resolve(), Path(__file__)) for part in _way(file)
    )
    return [part for part in parts if _is_open(part)][:1]


def _way(path: Path) -> list[Path]:
    return [*reversed(path.parents), path]


def _is_open(path: Path) -> bool:
    found = path.lstat()
    sticky_folder = found.st_mode & 0o1000
    link = path.is_symlink()  # whose mode means nothing
    return found.st_uid != 0 or bool(found.st_mode & 0o022 and not sticky_folder and not link)


def _texts(folder: Path) -> list[str]:
    found = []
    for file in folder.glob("*.rules"):
        try:
            found.append(file.read_text(errors="replace"))
        except OSError:
            continue
    return found
