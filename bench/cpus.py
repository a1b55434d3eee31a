"""On which CPUs the jobs of a load run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path

from .servers import Served

_BLOCK = Path("/sys/block")
_PROC = Path("/proc")


def of_jobs(served: Served, jobs: int) -> list[int]:
    """One for each of the `jobs`: in the device's hardware queues by turns, away from the server's threads.

    A job that shares its CPU with the thread that serves it is interrupted by that for one request, or for ten, as the
    scheduler will have it, and no two runs are alike.
    """
    taken = _bound(served.pid) if served.pid else set()
    chosen: list[int] = []
    for cpus in islice(cycle(_queues(served.node)), jobs):
        chosen.append(_first(cpus, taken | set(chosen)))
    return chosen


def _first(cpus: Sequence[int], taken: set[int]) -> int:
    return next((cpu for cpu in cpus if cpu not in taken), cpus[0])


def _queues(node: Path) -> list[list[int]]:
    """The CPUs of each hardware queue of a device."""
    lists = sorted((_BLOCK / node.name / "mq").glob("*/cpu_list"), key=lambda path: int(path.parent.name))
    return [parse(path.read_text()) for path in lists]


def _bound(pid: int) -> set[int]:
    """The CPUs that a thread of the process runs on and on no other."""
    bound: set[int] = set()
    for task in (_PROC / str(pid) / "task").iterdir():
        with suppress(ProcessLookupError):
            cpus = os.sched_getaffinity(int(task.name))
            bound |= cpus if len(cpus) == 1 else set()
    return bound


def parse(text: str) -> list[int]:
    """A list of CPUs as mq/*/cpu_list has it: `0, 2`."""
    return [int(number) for number in text.split(",")]
