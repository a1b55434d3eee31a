"""ublkpy itself, through its command."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import DEPTH, DISKS, SIZE_BYTES, Place, Served, Server, legs
from .ublk import added

_UBLK = Path(sys.executable).with_name("ublk")
_ROOT = Path(__file__).parents[2]
_EXTENTS = _ROOT / "scripts" / "extents.py"


def null(*options: str) -> Server:
    """The null target; `options` are those of `ublk add` besides."""
    return _server("null", "--size", str(SIZE_BYTES), *options)


def loop(*options: str) -> Server:
    """The loop target on the place's file."""
    return _server("loop", *options, file=True)


def over_two(target: str, size: int) -> Server:
    """A target over two files of so many bytes each."""

    @contextmanager
    def serve(place: Place) -> Iterator[Served]:
        with legs(place, size) as files:
            flags = [flag for file in files for flag in ("-f", str(file))]
            with _server(target, *flags)(place) as served:
                yield served

    return serve


def memory() -> Server:
    """The ram target."""
    return _server("ram", "--size", str(SIZE_BYTES))


def ram(*options: str) -> Server:
    """The example of a RAM disk in Python."""
    return _server(str(_ROOT / "examples" / "ram.py"), "--size", str(SIZE_BYTES), *options)


def ram_async(*options: str) -> Server:
    """The same with `async def`."""
    return _server(str(DISKS / "ram_async.py"), "--size", str(SIZE_BYTES), *options)


def ram_plugin(*options: str) -> Server:
    """The same as a plugin for nbdkit."""
    return _server("nbdkit-python", "--script", str(DISKS / "ram_plugin.py"), f"size={SIZE_BYTES}", *options)


def extents(number: int) -> Server:
    """A device whose map has so many extents, over a file of its own."""

    @contextmanager
    def serve(place: Place) -> Iterator[Served]:
        file = place.folder / "extents"
        add: list[str | Path] = [sys.executable, _EXTENTS, file, str(number), str(place.queues), str(DEPTH)]
        try:
            with added(add, [_UBLK, "del", "-n"]) as served:
                yield served
        finally:
            file.unlink(missing_ok=True)

    return serve


def _server(target: str, *options: str, file: bool = False) -> Server:
    @contextmanager
    def serve(place: Place) -> Iterator[Served]:
        add: list[str | Path] = [_UBLK, "add", "-t", target, "-q", str(place.queues), "-d", str(DEPTH), *options]
        if file:
            add += ["-f", place.file]
        with added(add, [_UBLK, "del", "-n"]) as served:
            yield served

    return serve
