"""stripe: chunks in turns over several files or block devices (RAID 0), natively."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ublkpy.errors import UblkError
from ublkpy.tgt.base import Geometry, Target
from ublkpy.tgt.legs import Legs
from ublkpy.tgt.options import Size, exact_size, option
from ublkpy.uring.map import Map, Routing, Stripe, Sync


class StripeTarget(Target):
    """Chunks in turns over several files or block devices: RAID 0."""

    name = "stripe"
    files: tuple[Path, ...] = option(
        ..., "-f", "--file", help="backing files or block devices, in their order; repeatable", minimum=2
    )
    chunk: Size = option(
        "64k",
        "--chunk_size",
        help="bytes in one file before it is the next one's turn",
        minimum=4096,
        maximum=1 << 20,
        power_of_two=True,
    )
    direct: bool | None = option(
        None,
        help="O_DIRECT or an error; default: O_DIRECT where a file allows it",
        off_flags=("--buffered_io", "--buffered-io"),
    )

    def open(self) -> Geometry:
        self._legs = Legs(self.files, self.disk, direct=self.direct, unit=self.chunk)
        try:
            return self._measure()
        except BaseException:
            self.close()
            raise

    def map(self, target_map: Map) -> None:
        files = self._legs.add_to(target_map)
        target_map.fill(Routing.all(Stripe(files, self.chunk)), Sync(files))

    def close(self) -> None:
        self._legs.close()

    def backing(self) -> str:
        return self._legs.backing()

    def status(self) -> dict[str, object]:
        return {**self._legs.status(), "chunk": self.chunk}

    def _measure(self) -> Geometry:
        size = min(leg.size for leg in self._legs)
        for leg in self._legs:
            if leg.size != size:
                raise UblkError(
                    f"{leg.path} has room for {exact_size(leg.size)} in whole chunks, and another file for"
                    f" {exact_size(size)}: those of a stripe are of one size",
                    f"truncate -s {size} {leg.path}, or take a partition of that size",
                )
        if not size:
            raise UblkError(f"the files are smaller than a chunk, {exact_size(self.chunk)}", "lower it with --chunk")
        count = len(self.files)
        found = self._legs.geometry(size * count)
        # As far as a power of two can say it.
        width = self.chunk * (count & -count)
        return replace(found, io_min=max(found.io_min, self.chunk), io_opt=max(found.io_opt, width))
