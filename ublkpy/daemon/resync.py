"""The daemon's part of ``ublk resync``: to begin it, and to tell how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ublkpy.daemon.channel import Orders
from ublkpy.tgt.base import Target


def orders(target: Target, note: Callable[[], None]) -> Orders:
    """What can be ordered of a target. Before it is told how far that is, ``note`` writes down what has come of it."""

    def begin(force: bool) -> dict[str, Any]:
        target.resync(force=force)
        return {}

    def tell() -> dict[str, Any]:
        found = target.progress()
        note()
        return asdict(found) if found else {}

    return {"resync": begin, "progress": tell}
