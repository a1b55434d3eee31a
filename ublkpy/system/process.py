"""Makes a process fit to serve a disk that the machine itself may depend on."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from ublkpy.system import mounts, privilege
from ublkpy.uring import libc

log = logging.getLogger(__name__)


def close_inherited_files() -> None:
    """Close what the caller's shell or service manager left open: a lock or a pipe must not wait for a daemon.

    Those are the files without close-on-exec; all that Python opens has it.
    """
    for fd in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        with contextlib.suppress(OSError):
            if fd > 2 and not fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC:
                os.close(fd)


def close_files(spared: int) -> None:
    """Close all but the standard streams and one other: what the caller closes, a lock or a socket, shall be closed."""
    for fd in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if fd > 2 and fd != spared:
            with contextlib.suppress(OSError):
                os.close(fd)


def redirect_streams(stderr: int | None = None) -> None:
    """Point stdin and stdout at nothing, and stderr at a file or at nothing, too."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for source, target in ((null, 0), (null, 1), (null if stderr is None else stderr, 2)):
        os.dup2(source, target)
    os.close(null)


_AT_ONCE = 16 << 20
"""Mappings up to this size are brought into memory before they are used: code, and what Python works with."""


def harden() -> None:
    """Survive memory pressure, as far as privileges allow.

    Call it before the first thread: the threads inherit all of it.
    """
    _attempt("locking memory", _lock_memory)
    _attempt("PR_SET_IO_FLUSHER", libc.set_io_flusher)
    _attempt("oom_score_adj", lambda: Path("/proc/self/oom_score_adj").write_text("-1000"))


def flush_io() -> None:
    """Have this thread, and those that it starts, not wait for I/O to get memory: it may be what answers that I/O."""
    with contextlib.suppress(OSError):
        libc.set_io_flusher()


def leave_mounts(kept: Iterable[Path] = ()) -> None:
    """Survive mounts of the own device, but see those paths. Call it before the first thread."""
    _attempt("own mount namespace", lambda: _leave_mounts(kept))


def _attempt(what: str, action: Callable[[], object]) -> None:
    try:
        action()
    except OSError as e:
        log.info("%s: not available: %s", what, e)


def _lock_memory() -> None:
    """Not as far as a limit allows: then what is mapped later, a queue's buffers for one, could not be had at all."""
    limit = privilege.memory_limit()
    if limit is not None:
        raise OSError(f"the limit is {limit >> 10} KiB (ulimit -l)")
    libc.lock_memory()
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, access, *_ = line.split()
        start, end = (int(address, 16) for address in addresses.split("-"))
        if "x" in access or end - start <= _AT_ONCE:
            with contextlib.suppress(OSError):  # those of the kernel, and those that nothing may touch
                libc.lock_range(start, end - start)


def _leave_mounts(kept: Iterable[Path]) -> None:
    """Enter a mount namespace without the disks of others.

    A daemon that is the last holder of a namespace in which its own device is mounted unmounts it while it
    dies, and waits for itself. The namespace is therefore private; and because it must not keep file systems
    alive that are unmounted elsewhere later, those on block devices are detached, but for the ones that Python and
    the files of the target live on, which it may open later. Files that are open already are not affected.
    """
    libc.unshare_mounts()
    os.chdir("/")
    places: list[str | Path] = ["/proc", "/sys", "/dev", "/run", "/var/log", sys.prefix, *sys.path, *kept]
    needed = [Path(p).resolve() for p in places if p]
    for mount in sorted(mounts.read(), reverse=True):
        if mount.source.startswith("/dev/") and not any(path.is_relative_to(mount.point) for path in needed):
            with contextlib.suppress(OSError):
                libc.detach_mount(str(mount.point))
