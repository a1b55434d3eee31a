"""examples/ram.py with ``async def``: what an asyncio loop adds to a request."""

from __future__ import annotations

from ublkpy import Geometry, Size, Target, option


class AsyncRam(Target):
    """A disk in memory."""

    size: Size = option("64M", "-s", help="size of the disk", minimum=512, multiple=512)

    def open(self) -> Geometry:
        self.data = memoryview(bytearray(self.size))
        return Geometry(self.size)

    async def read(self, offset: int, buf: memoryview) -> None:
        buf[:] = self.data[offset : offset + len(buf)]

    async def write(self, offset: int, buf: memoryview) -> None:
        self.data[offset : offset + len(buf)] = buf
