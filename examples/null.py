"""A disk that forgets: a map answers all requests, and Python sees none of them.

    ublk add examples/null.py --size 1T

What ``ublk add -t null`` does, as the smallest target with a map of its own.
"""

from ublkpy import Geometry, Map, Null, Routing, Size, Target, main, option


class NullDisk(Target):
    """Says yes to everything and moves no data."""

    moves_data = False
    size: Size = option("250G", "-s", help="size of the disk", minimum=512, multiple=512)

    def open(self) -> Geometry:
        # With a map, methods do not say what the disk can do: this does.
        return Geometry(self.size, discard_granularity=4096, max_discard_bytes=1 << 30, max_write_zeroes_bytes=1 << 30)

    def map(self, target_map: Map) -> None:
        target_map.fill(Routing.all(Null()))


if __name__ == "__main__":
    main(NullDisk)
