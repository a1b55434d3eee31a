"""The daemon's part of ``ublk resize``; life/resize.py draws how the two go together."""

from __future__ import annotations

from ublkpy.driver.disk import Disk
from ublkpy.errors import UblkError
from ublkpy.tgt.base import Target
from ublkpy.uring.map import Map

_DRAIN = 20.0


def follow(dev_id: int, target: Target, target_map: Map, size: int, *, done: bool) -> None:
    """What is to be done before (``done``: after) the device has got this size. Raises UblkError."""
    if type(target).resize is Target.resize:
        target.resize(size)  # says that it cannot
    if target.has_metadata:  # that of blocks to come would have to be made
        raise UblkError("a device with metadata keeps its size", "delete it, and add it anew")
    disk = Disk.read(dev_id)
    if done and (disk is None or disk.size != size):
        raise UblkError(f"device {dev_id} has another size by now: somebody else changed it", "ublk list shows it")
    before = target_map.size
    if size > before and not done:
        target.resize(size)
        target_map.resize(size)
    elif size < before and done:
        target_map.resize(size)
        try:
            target_map.drain(size, before - size, _DRAIN)
        except OSError as e:
            target_map.resize(before)  # so that it can be tried again
            raise UblkError(
                f"requests behind the new end of the device take longer than {_DRAIN:g} s: the backing was not cut",
                "try again when they are through",
            ) from e
        target.resize(size)
