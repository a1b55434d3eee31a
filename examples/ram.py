"""A RAM disk, as short as a disk can be.

    ublk add examples/ram.py --size 1G

Its content goes with its daemon.
"""

from ublkpy import Geometry, Size, Target, main, option


class Ram(Target):
    """A disk in memory."""

    size: Size = option("64M", "-s", help="size of the disk", minimum=512, multiple=512)

    def open(self) -> Geometry:
        self.data = memoryview(bytearray(self.size))
        return Geometry(self.size)

    def read(self, offset: int, buf: memoryview) -> None:
        buf[:] = self.data[offset : offset + len(buf)]

    def write(self, offset: int, buf: memoryview) -> None:
        self.data[offset : offset + len(buf)] = buf


if __name__ == "__main__":
    main(Ram)
