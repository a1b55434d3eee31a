"""How each subject is started and stopped: a server is a function from a `Place` to a block for as long as it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

SIZE_BYTES = 128 << 20
"""Of every device, and of the file behind it."""
DEPTH = 64
"""Of every hardware queue that can be told."""
DISKS = Path(__file__).parents[1] / "disks"
"""Where the disks are that are written in Python, but for the project's examples."""


@dataclass(frozen=True)
class Place:
    """Where a server works: an empty `folder` on a tmpfs, a `file` full of data there, the kernel's `modules`."""

    folder: Path
    file: Path
    modules: Path
    queues: int


@contextmanager
def legs(place: Place, size: int) -> Iterator[list[Path]]:
    """Two files of so many bytes, for servers that put several together."""
    files = [place.folder / f"leg{n}" for n in range(2)]
    try:
        for file in files:
            with file.open("wb") as made:
                made.truncate(size)
        yield files
    finally:
        for file in files:
            file.unlink(missing_ok=True)


@dataclass(frozen=True)
class Served:
    """A device that is being served, by process `pid` unless by the kernel itself."""

    node: Path
    pid: int | None = None


Server = Callable[[Place], AbstractContextManager[Served]]
