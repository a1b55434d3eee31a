"""The command line, as far as it goes without a machine."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import _status
from bench.machine import Outcome
from bench.report import Report
from bench.result import Result
from bench.subjects import choose_subjects, known

ROOT = Path(__file__).parents[3]
FINE, FAILED = Result("null"), Result("null", error="no")


@pytest.mark.parametrize(
    ("results", "machine", "status"),
    [
        ([Result("null_blk"), FINE], 0, 0),
        ([Result("null_blk", error="no"), FINE], 0, 0),  # of others
        ([Result("null_blk"), FAILED], 0, 1),
        ([Result("null_blk")], 0, 1),  # never came so far
        ([Result("null_blk"), FINE], 3, 3),  # the kernel complained
    ],
)
def test_exit_status(results: list[Result], machine: int, status: int) -> None:
    report = Report(results, [], {}, {}, {})
    assert _status(report, Outcome(results, machine, "7.3"), choose_subjects(["null"], known(None))) == status


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--subjects", "floppy"), "no subject floppy"),
        (("--peer", "/nonexistent/kublk"), "is not a program"),
        (("--subjects", "null", "--base", "loop"), "the base loop"),
        (("--json", "/nonexistent/x.json"), "cannot be written"),
    ],
)
def test_wrong_usage(words: tuple[str, ...], said: str) -> None:
    done = subprocess.run([sys.executable, "-m", "bench", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
