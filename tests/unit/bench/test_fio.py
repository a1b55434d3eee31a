"""fio's command line, and its report."""

import json
from pathlib import Path

import pytest

from bench import fio
from bench.workloads import ALL, Workload

_IDLE = {"total_ios": 0, "runtime": 0, "iops": 0.0, "bw_bytes": 0}
_BUSY = {"total_ios": 1000, "runtime": 250, "iops": 4000.0, "bw_bytes": 16384000}


def report(error: int = 0, **ways: dict[str, float]) -> str:
    return json.dumps({"fio version": "fio-3.33", "jobs": [{"error": error, "read": _IDLE, "write": _IDLE, **ways}]})


@pytest.mark.parametrize("workload", ALL, ids=lambda workload: workload.name)
def test_command_line(workload: Workload) -> None:
    argv = fio.command(workload, Path("/dev/x"), 300)
    assert argv[0] == "fio"
    assert {"--filename=/dev/x", "--direct=1", "--ioengine=io_uring", "--runtime=300ms"} <= set(argv)
    assert f"--numjobs={workload.queues}" in argv


@pytest.mark.parametrize("way", ["read", "write"])
def test_the_way_that_was_busy_counts(way: str) -> None:
    point = fio.parse(report(0, **{way: _BUSY}))
    assert (point.requests, point.seconds, point.iops, point.bytes_per_second) == (1000, 0.25, 4000.0, 16384000)


def test_words_before_the_report() -> None:
    assert fio.parse("fio: a {warning}\n" + report(read=_BUSY)).requests == 1000


@pytest.mark.parametrize("text", ["", "nothing", "{}", '{"jobs": []}', report()[:-9]])
def test_no_report(text: str) -> None:
    with pytest.raises(fio.FioError, match="cannot be understood"):
        fio.parse(text)


def test_errors_of_the_device() -> None:
    with pytest.raises(fio.FioError, match="error 5"):
        fio.parse(report(error=5, read=_BUSY))


def test_no_requests() -> None:
    with pytest.raises(fio.FioError, match="no request"):
        fio.parse(report())
