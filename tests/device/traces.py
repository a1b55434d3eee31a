"""What a test must not leave behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from pathlib import Path

from ublkpy.driver import inspect, state
from ublkpy.driver.delete import delete
from ublkpy.errors import UblkError
from ublkpy.shmem import socket_path

_OURS = {Path(program).resolve() for program in (sys.executable, shutil.which("fio")) if program}


def present() -> set[str]:
    """Devices, their nodes and state files, and all processes."""
    devices = {f"device {dev_id}" for dev_id in inspect.device_ids()}
    nodes = {str(node) for node in Path("/dev").glob("ublk[bc]*")}
    files = {str(file) for folder in (state.RUN_DIR, socket_path(0).parent) for file in folder.glob("*")}
    return devices | nodes | files | {f"process {pid}" for pid in os.listdir("/proc") if pid.isdigit()}  # noqa: PTH208


def left_since(before: set[str]) -> set[str]:
    """What is there now and was not then; of the processes, only those that a test can have started."""
    new = present() - before
    return {what for what in new if not what.startswith("process ") or _is_ours(int(what.split()[1]))}


def _is_ours(pid: int) -> bool:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] == "Z":
            return int(fields[1]) == os.getpid()
        return Path(f"/proc/{pid}/exe").resolve() in _OURS
    except OSError:  # it has just ended
        return False


def describe(what: str) -> str:
    """For the report of a failure."""
    if not what.startswith("process "):
        return what
    pid = what.split()[1]
    with contextlib.suppress(OSError):
        return f"{what}: {Path(f'/proc/{pid}/cmdline').read_text().replace(chr(0), ' ')[:200]}"
    return what


def clear(left: set[str]) -> None:
    """So that the next test does not suffer from this one."""
    for what in left:
        kind, _, name = what.partition(" ")
        if kind == "process":
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(name), signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(int(name), 0)
    for what in left:
        kind, _, name = what.partition(" ")
        if kind == "device":
            with contextlib.suppress(UblkError):
                delete(int(name), force=True, timeout=20)
        elif what.startswith("/run/"):
            Path(what).unlink(missing_ok=True)
