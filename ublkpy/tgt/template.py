"""A disk of your own: ublk add ./THIS_FILE.py

What it can do follows from the methods that it defines; take away what yours cannot do. All offsets and lengths are
in bytes, and multiples of the disk's block size. docs/write-a-target.md explains each step.
"""

from ublkpy import Geometry, Size, Target, main, option


class MyDisk(Target):
    """A disk in memory."""  # what `ublk help` shows

    # Options: --size on the command line, size: in YAML, checked, and attributes here. More kinds of them: str, int,
    # bool, pathlib.Path, Literal["a", "b"]; `| None` for those that may be left out.
    size: Size = option("64M", "-s", help="size of the disk", minimum=4096, multiple=4096)

    def open(self) -> Geometry:
        """Open files, look what is there. Runs in the foreground: what you raise here reaches the user."""
        self.data = memoryview(bytearray(self.size))
        return Geometry(self.size, logical_block=4096)

    def start(self) -> None:
        """Begin threads and connections, which a fork would not survive. Runs in the daemon."""

    def read(self, offset: int, buf: memoryview) -> None:
        """Fill buf. OSError(errno) is the answer if it does not work; other exceptions are EIO, and logged.

        buf is good until the return. With `async def`, many requests are on their way at once.
        """
        buf[:] = self.data[offset : offset + len(buf)]

    def write(self, offset: int, buf: memoryview) -> None:
        """Keep what is in buf."""
        self.data[offset : offset + len(buf)] = buf

    def flush(self) -> None:
        """Make durable what was written. Without this method, each write is taken to be durable when it returns."""

    def discard(self, offset: int, length: int) -> None:
        """Nobody needs these bytes any more."""

    def write_zeroes(self, offset: int, length: int) -> None:
        """Write zeroes. Without this method, they come as writes."""
        self.data[offset : offset + length] = bytes(length)

    def stop(self) -> None:
        """End what start() began, after the last request."""

    def close(self) -> None:
        """Close what open() opened; runs in the foreground and in the daemon."""


if __name__ == "__main__":
    main(MyDisk)  # python3 THIS_FILE.py --size 1G
