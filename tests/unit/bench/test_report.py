"""Ratios, instructions, and how they are shown."""

import json
from pathlib import Path

import pytest

from bench import report as module
from bench.report import Report
from bench.result import Memory, Point, Result
from bench.table import aligned, render
from bench.workloads import ALL


def result(name: str, iops: float, **more: object) -> Result:
    return Result(name, {"randread": Point(1000, 0.25, iops, iops * 4096)}, **more)  # type: ignore[arg-type]


@pytest.fixture
def report() -> Report:
    return Report(
        results=[
            result("null_blk", 100_000.0),
            result("null", 80_000.0, idle=Memory(4096, 4096), loaded=Memory(36 << 20, 20 << 20)),
            result("loop", 50_000.0),
            Result("kernel-loop", error="losetup: no"),
        ],
        workloads=ALL[:2],
        families={"null_blk": "null", "null": "null", "loop": "file", "kernel-loop": "file"},
        bases={"null": "null_blk", "file": "kernel-loop"},
        about={"kernel": "7.3.1", "commit": "abc"},
    )


def test_ratio(report: Report) -> None:
    assert report.ratio("null", "randread") == 0.8
    assert report.ratio("null_blk", "randread") == 1
    assert report.ratio("loop", "randread") is None  # the base failed
    assert report.ratio("null", "randwrite") is None  # not measured


def test_instructions(report: Report) -> None:
    assert report.instructions("null_blk", "randread") == 10_000
    assert report.server_instructions("null", "randread") == 2_500
    assert report.server_instructions("null_blk", "randread") == 0
    assert report.server_instructions("null", "randwrite") is None


def test_document(report: Report) -> None:
    said = json.loads(json.dumps(module.document(report)))
    assert said["version"] == 1
    assert said["kernel"] == "7.3.1"
    assert said["workloads"][0] == {
        "name": "randread",
        "rw": "randread",
        "block_bytes": 4096,
        "depth": 32,
        "queues": 1,
    }
    null = next(subject for subject in said["subjects"] if subject["name"] == "null")
    assert null["memory"]["loaded"] == {"rss_bytes": 36 << 20, "pss_bytes": 20 << 20}
    assert null["points"]["randread"] == {
        "requests": 1000,
        "seconds": 0.25,
        "iops": 80_000.0,
        "bytes_per_second": 80_000.0 * 4096,
        "ratio": 0.8,
        "instructions": 12_500.0,
        "server_instructions": 2_500.0,
    }
    assert said["subjects"][-1]["error"] == "losetup: no"


def test_text(report: Report) -> None:
    lines = render(report).splitlines()
    assert "null       80.0k 0.80          -" in lines
    assert "null          2500          -   0.0    36.0" in lines
    assert "loop         50.0k    -          -" in lines
    assert "  kernel-loop: losetup: no" in lines
    assert "instruction clock" in render(report)


def test_columns() -> None:
    assert aligned([["", "long title"], ["name", "1"], ["n", "22"]]) == (
        "      long title\nname           1\nn             22"
    )


def test_picture(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="of the bench group")
    from bench.plot import draw

    draw(report, tmp_path / "picture.png", {"null"})
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
