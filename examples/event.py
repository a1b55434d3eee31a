"""A RAM disk whose requests another thread answers, some time after they came.

    ublk add examples/event.py --delay 20

``upcall`` only keeps the requests, and the thread of the queue goes on to the next ones.
"""

import time
from collections.abc import Sequence
from queue import SimpleQueue
from threading import Thread

from ublkpy import Geometry, Map, Op, Request, Routing, Size, Target, Upcall, main, option


class EventDisk(Target):
    """A disk in memory that takes its time."""

    size: Size = option("64M", "-s", help="size of the disk", minimum=512, multiple=512)
    delay: int = option(10, help="milliseconds until a request is answered", minimum=0, maximum=10_000)

    def open(self) -> Geometry:
        self.data = memoryview(bytearray(self.size))
        return Geometry(self.size)

    def start(self) -> None:
        self.waiting: SimpleQueue[tuple[float, Request] | None] = SimpleQueue()
        self.worker = Thread(target=self.work)
        self.worker.start()

    def map(self, target_map: Map) -> None:
        target_map.fill(Routing.all(Upcall()), Upcall())

    def upcall(self, requests: Sequence[Request]) -> None:
        due = time.monotonic() + self.delay / 1000
        for request in requests:
            self.waiting.put((due, request))

    def work(self) -> None:
        while found := self.waiting.get():
            due, request = found
            time.sleep(max(0.0, due - time.monotonic()))
            if request.op is Op.READ:
                request.buffer[:] = self.data[request.offset : request.offset + request.length]
            elif request.op is Op.WRITE:
                self.data[request.offset : request.offset + request.length] = request.buffer
            request.done()

    def stop(self) -> None:
        self.waiting.put(None)
        self.worker.join()


if __name__ == "__main__":
    main(EventDisk)
