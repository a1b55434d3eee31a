"""Makes a process fit to serve a disk that the machine itself may depend on."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from ublkpy.uring import libc

log = logging.getLogger(__name__)


def harden() -> None:
    """Survive memory pressure and mounts of the own device, as far as privileges allow.

    Call it before the first thread: the threads inherit all of it.
    """
    _attempt("own mount namespace", _leave_mounts)
    _attempt("locking memory", libc.lock_memory)
    _attempt("PR_SET_IO_FLUSHER", libc.set_io_flusher)
    _attempt("oom_score_adj", lambda: Path("/proc/self/oom_score_adj").write_text("-1000"))


def _attempt(what: str, action: Callable[[], object]) -> None:
    try:
        action()
    except OSError as e:
        log.info("%s: not available: %s", what, e)


def _leave_mounts() -> None:
    """Enter a mount namespace without the disks of others.

    A daemon that is the last holder of a namespace in which its own device is mounted unmounts it while it
    dies, and waits for itself. The namespace is therefore private; and because it must not keep file systems
    alive that are unmounted elsewhere later, those on block devices are detached, but for the ones that Python
    lives on. Files that are open already, the backing among them, are not affected.
    """
    libc.unshare_mounts()
    os.chdir("/")
    needed = [Path(p).resolve() for p in ("/proc", "/sys", "/dev", "/run", "/var/log", sys.prefix, *sys.path) if p]
    mounts = [
        (Path(_unescape(fields[4])), source)
        for fields, source in (_parse(line) for line in Path("/proc/self/mountinfo").read_text().splitlines())
    ]
    for point, source in sorted(mounts, reverse=True):
        if source.startswith("/dev/") and not any(path.is_relative_to(point) for path in needed):
            with contextlib.suppress(OSError):
                libc.detach_mount(str(point))


def _parse(line: str) -> tuple[list[str], str]:
    """A line of mountinfo (proc(5)): its leading fields and the source behind the separator."""
    head, _, tail = line.partition(" - ")
    return head.split(), tail.split()[1]


def _unescape(path: str) -> str:
    """Mountinfo writes blanks and the like as three octal digits."""
    return path.encode().decode("unicode_escape") if "\\" in path else path
