"""The kernel's table of mounts (proc(5), mountinfo)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, order=True)
class Mount:
    """One mount: where it is, "major:minor" of its file system, and what it was mounted from."""

    point: Path
    devno: str
    source: str


def read(process: str = "self") -> list[Mount]:
    """The mounts that a process sees; empty when they may not be read."""
    try:
        lines = Path(f"/proc/{process}/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    return [_parse(line) for line in lines]


def _parse(line: str) -> Mount:
    head, _, tail = line.partition(" - ")
    fields = head.split()
    return Mount(Path(_unescape(fields[4])), fields[2], _unescape(tail.split()[1]))


def _unescape(text: str) -> str:
    """Blanks and the like are written as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), text)
