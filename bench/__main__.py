"""The command line."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.vm import kernels
from tests.vm.errors import SetupError
from tests.vm.machine import INSTRUCTION_CLOCK

from . import peers
from . import subjects as table
from .guest import Order
from .machine import CPUS, ROOT, Outcome, measured
from .report import Report, document
from .servers import DEPTH, SIZE_BYTES
from .subject import Subject
from .subjects import ChoiceError
from .table import render
from .workloads import ALL

_FAILED = 1
_USAGE = 2
_PROGRAMS = {
    "fio": ["fio", "--version"],
    "nbdkit": ["nbdkit", "--version"],
    "python": [sys.executable, "-VV"],
    "qemu-nbd": ["qemu-nbd", "--version"],
}


def main() -> int:
    given = _parser().parse_args()
    peer = given.peer.resolve() if given.peer else None
    try:
        known = table.known(peer)
        chosen = table.choose_subjects(given.subjects.split(), known)
        workloads = table.choose_workloads(given.workloads.split())
        bases = table.choose_bases(given.base.split(), chosen)
        _check_paths(peer, [path for path in (given.json, given.plot) if path])
        order = Order([s.name for s in chosen], [w.name for w in workloads], peer, given.milliseconds)
        outcome = measured(order, given.kernel)
    except (ChoiceError, SetupError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return _USAGE
    families = {subject.name: subject.family for subject in chosen}
    report = Report(outcome.results, workloads, families, bases, _about(given, outcome))
    _publish(report, given, chosen)
    return _status(report, outcome, chosen)


def _check_paths(peer: Path | None, outputs: list[Path]) -> None:
    """Better now than after a quarter of an hour."""
    if peer and not os.access(peer, os.X_OK):
        raise ChoiceError(f"{peer} is not a program")
    for path in outputs:
        if not os.access(path.parent, os.W_OK):
            raise ChoiceError(f"{path} cannot be written")


def _publish(report: Report, given: argparse.Namespace, chosen: list[Subject]) -> None:
    if not report.results:
        return
    print(render(report))
    if given.json:
        given.json.write_text(json.dumps(document(report), indent=1) + "\n")
    if given.plot:
        from .plot import draw  # slow to load

        draw(report, given.plot, {subject.name for subject in chosen if subject.ours})


def _status(report: Report, outcome: Outcome, chosen: list[Subject]) -> int:
    complete = {result.subject for result in report.results if not result.error}
    missing = [subject.name for subject in chosen if subject.ours and subject.name not in complete]
    if missing:
        print(f"bench: failed: {', '.join(missing)}", file=sys.stderr)
    return outcome.status or (_FAILED if missing else 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure how much work a request costs, in ublkpy and in what else serves block devices.",
        epilog=f"Subjects: {', '.join(subject.name for subject in table.known(None))}. "
        f"Workloads: {', '.join(workload.name for workload in ALL)}. Several are one argument, with spaces between; "
        f"they may be patterns (null*). Exit status: {_FAILED} ublkpy failed, {_USAGE} wrong usage or no machine.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--kernel", metavar="SERIES", choices=kernels.SERIES, default="7.3", help="the machine's kernel (7.3)")
    add("--subjects", metavar="NAMES", default="", help="what to measure (all)")
    add("--workloads", metavar="NAMES", default="", help="with which requests (all)")
    add("--peer", metavar="PROGRAM", type=Path, help=f"measure this server too: {', '.join(peers.KNOWN)}")
    add("--base", metavar="NAMES", default="", help="ratios are to these (kublk, or else what the kernel has)")
    add("--milliseconds", metavar="N", type=int, default=300, help="guest time for each figure (300)")
    add("--json", metavar="FILE", type=Path, help="write everything there as JSON")
    add("--plot", metavar="FILE", type=Path, help="draw a picture, a PNG")
    return parser


def _about(given: argparse.Namespace, outcome: Outcome) -> dict[str, Any]:
    """The circumstances of a run, as JSON has them."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _said(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]),
        "kernel": outcome.kernel,
        "machine": INSTRUCTION_CLOCK.options,
        "cpus": CPUS,
        "programs": {name: _said(argv) for name, argv in _PROGRAMS.items()},
        "options": {"milliseconds": given.milliseconds, "depth": DEPTH, "size_bytes": SIZE_BYTES},
    }


def _said(argv: list[str]) -> str | None:
    """The first line that a program prints; None where there is no such program."""
    try:
        lines = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines[0] if lines else None


if __name__ == "__main__":
    sys.exit(main())
