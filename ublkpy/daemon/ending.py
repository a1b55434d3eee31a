"""The process that deletes a device (end.py), as the one sees it that serves the device, and serves on meanwhile."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

from ublkpy.daemon import end
from ublkpy.errors import UblkError
from ublkpy.system import log, spawn

DEADLINE = 120.0
"""Seconds that it may need, in which it has deadlines of its own."""


class Ending:
    """Starts it. OSError if that cannot be.

    It writes to our log; or, to ``report``, has no log: what it says is logged here, and its error raised by ``wait``.
    """

    def __init__(self, dev_id: int, cookie: int, *, force: bool, report: bool = False) -> None:
        argv = [sys.executable, "-P", "-m", end.__name__, end.REPORT if report else log.style()]
        argv += [str(dev_id), str(cookie)] + (["--force"] if force else [])
        # A program may have found us where a new interpreter would not look.
        path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} if report else {}
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if report else subprocess.DEVNULL,
            env=os.environ | path,
            start_new_session=True,
        )
        self._pid_fd = -1

    def fileno(self) -> int:
        """Readable when it has ended."""
        if self._pid_fd < 0:
            self._pid_fd = os.pidfd_open(self._process.pid)
        return self._pid_fd

    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        status = self._process.poll()
        if status is not None:
            self._close()
        return status

    def wait(self, timeout: float) -> None:
        """Until it has ended. Raises TimeoutError, and UblkError for what it reported."""
        try:
            if out := self._process.stdout:
                with out:
                    spawn.Word(out.fileno()).wait(timeout)
            self._process.wait(timeout)
        except UblkError:
            with contextlib.suppress(subprocess.TimeoutExpired):  # what it says is known all the same
                self._process.wait(timeout)
            raise
        except subprocess.TimeoutExpired as e:
            raise TimeoutError from e
        except EOFError as e:
            raise UblkError("the process that deletes the device died before it was done", "try again") from e
        finally:
            self._close()

    def _close(self) -> None:
        if self._pid_fd >= 0:
            os.close(self._pid_fd)
            self._pid_fd = -1
