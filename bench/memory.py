"""How much memory a process holds."""

from __future__ import annotations

import re
from pathlib import Path

from .result import Memory

_PROC = Path("/proc")


def of(pid: int) -> Memory:
    """That of process `pid`, now."""
    return parse((_PROC / str(pid) / "smaps_rollup").read_text())


def parse(text: str) -> Memory:
    """The sums in a /proc/PID/smaps_rollup."""
    kibibytes = {name: int(number) for name, number in re.findall(r"^(Rss|Pss): +(\d+) kB$", text, flags=re.MULTILINE)}
    return Memory(rss_bytes=kibibytes["Rss"] * 1024, pss_bytes=kibibytes["Pss"] * 1024)
