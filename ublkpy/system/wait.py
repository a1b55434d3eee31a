"""Waiting for files, whatever their numbers: select(2) knows none above 1023."""

from __future__ import annotations

import select
from collections.abc import Iterable


def readable(files: Iterable[int], timeout: float | None) -> set[int]:
    """Those that can be read, or have ended, within ``timeout`` seconds."""
    waiting = select.poll()
    for file in files:
        waiting.register(file, select.POLLIN)
    return {file for file, _ in waiting.poll(None if timeout is None else max(timeout, 0) * 1000)}
