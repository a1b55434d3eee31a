"""With which requests subjects are measured."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Workload:
    """One kind of load; a device with so many `queues` gets as many fio jobs, each with `depth` requests in flight."""

    name: str
    rw: str
    """What fio calls it."""
    block_bytes: int
    depth: int
    queues: int = 1


ALL = (
    Workload("randread", "randread", 4 * KIB, 32),
    Workload("randwrite", "randwrite", 4 * KIB, 32),
    Workload("randread-qd1", "randread", 4 * KIB, 1),
    Workload("randwrite-qd1", "randwrite", 4 * KIB, 1),
    Workload("read-128k", "read", 128 * KIB, 8),
    Workload("write-128k", "write", 128 * KIB, 8),
    Workload("randread-2q", "randread", 4 * KIB, 32, queues=2),
)
