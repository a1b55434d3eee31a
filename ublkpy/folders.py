"""Where files of ours are: root's in the system's folders, those of another user in folders of his own.

A state file says what ``recover`` runs, and a log is appended to: so nobody else may put files in these folders,
neither his own nor links to those of others.
"""

from __future__ import annotations

import errno
import os
import pwd
import socket
import stat
from pathlib import Path

from ublkpy.errors import UblkError

RUN_DIR = Path("/run/ublkpy")
SOCKETS = Path("/run/ublk")
LOG_FILE = Path("/var/log/ublkpy.log")
_USERS = Path("/run/user")
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def run_dir() -> Path:
    """The folder of state files, for this user; it may not be there yet. UblkError when he has none of his own."""
    uid = os.geteuid()
    if uid == 0:
        return RUN_DIR
    # After su, the variable may name the folder of another.
    for base in filter(None, (os.environ.get("XDG_RUNTIME_DIR"), str(_USERS / str(uid)))):
        if not problem(Path(base)):
            return Path(base) / "ublkpy"
    raise UblkError(
        f"there is no folder for state files: neither XDG_RUNTIME_DIR nor {_USERS / str(uid)} is a folder that is"
        f" {user_name(uid)}'s alone",
        f"log in as this user (su and sudo make no such folder), or have root run: loginctl enable-linger"
        f" {user_name(uid)}",
    )


def socket_dir() -> Path:
    """The folder of sockets: root's is that of ublksrv, whose clients look there. Raises UblkError."""
    return run_dir() if os.geteuid() else SOCKETS


def log_file() -> Path:
    """The log where there is no journal."""
    if os.geteuid() == 0:
        return LOG_FILE
    base = os.environ.get("XDG_STATE_HOME", "")
    # Relative ones do not count (XDG Base Directory Specification).
    home = Path(base) if base.startswith("/") else Path(pwd_home()) / ".local/state"
    return home / "ublkpy/ublkpy.log"


def make(folder: Path) -> Path:
    """The folder, made if it is not there. UblkError when it is not ours alone, OSError when it cannot be made."""
    if not os.path.lexists(folder):
        folder.mkdir(mode=0o755, exist_ok=True)
    return trusted(folder)


def trusted(folder: Path) -> Path:
    """The folder, if nobody else can put files there. Raises UblkError."""
    found = problem(folder)
    if found:
        raise UblkError(found, f"remove it, or run: chown {os.geteuid()} {folder}; chmod go-w {folder}")
    return folder


def problem(folder: Path) -> str:
    """Why we cannot keep files there without others' interfering; empty if we can."""
    try:
        found = folder.lstat()
    except OSError as e:
        return f"{folder}: {os.strerror(e.errno or 0)}"
    if not stat.S_ISDIR(found.st_mode):
        return f"{folder} is {'a link' if stat.S_ISLNK(found.st_mode) else 'not a folder'}"
    if found.st_uid != os.geteuid():
        return f"{folder} belongs to {user_name(found.st_uid)}, not to {user_name(os.geteuid())}"
    return f"others can write in {folder}" if found.st_mode & _OTHERS_WRITE else ""


def open_own(path: Path) -> int:
    """Open a file of ours to read it. UblkError for a link, and what another may have written; OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    found = os.fstat(fd)
    ours = found.st_uid == os.geteuid() and not found.st_mode & _OTHERS_WRITE
    if ours and stat.S_ISREG(found.st_mode):
        return fd
    os.close(fd)
    if ours:
        raise OSError(errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EINVAL, "not a file", str(path))
    raise UblkError(
        f"{path} may have been written by another: it belongs to {user_name(found.st_uid)}, with mode"
        f" {stat.S_IMODE(found.st_mode):o}",
        "remove it",
    )


def open_log(path: Path) -> int:
    """Open a file to append to. Raises OSError, and UblkError where others may have put something in its place."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    folder = path.parent.stat()
    if folder.st_uid in (0, os.geteuid()) and not folder.st_mode & _OTHERS_WRITE:
        return os.open(path, flags, 0o600)
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    found = os.fstat(fd)
    if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink == 1:
        return fd
    os.close(fd)
    raise UblkError(f"{path} is in a folder that others can write, and is not a file of {user_name(os.geteuid())}'s")


def listen(listener: socket.socket, path: Path) -> None:
    """Have a socket of ours, and of nobody else's, at this path. Raises UblkError and OSError."""
    make(path.parent)
    path.unlink(missing_ok=True)  # of a daemon that was killed
    os.fchmod(listener.fileno(), 0o600)  # what the path gets
    listener.bind(str(path))
    listener.listen()


def user_name(uid: int) -> str:
    """For messages."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def pwd_home() -> str:
    """The home folder that the system knows; HOME may be another's, after sudo."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        return os.environ.get("HOME", "/nonexistent")
