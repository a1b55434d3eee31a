"""A report as text, for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .report import CAVEAT, Report
from .result import Memory
from .subject import Family

_NONE = "-"
_TITLES: dict[Family, str] = {"null": "Nothing or memory behind the device", "file": "A file on tmpfs behind it"}

Cell = Callable[[str, str], str]


def render(report: Report) -> str:
    """Tables for each family, failures, and what the figures mean."""
    parts = [part for family in _TITLES for part in _family(report, family)]
    if failures := report.failures():
        parts.append("Failed:\n" + "\n".join(f"  {name}: {error}" for name, error in failures.items()))
    return "\n\n".join([*parts, CAVEAT])


def _family(report: Report, family: Family) -> list[str]:
    names = [result.subject for result in report.results if report.families[result.subject] == family]
    if not names:
        return []
    base = report.bases[family]
    return [
        f"{_TITLES[family]}: IOPS, and their ratio to {base}'s\n\n" + _table(report, names, _iops(report)),
        "Instructions per request of driver and server (null_blk's subtracted), and the server's RSS in MiB\n\n"
        + _table(report, names, _instructions(report), _memory(report)),
    ]


def _table(
    report: Report, names: Sequence[str], cell: Cell, more: tuple[list[str], Callable[[str], list[str]]] | None = None
) -> str:
    extra, extra_cells = more or ([], lambda name: [])
    workloads = [workload.name for workload in report.workloads]
    rows = [[name, *(cell(name, workload) for workload in workloads), *extra_cells(name)] for name in names]
    return aligned([["", *workloads, *extra], *rows])


def _iops(report: Report) -> Cell:
    def cell(subject: str, workload: str) -> str:
        iops, ratio = report.iops(subject, workload), report.ratio(subject, workload)
        if iops is None:
            return _NONE
        return f"{iops / 1000:.1f}k {_NONE if ratio is None else f'{ratio:.2f}':>4}"

    return cell


def _instructions(report: Report) -> Cell:
    def cell(subject: str, workload: str) -> str:
        instructions = report.server_instructions(subject, workload)
        return _NONE if instructions is None else f"{instructions:.0f}"

    return cell


def _memory(report: Report) -> tuple[list[str], Callable[[str], list[str]]]:
    def cells(subject: str) -> list[str]:
        result = report.result(subject)
        return [_mebibytes(memory) for memory in ((result.idle, result.loaded) if result else ())]

    return ["idle", "loaded"], cells


def _mebibytes(memory: Memory | None) -> str:
    return _NONE if memory is None else f"{memory.rss_bytes / (1 << 20):.1f}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of as many cells each: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
