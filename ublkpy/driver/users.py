"""Who uses a block device: mounts, swap, other block devices."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ublkpy.errors import BusyError
from ublkpy.system import mounts

BLOCK = Path("/sys/block")


def check_unused(dev_id: int) -> None:
    """BusyError that names the user, if the device or one of its partitions is in use."""
    sysfs = BLOCK / f"ublkb{dev_id}"
    if not sysfs.exists():
        return
    parts = [sysfs]
    with _while_it_goes():
        parts += sorted(p.parent for p in sysfs.glob("*/partition"))
    # Exclusive last: a mounted partition claims the whole disk, too, and is the better answer.
    for find in (_mount_point, _swap, _holder, _exclusive):
        for part in parts:
            use = None
            with _while_it_goes():
                use = find(part)
            if use:
                what, cure = use
                raise BusyError(
                    f"/dev/{part.name} is {what}", f"{cure}, or use --force: what is not yet written may be lost"
                )


@contextlib.contextmanager
def _while_it_goes() -> Iterator[None]:
    """A device that is just going away has no users any more."""
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOENT, errno.ENODEV):
            raise


def openers(dev_id: int, *, server: bool = True) -> list[str]:
    """The processes that have a node of the device open: its ``server``, and users of the disk and its partitions.

    Also one whose node is removed already.
    """
    char = f"c{dev_id}|" if server else ""
    node = re.compile(rf"/dev/ublk({char}b{dev_id}(p\d+)?)( \(deleted\))?")
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        # Processes end while we look.
        with contextlib.suppress(OSError):
            if any(node.fullmatch(str(fd.readlink())) for fd in (process / "fd").iterdir()):
                found.append(f"process {process.name} ({(process / 'comm').read_text().strip()})")
    return found


def _mount_point(part: Path) -> tuple[str, str] | None:
    devno = (part / "dev").read_text().strip()
    # Of the whole machine too: a daemon has a mount namespace of its own.
    for mount in (*mounts.read("self"), *mounts.read("1")):
        # btrfs has device numbers of its own, so look at the source as well.
        if mount.devno == devno or mount.source == f"/dev/{part.name}":
            return f"mounted on {mount.point}", f"unmount it first: umount {mount.point}"
    return None


def _swap(part: Path) -> tuple[str, str] | None:
    node = f"/dev/{part.name}"
    lines = Path("/proc/swaps").read_text().splitlines()[1:]
    if any(line.split()[0] == node for line in lines):
        return "used as swap", f"take it out first: swapoff {node}"
    return None


def _holder(part: Path) -> tuple[str, str] | None:
    names = sorted(p.name for p in (part / "holders").iterdir())
    if names:
        return f"part of {', '.join(names)}", f"take {names[0]} down first"
    return None


def _exclusive(part: Path) -> tuple[str, str] | None:
    """Whatever else claims the device as a whole, another ublk device over it for example."""
    node = f"/dev/{part.name}"
    try:
        os.close(os.open(node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as e:
        if e.errno == errno.EBUSY:
            return "held by another block device or program", f"see what uses it with: fuser -v {node}"
    return None
