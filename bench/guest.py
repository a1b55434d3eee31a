"""What runs inside the machine: subject after subject; the results go line by line to a file, talk to stdout."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from . import subjects as table
from .measure import measure
from .servers import Place

_SCRATCH = Path("/mnt")


@dataclass(frozen=True)
class Order:
    """What to measure, as it is handed over on the command line; `milliseconds` for each point."""

    subjects: Sequence[str]
    workloads: Sequence[str]
    peer: Path | None
    milliseconds: int

    def words(self, results: Path) -> list[str]:
        """The arguments of `main`."""
        peer = [f"--peer={self.peer}"] if self.peer else []
        return [
            f"--results={results}",
            f"--milliseconds={self.milliseconds}",
            *peer,
            "--subjects",
            *self.subjects,
            "--workloads",
            *self.workloads,
        ]


def parse(words: Sequence[str]) -> tuple[Order, Path]:
    """The reverse of `Order.words`."""
    parser = argparse.ArgumentParser(prog="python -m bench.guest", description=__doc__)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--milliseconds", type=int, required=True)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--subjects", nargs="+", required=True)
    parser.add_argument("--workloads", nargs="+", required=True)
    given = parser.parse_args(words)
    return Order(given.subjects, given.workloads, given.peer, given.milliseconds), given.results


def main() -> None:
    order, results = parse(sys.argv[1:])
    chosen = table.choose_subjects(order.subjects, table.known(order.peer))
    workloads = table.choose_workloads(order.workloads)
    modules = Path(os.environ["UBLKPY_MODULES"])
    with tempfile.TemporaryDirectory(dir=_SCRATCH) as folder, results.open("a") as out:
        place = Place(Path(folder), Path(folder, "disk.img"), modules, queues=1)
        for number, subject in enumerate(chosen, start=1):
            say = partial(print, f"[{number}/{len(chosen)}] {subject.name}:", flush=True)
            result = measure(subject, workloads, place, order.milliseconds, say)
            out.write(result.line() + "\n")
            # what is measured stays, whatever becomes of the machine
            out.flush()
            os.fsync(out.fileno())


if __name__ == "__main__":
    main()
