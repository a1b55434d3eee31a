"""A read-only disk from a web server: ublk add examples/http_disk.py --url http://server/disk.img

It is asked for many parts at a time, of which the last are kept. Needs the package httpx.
"""

import asyncio
import threading

import httpx

from ublkpy import Geometry, Size, Target, UblkError, main, option


class HttpDisk(Target):
    """A read-only disk from a web server."""

    url: str = option(..., help="http:// or https:// address of the image")
    block: Size = option("64k", help="bytes that are asked for at once", minimum=4096, power_of_two=True)
    cached: int = option(256, help="so many blocks are kept, for each queue", minimum=1)
    local = threading.local()  # each queue has a thread, and an event loop in it

    def open(self) -> Geometry:
        try:
            size = asyncio.run(self.measure())
        except (httpx.HTTPError, httpx.InvalidURL, OSError, LookupError, ValueError) as e:
            raise UblkError(f"cannot read {self.url}: {e}", "it takes a server that answers range requests") from e
        return Geometry(size - size % 512)

    async def measure(self) -> int:
        async with httpx.AsyncClient(follow_redirects=True) as client:
            return (await self.fetch(client, 0, 1))[1]

    async def start(self) -> None:
        self.local.blocks, self.local.client = {}, httpx.AsyncClient(follow_redirects=True, timeout=30)

    async def read(self, offset: int, buf: memoryview) -> None:
        first, end = offset // self.block, -(-(offset + len(buf)) // self.block)
        data = b"".join(await asyncio.gather(*map(self.get, range(first, end))))
        buf[:] = data[offset % self.block :][: len(buf)]

    async def get(self, n: int) -> bytes:
        blocks, client = self.local.blocks, self.local.client
        task = blocks.pop(n, None)
        if task is None or (task.done() and task.exception()):
            task = asyncio.create_task(self.fetch(client, n * self.block, self.block))
        blocks[n] = task  # also while it is on its way; the one that was not used for longest makes room
        if len(blocks) > self.cached:
            del blocks[next(iter(blocks))]
        return bytes((await task)[0])

    async def fetch(self, client: httpx.AsyncClient, offset: int, length: int) -> tuple[bytes, int]:
        async with client.stream("GET", self.url, headers={"Range": f"bytes={offset}-{offset + length - 1}"}) as answer:
            if answer.status_code != httpx.codes.PARTIAL_CONTENT:  # but perhaps all of it
                raise OSError(f"the server says {answer.status_code}")
            return await answer.aread(), int(answer.headers["content-range"].split("/")[1])


if __name__ == "__main__":
    main(HttpDisk)
