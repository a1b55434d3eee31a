"""concat: several files, block devices or targets one after the other, natively."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from ublkpy.errors import UblkError
from ublkpy.tgt.base import Geometry
from ublkpy.tgt.legs import JoinedTarget, Leg, geometry
from ublkpy.uring.map import Extent, Map, Routing


class ConcatTarget(JoinedTarget):
    """Several files, block devices or targets, one after the other."""

    name = "concat"

    def join(self, legs: Sequence[Leg]) -> Geometry:
        found = geometry(legs, sum(leg.size for leg in legs))
        block = self.block_size(found.logical_block)
        for leg in legs:
            if leg.size % block:  # no block may lie in two of them
                raise UblkError(
                    f"size {leg.size} of {leg.name} is not a multiple of the block size {block}",
                    leg.how_to_fit(-(-leg.size // block) * block),
                )
        return found

    def map(self, target_map: Map) -> None:
        legs, sizes = self._legs.add_to(target_map), [leg.size for leg in self._legs]
        target_map.replace(
            [
                Extent(start, length, Routing.all(action))
                for action, start, length in zip(legs.each(), accumulate(sizes, initial=0), sizes, strict=False)
            ],
            legs.sync(),
        )
