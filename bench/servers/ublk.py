"""Servers of the ublk driver: what they have in common is the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from . import Served
from .run import ServerError, run, until

_BLOCK = Path("/sys/block")


@contextmanager
def added(add: Sequence[str | Path], delete: Sequence[str | Path]) -> Iterator[Served]:
    """The device that `add` adds; `delete`, with its id appended, deletes it."""
    before = _ids()
    run(*add)
    until(lambda: bool(_ids() - before), "a device to appear")
    (dev_id,) = _ids() - before
    try:
        until(Path(f"/dev/ublkb{dev_id}").exists, f"/dev/ublkb{dev_id}")
        yield Served(Path(f"/dev/ublkb{dev_id}"), holder(Path(f"/dev/ublkc{dev_id}")))
    finally:
        run(*delete, str(dev_id))
        until(lambda: dev_id not in _ids(), f"/dev/ublkb{dev_id} to go")


def holder(path: Path) -> int:
    """The process that has `path` open: the driver admits one."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if link.readlink() == path:
                return int(link.parts[2])
    raise ServerError(f"nobody serves {path}")


def _ids() -> set[int]:
    return {int(path.name.removeprefix("ublkb")) for path in _BLOCK.glob("ublkb*")}
