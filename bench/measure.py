"""One subject under all workloads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from . import fio, memory
from .cpus import of_jobs
from .fio import FioError
from .result import Memory, Point, Result
from .servers import DEPTH, SIZE_BYTES, Place, Served
from .servers.run import ServerError, run
from .subject import Subject
from .workloads import Workload

_PIECE_BYTES = 1 << 20
_CHANCE = 0.005


def measure(
    subject: Subject, workloads: Sequence[Workload], place: Place, milliseconds: int, say: Callable[[str], None]
) -> Result:
    """What `subject` gives under `workloads`, each for so many `milliseconds`; its failure is part of the result."""
    points: dict[str, Point] = {}
    idle: Memory | None = None
    loaded: Memory | None = None
    error: str | None = None
    try:
        for queues, group in groupby(sorted(workloads, key=_queues), _queues):
            _fill(place.file)
            with subject.serve(replace(place, queues=queues)) as served:
                idle = idle or _memory(served)
                _warm_up(served)
                for workload in group:
                    points[workload.name] = _point(workload, served, milliseconds)
                    say(f"{workload.name} {points[workload.name].iops:,.0f} IOPS")
                loaded = loaded or _memory(served)
    except (ServerError, FioError, OSError) as failure:
        error = _told(failure)
        say(f"failed: {error}")
    finally:
        place.file.unlink(missing_ok=True)
    return Result(subject.name, points, idle, loaded, error)


def _memory(served: Served) -> Memory | None:
    return None if served.pid is None else memory.of(served.pid)


def _told(failure: BaseException) -> str:
    """What went wrong, and what did before it: taking down what has failed often fails as well."""
    before = None if failure.__suppress_context__ else failure.__context__
    return f"{_told(before)}; then: {failure}" if before else str(failure)


def _queues(workload: Workload) -> int:
    return workload.queues


def _fill(path: Path) -> None:
    """Write the file anew: every page of it exists."""
    piece = bytes(_PIECE_BYTES)
    with path.open("wb") as file:
        for _ in range(SIZE_BYTES // _PIECE_BYTES):
            file.write(piece)


def _warm_up(served: Served) -> None:
    """Write the whole device once, so that no server meets a block, or a buffer of its own, for the first time."""
    run(*fio.fill_command(served.node, SIZE_BYTES, DEPTH))


def _point(workload: Workload, served: Served, milliseconds: int) -> Point:
    """The median of three counts, or of two that agree: one in twenty is off by some percent."""
    cpus = of_jobs(served, workload.queues) if workload.queues > 1 else ()
    argv = fio.command(workload, served.node, milliseconds, cpus)
    try:
        points = [fio.parse(run(*argv)) for _ in range(2)]
        if not _agree(*points):
            points.append(fio.parse(run(*argv)))
    except FioError as error:
        raise FioError(f"{workload.name}: {error}") from None
    return sorted(points, key=lambda point: point.iops)[len(points) // 2]


def _agree(one: Point, other: Point) -> bool:
    return abs(one.iops - other.iops) <= _CHANCE * one.iops
