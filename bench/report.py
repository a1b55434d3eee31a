"""What was measured, and what follows from it.

With the instruction clock 10^9 / IOPS is the number of instructions that the whole machine spends on a request,
whichever of its CPUs does so: they take turns on one clock, and while none has work the clock does not count but jump.
So two busy CPUs do not make a figure better, and the formula is the same for any number of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .result import Result
from .subject import Family
from .subjects import FLOOR
from .workloads import Workload

VERSION = 1

CAVEAT = """\
Measured with an instruction clock: a guest instruction, on whichever CPU, takes 1 ns, so that 10^9 / IOPS is the work
of the whole machine for a request, and figures repeat. It shows neither parallelism (two CPUs share the clock) nor the
cost of caches and memory bandwidth, and the CPU has no fast string moves (erms, fsrm: each byte would count as an
instruction). What requests of 64k and more really cost must be measured natively as well."""


@dataclass(frozen=True)
class Report:
    """A run: `families` of all subjects, `bases` of those families that have one, `about` the circumstances."""

    results: Sequence[Result]
    workloads: Sequence[Workload]
    families: Mapping[str, Family]
    bases: Mapping[Family, str]
    about: Mapping[str, Any]

    def result(self, subject: str) -> Result | None:
        return next((result for result in self.results if result.subject == subject), None)

    def iops(self, subject: str, workload: str) -> float | None:
        result = self.result(subject)
        return result.points[workload].iops if result and workload in result.points else None

    def ratio(self, subject: str, workload: str) -> float | None:
        """IOPS, to those of the base of its family."""
        mine = self.iops(subject, workload)
        base = self.iops(self.bases[self.families[subject]], workload)
        return mine / base if mine and base else None

    def instructions(self, subject: str, workload: str) -> float | None:
        """What a request costs the whole machine."""
        iops = self.iops(subject, workload)
        return 1e9 / iops if iops else None

    def server_instructions(self, subject: str, workload: str) -> float | None:
        """What it costs more than with null_blk: the driver's work and the server's, without fio's and the block
        layer's."""
        mine = self.instructions(subject, workload)
        floor = self.instructions(FLOOR, workload)
        return mine - floor if mine and floor else None

    def failures(self) -> dict[str, str]:
        return {result.subject: result.error for result in self.results if result.error}


def document(report: Report) -> dict[str, Any]:
    """The report as JSON has it."""
    return {
        "version": VERSION,
        **report.about,
        "workloads": [vars(workload) for workload in report.workloads],
        "bases": dict(report.bases),
        "subjects": [_subject(report, result) for result in report.results],
    }


def _subject(report: Report, result: Result) -> dict[str, Any]:
    return {
        "name": result.subject,
        "family": report.families[result.subject],
        "memory": {
            "idle": vars(result.idle) if result.idle else None,
            "loaded": vars(result.loaded) if result.loaded else None,
        },
        "error": result.error,
        "points": {
            name: {
                **vars(point),
                "ratio": report.ratio(result.subject, name),
                "instructions": report.instructions(result.subject, name),
                "server_instructions": report.server_instructions(result.subject, name),
            }
            for name, point in result.points.items()
        },
    }
