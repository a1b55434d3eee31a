"""The ublk command."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ublkpy import cli
from ublkpy.errors import ExitCode
from ublkpy.system.spawn import wait_end

from .devices import until


@dataclass(frozen=True)
class Result:
    """How a command ended, and what it printed."""

    status: int
    out: str
    err: str


class Running:
    """A command in a forked child: as the program is, without the seconds that Python takes to start."""

    def __init__(self, *args: str, prepare: Callable[[], object] = lambda: None) -> None:
        self._out, self._err = os.memfd_create("stdout"), os.memfd_create("stderr")
        self._status: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(list(args), self._out, self._err, prepare)

    @property
    def out(self) -> str:
        return os.pread(self._out, 1 << 20, 0).decode()

    @property
    def err(self) -> str:
        return os.pread(self._err, 1 << 20, 0).decode()

    def signal(self, number: signal.Signals) -> None:
        if self._status is None:
            os.kill(self.pid, number)

    def daemon(self) -> int:
        """The daemon that it starts, as soon as that appears: a child of init that runs this program, too."""
        cmdline = Path("/proc/self/cmdline").read_bytes()
        found: list[int] = []

        def is_daemon(pid: int) -> bool:
            try:
                parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
                return parent == "1" and Path(f"/proc/{pid}/cmdline").read_bytes() == cmdline
            except OSError:  # it has ended
                return False

        def look() -> list[int]:
            pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208
            found.extend(pid for pid in pids if pid > self.pid and is_daemon(pid))
            return found

        until(look, "the daemon appears")
        return found[0]

    def result(self, seconds: float = 60.0) -> Result:
        """Wait for its end."""
        if self._status is None:
            assert wait_end(self.pid, seconds), f"the command still runs after {seconds:g} s; it said: {self.err}"
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return Result(self._status, self.out, self.err)

    def close(self) -> None:
        self.signal(signal.SIGKILL)
        self.result()
        os.close(self._out)
        os.close(self._err)


@contextmanager
def running(*args: str, prepare: Callable[[], object] = lambda: None) -> Iterator[Running]:
    """A command in the background, killed at the end of the block if it still runs.

    ``prepare`` runs first, in the command's process.
    """
    command = Running(*args, prepare=prepare)
    try:
        yield command
    finally:
        command.close()


@contextmanager
def foreground(*args: str) -> Iterator[Running]:
    """``ublk add --foreground`` from the moment at which it has printed its node."""
    with running("add", "--foreground", *args) as command:
        until(lambda: command.out or not os.path.exists(f"/proc/{command.pid}/exe"), "the node is printed")  # noqa: PTH110
        yield command


def ublk(*args: str, prepare: Callable[[], object] = lambda: None) -> Result:
    """Run a command to its end."""
    with running(*args, prepare=prepare) as command:
        return command.result()


def program(*args: str) -> Result:
    """The same with the installed program: slow, and the real thing."""
    done = subprocess.run([executable(), *args], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    return Result(done.returncode, done.stdout, done.stderr)


def executable() -> str:
    return str(Path(sys.executable).with_name("ublk"))


def _become(args: list[str], out: int, err: int, prepare: Callable[[], object]) -> NoReturn:
    status = 1
    try:
        for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
            os.dup2(source, target)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        sys.__stderr__ = sys.stderr  # type: ignore[misc]
        logging.root.handlers.clear()
        sys.argv = ["ublk", *args]
        prepare()
        cli.main()
    except SystemExit as e:
        status = int(e.code or 0)
    except KeyboardInterrupt as e:
        if any(frame.name == "main" for frame in traceback.extract_tb(e.__traceback__)):
            traceback.print_exc()  # which should have taken it
            os._exit(1)
        print("ublk: interrupted", file=sys.stderr)
        status = ExitCode.INTERRUPTED
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
