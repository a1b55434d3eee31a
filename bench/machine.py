"""The machine that everything is measured in."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.vm import kernels
from tests.vm.machine import INSTRUCTION_CLOCK
from tests.vm.output import Lane
from tests.vm.run import Job, on_one

from .guest import Order
from .result import Result, from_line

ROOT = Path(__file__).parents[1]
CPUS = 4
"""Two for the jobs of a load, two for the threads that serve them."""
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
_SECONDS = 120
_SECONDS_PER_POINT = 40  # some ten times of what a slow machine needs


@dataclass(frozen=True)
class Outcome:
    """All results up to the end of the machine, its exit status, and the release of its kernel."""

    results: Sequence[Result]
    status: int
    kernel: str


def measured(order: Order, series: str) -> Outcome:
    """Boot Linux `series` and carry out `order` there; progress on stderr. Raises SetupError."""
    with TemporaryDirectory(prefix="ublkpy-bench.") as folder:
        results = Path(folder, "results")
        status, release = asyncio.run(_run(order, series, results))
        lines = results.read_text().splitlines() if results.exists() else []
        return Outcome([from_line(line) for line in lines], status, release)


async def _run(order: Order, series: str, results: Path) -> tuple[int, str]:
    (kernel,) = await kernels.provide([series])
    command = shlex.join([sys.executable, "-m", "bench.guest", *order.words(results)])
    seconds = _SECONDS + _SECONDS_PER_POINT * len(order.subjects) * len(order.workloads)
    job = Job(command, folder=ROOT, seconds=seconds, environment=_ENVIRONMENT, out=results.parent, cpus=CPUS)
    lane = Lane(to_stderr=True)
    lane.go_live()
    return await on_one(job, kernel, INSTRUCTION_CLOCK, lane), kernel.release
