"""Other ublk servers, whose program is given: an adapter for each kind, known by the program's name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .servers import DEPTH, SIZE_BYTES, Place, Served, Server, legs
from .servers.ublk import added
from .subject import Family, Subject

# kublk's data modes: the suffix, which is our name for the mode, and the options; with -b -u it hangs
_KUBLK_MODES = (
    ("", ()),
    ("-get-data", ("-g",)),
    ("-user-copy", ("-u",)),
    ("-zero-copy", ("-z",)),
    ("-auto-buf", ("--auto_zc",)),
    ("-batch+copy", ("-b",)),
    ("-batch+zero-copy", ("-b", "-z")),
    ("-batch+auto-buf", ("-b", "--auto_zc")),
)


def _kublk(program: Path) -> list[Subject]:
    """The kernel's own server, in tools/testing/selftests/ublk of its source."""
    families: tuple[tuple[str, Family], ...] = (("null", "null"), ("loop", "file"), ("stripe", "file"))
    return [
        Subject(f"kublk-{target}{suffix}", family, _kublk_server(program, target, options))
        for target, family in families
        for suffix, options in _KUBLK_MODES
    ]


def _kublk_server(program: Path, target: str, options: tuple[str, ...]) -> Server:
    @contextmanager
    def serve(place: Place) -> Iterator[Served]:
        add: list[str | Path] = [program, "add", "-t", target, "-q", str(place.queues), "-d", str(DEPTH), *options]
        with legs(place, SIZE_BYTES // 2) as files:
            add += {"loop": [place.file], "stripe": files}.get(target, [])
            with added(add, [program, "del", "-n"]) as served:
                yield served

    return serve


_ADAPTERS: dict[str, Callable[[Path], list[Subject]]] = {"kublk": _kublk}
KNOWN = tuple(_ADAPTERS)


def subjects(program: Path) -> list[Subject]:
    """What of `program` is measured; KeyError when there is no adapter for its name."""
    return _ADAPTERS[program.name](program)
