"""What every target owes to those who use its disk, on real devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ublkpy.testing import Disk, TargetContract, open_device
from ublkpy.tgt.base import Target
from ublkpy.tgt.concat import ConcatTarget
from ublkpy.tgt.fault import FaultTarget
from ublkpy.tgt.loop import LoopTarget
from ublkpy.tgt.mirror import MirrorTarget
from ublkpy.tgt.ram import RamTarget
from ublkpy.tgt.stripe import StripeTarget

from . import disk as blocks
from . import targets
from .devices import MIB


def loop(scratch: Path) -> Target:
    return LoopTarget({"file": blocks.image(scratch / "image", 8 * MIB)})


def files(scratch: Path, size: int) -> tuple[Path, ...]:
    return tuple(blocks.image(scratch / f"image{n}", size) for n in range(3))


def fault(scratch: Path) -> Target:
    return FaultTarget({"file": blocks.image(scratch / "image", 8 * MIB)})


def late(scratch: Path) -> Target:
    return FaultTarget({"size": 8 * MIB, "delay": 10**5, "distribution": "exponential"})


def mirrors(scratch: Path) -> Target:
    first, second, third = files(scratch, 4 * MIB)
    fourth = blocks.image(scratch / "image3", 4 * MIB)
    return StripeTarget(
        {"files": (MirrorTarget({"files": (first, second)}), MirrorTarget({"files": (third, fourth)})), "chunk": 4096}
    )


TARGETS: dict[str, Callable[[Path], Target]] = {
    "loop": loop,
    "stripe": lambda scratch: StripeTarget({"files": files(scratch, 2 * MIB), "chunk": 4096}),
    "concat": lambda scratch: ConcatTarget({"files": files(scratch, 16384)}),
    "mirror": lambda scratch: MirrorTarget({"files": files(scratch, 8 * MIB)}),
    "striped mirrors": mirrors,
    "ram": lambda _scratch: RamTarget({"size": 8 * MIB}),
    "fault": fault,
    "late memory": late,
    "plain": lambda scratch: targets.Ram(),
    "async": lambda scratch: targets.AsyncRam(),
    "blocking": lambda scratch: targets.BlockingRam(),
    "read-only": lambda scratch: targets.ReadOnly(),
}


@pytest.mark.any_kernel
class TestContract(TargetContract):
    @pytest.fixture(params=TARGETS)
    def disk(self, request: pytest.FixtureRequest, scratch: Path) -> Iterator[Disk]:
        with open_device(TARGETS[request.param](scratch), queues=2) as disk:
            yield disk
