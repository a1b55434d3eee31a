"""concat: several files or block devices one after the other, natively."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

from ublkpy.errors import UblkError
from ublkpy.tgt.base import Geometry, Target
from ublkpy.tgt.legs import Legs
from ublkpy.tgt.options import option
from ublkpy.uring.map import Extent, File, Map, Routing, Sync


class ConcatTarget(Target):
    """Several files or block devices, one after the other."""

    name = "concat"
    files: tuple[Path, ...] = option(
        ..., "-f", "--file", help="backing files or block devices, in their order; repeatable", minimum=1
    )
    direct: bool | None = option(
        None,
        help="O_DIRECT or an error; default: O_DIRECT where a file allows it",
        off_flags=("--buffered_io", "--buffered-io"),
    )

    def open(self) -> Geometry:
        self._legs = Legs(self.files, self.disk, direct=self.direct)
        try:
            found = self._legs.geometry(sum(leg.size for leg in self._legs))
            self._check_blocks(self.block_size(found.logical_block))
            return found
        except BaseException:
            self.close()
            raise

    def map(self, target_map: Map) -> None:
        files, sizes = self._legs.add_to(target_map), [leg.size for leg in self._legs]
        starts = accumulate(sizes, initial=0)
        target_map.replace(
            [
                Extent(start, length, Routing.all(File(file)))
                for file, start, length in zip(files, starts, sizes, strict=False)
            ],
            Sync(files),
        )

    def close(self) -> None:
        self._legs.close()

    def backing(self) -> str:
        return self._legs.backing()

    def status(self) -> dict[str, object]:
        return self._legs.status()

    def _check_blocks(self, block: int) -> None:
        """No block may lie in two files."""
        for leg in self._legs:
            if leg.size % block:
                raise UblkError(
                    f"size {leg.size} of {leg.path} is not a multiple of the block size {block}",
                    "take a partition that is"
                    if leg.backing.is_block_device
                    else f"grow the file with: truncate -s {-(-leg.size // block) * block} {leg.path}",
                )
