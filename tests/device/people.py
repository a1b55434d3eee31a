"""Ordinary users of the guest, and udev, which gives them their devices."""

from __future__ import annotations

import ctypes
import grp
import os
import pwd
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from ublkpy.driver import udev
from ublkpy.driver.ctrl import CONTROL

from . import program
from .devices import until
from .kernel import run

_UDEVD = Path("/usr/lib/systemd/systemd-udevd")
_PR_SET_DUMPABLE = 4


@dataclass(frozen=True)
class User:
    """Somebody who is logged in."""

    name: str

    @property
    def uid(self) -> int:
        return pwd.getpwnam(self.name).pw_uid

    @property
    def gid(self) -> int:
        return pwd.getpwnam(self.name).pw_gid

    @property
    def run_dir(self) -> Path:
        return Path(f"/run/user/{self.uid}/ublkpy")

    @property
    def log(self) -> Path:
        return Path(f"/home/{self.name}/.local/state/ublkpy/ublkpy.log")

    @property
    def folder(self) -> Path:
        """In memory, so that its files take O_DIRECT."""
        return Path("/dev/shm") / self.name

    def become(self) -> None:
        """For a process of its own."""
        os.environ.pop("XDG_RUNTIME_DIR", None)
        os.environ.pop("XDG_STATE_HOME", None)
        os.setgroups(os.getgrouplist(self.name, self.gid))
        os.setresgid(self.gid, self.gid, self.gid)
        os.setresuid(self.uid, self.uid, self.uid)
        # As after an execve(): else our own files in /proc are root's.
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)

    def ublk(self, *args: str, prepare: Callable[[], object] = lambda: None) -> program.Result:
        """Run a command to its end; ``prepare`` runs first, still as root."""

        def begin() -> None:
            prepare()
            self.become()

        return program.ublk(*args, prepare=begin)

    def does(self, action: Callable[[], object]) -> str:
        """Call it in a process of this user; the name of the exception that it raised, empty if none."""
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            raised = ""
            try:
                self.become()
                action()
            except BaseException as e:
                traceback.print_exc()
                raised = type(e).__name__
            os.write(write_end, raised.encode())
            os._exit(0)
        os.close(write_end)
        with os.fdopen(read_end) as pipe:
            raised = pipe.read()
        os.waitpid(pid, 0)
        return raised


@contextmanager
def logged_in(*names: str) -> Iterator[None]:
    """Users with a home, a folder for run-time files and one in memory; they can run this program."""
    if not os.environ.get("UBLKPY_KERNEL"):
        pytest.skip("makes users and changes udev's rules: only in the machine of tests.vm")
    for path in (sys.executable, os.path.realpath(sys.executable), __file__):
        for folder in Path(path).parents:
            folder.chmod(folder.stat().st_mode | 0o055)
    for name in names:
        run("useradd", "--create-home", name)
        user = User(name)
        for folder in (user.run_dir.parent, user.folder):
            folder.mkdir(0o700, parents=True)
            os.chown(folder, user.uid, user.gid)
    try:
        yield
    finally:
        for name in names:
            shutil.rmtree(User(name).folder)


def join_group(name: str) -> None:
    run("usermod", "--append", "--groups", udev.GROUP, name)
    assert name in grp.getgrnam(udev.GROUP).gr_mem


@contextmanager
def udevd() -> Iterator[None]:
    """systemd-udevd, with the rules of ``ublk udev install``."""
    if not _UDEVD.exists():
        pytest.skip("systemd-udevd is not installed: scripts/setup vm")
    run(_UDEVD, "--daemon")
    until(Path("/run/udev/control").exists, "udev runs")
    # As in an installation whose path has a blank.
    place = Path("/run/an installation")
    place.symlink_to(sys.prefix)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(place / "bin/python"))
        done = program.ublk("udev", "install")
    assert done.status == 0, done.err
    try:
        yield
    finally:
        removed = program.ublk("udev", "remove")
        subprocess.run(["udevadm", "control", "--exit"], timeout=50)
        place.unlink()
        assert removed.status == 0, removed.err
        assert (CONTROL.stat().st_gid, CONTROL.stat().st_mode & 0o777) == (0, 0o600)
