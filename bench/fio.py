"""fio: the load, and what it says of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .result import Point
from .workloads import Workload

_RAMP_MILLISECONDS = 50
_FILL_BYTES = 512 << 10


class FioError(Exception):
    """fio failed, or said what cannot be understood."""


def command(workload: Workload, node: Path, milliseconds: int, cpus: Sequence[int] = ()) -> list[str]:
    """The command line that puts `workload` on `node` for so long (of the machine's clock), after a short ramp.

    With `cpus`, each job stays on one of them.
    """
    pinned = [f"--cpus_allowed={','.join(map(str, cpus))}", "--cpus_allowed_policy=split"] if cpus else []
    return [
        "fio",
        f"--name={workload.name}",
        f"--filename={node}",
        "--ioengine=io_uring",
        "--direct=1",
        f"--rw={workload.rw}",
        f"--bs={workload.block_bytes}",
        f"--iodepth={workload.depth}",
        f"--numjobs={workload.queues}",
        *pinned,
        "--time_based",
        f"--runtime={milliseconds}ms",
        f"--ramp_time={_RAMP_MILLISECONDS}ms",
        "--thread",
        "--group_reporting",
        "--output-format=json",
    ]


def fill_command(node: Path, size_bytes: int, depth: int) -> list[str]:
    """The command line that writes `node` once, in large requests, `depth` at a time."""
    return [
        "fio",
        "--name=fill",
        f"--filename={node}",
        "--ioengine=io_uring",
        "--direct=1",
        "--rw=write",
        f"--bs={_FILL_BYTES}",
        f"--size={size_bytes}",
        f"--iodepth={depth}",
    ]


def parse(text: str) -> Point:
    """The figures in fio's JSON, which warnings may precede; raises FioError."""
    try:
        report: dict[str, Any] = json.loads(text[text.index("\n{") + 1 :] if not text.startswith("{") else text)
        (job,) = report["jobs"]
        if job["error"]:
            raise FioError(f"fio: error {job['error']} on the device")
        way = max((job["read"], job["write"]), key=lambda part: part["total_ios"])
        point = Point(
            requests=way["total_ios"],
            seconds=way["runtime"] / 1000,
            iops=way["iops"],
            bytes_per_second=way["bw_bytes"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise FioError(f"fio's report cannot be understood ({type(error).__name__}: {error}): {text[:200]!r}") from None
    if point.iops <= 0:
        raise FioError("fio: no request was completed")
    return point
