"""What measuring one subject gave, as a line of JSON on its way out of the machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Point:
    """One subject under one workload; `seconds` of the guest's clock."""

    requests: int
    seconds: float
    iops: float
    bytes_per_second: float


@dataclass(frozen=True)
class Memory:
    """Of a process: resident, and resident with shared pages counted in proportion."""

    rss_bytes: int
    pss_bytes: int


@dataclass(frozen=True)
class Result:
    """The points of a subject by their workload, and the server's memory before and after all load on one queue;
    with an `error`, as far as it came."""

    subject: str
    points: Mapping[str, Point] = field(default_factory=dict)
    idle: Memory | None = None
    loaded: Memory | None = None
    error: str | None = None

    def line(self) -> str:
        return json.dumps(asdict(self))


def from_line(line: str) -> Result:
    """The reverse of `Result.line`."""
    data: dict[str, Any] = json.loads(line)
    return Result(
        subject=data["subject"],
        points={name: Point(**point) for name, point in data["points"].items()},
        idle=Memory(**data["idle"]) if data["idle"] else None,
        loaded=Memory(**data["loaded"]) if data["loaded"] else None,
        error=data["error"],
    )
