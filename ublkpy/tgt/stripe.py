"""stripe: chunks in turns over several files, block devices or targets (RAID 0), natively."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ublkpy.errors import UblkError
from ublkpy.tgt.base import Geometry
from ublkpy.tgt.legs import FILES_HELP, JoinedTarget, Leg, geometry
from ublkpy.tgt.nested import Source
from ublkpy.tgt.options import Size, exact_size, option
from ublkpy.uring.map import Map, Routing

_MOST_CHUNKS = 4096
"""Of targets, each is an operation of its own, and no request is to take for ever."""


class StripeTarget(JoinedTarget):
    """Chunks in turns over several files, block devices or targets: RAID 0."""

    name = "stripe"
    files: tuple[Source, ...] = option(..., "-f", "--file", help=FILES_HELP, minimum=2, maximum=255)
    chunk: Size = option(
        "64k",
        "--chunk_size",
        help="bytes in one file before it is the next one's turn",
        minimum=4096,
        maximum=1 << 20,
        power_of_two=True,
    )

    @property
    def unit(self) -> int:
        return self.chunk

    def join(self, legs: Sequence[Leg]) -> Geometry:
        size = max(leg.size for leg in legs)
        for leg in legs:
            if leg.size != size:
                raise UblkError(
                    f"{leg.name} has room for {exact_size(leg.size)} in whole chunks, and another one for"
                    f" {exact_size(size)}: those of a stripe are of one size",
                    leg.how_to_fit(size),
                )
        if not size:
            raise UblkError(f"the files are smaller than a chunk, {exact_size(self.chunk)}", "lower it with --chunk")
        found = geometry(legs, size * len(legs))
        if self._legs.nested:
            most = _MOST_CHUNKS * self.chunk
            found = replace(
                found,
                max_discard_bytes=min(found.max_discard_bytes, most),
                max_write_zeroes_bytes=min(found.max_write_zeroes_bytes, most),
            )
        # As far as a power of two can say it.
        width = self.chunk * (len(legs) & -len(legs))
        return replace(found, io_min=max(found.io_min, self.chunk), io_opt=max(found.io_opt, width))

    def map(self, target_map: Map) -> None:
        legs = self._legs.add_to(target_map)
        target_map.fill(Routing.all(legs.in_turns(self.chunk)), legs.sync())

    def status(self) -> dict[str, object]:
        return {**super().status(), "chunk": self.chunk}
