"""What the kernel serves by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import DEPTH, Place, Served
from .run import module, run

_MAX_SECTORS = 1024


@contextmanager
def null_blk(place: Place) -> Iterator[Served]:
    """Completes every request, in the block layer's softirq as most drivers do.

    Its own limit, 255 sectors, would split requests of 128k.
    """
    options = (f"submit_queues={place.queues}", f"hw_queue_depth={DEPTH}", "gb=1", f"max_sectors={_MAX_SECTORS}")
    with module(place, "configfs"), module(place, "null_blk", "nr_devices=1", *options):
        yield Served(Path("/dev/nullb0"))


@contextmanager
def loop(place: Place) -> Iterator[Served]:
    """Direct I/O on the file. There is one hardware queue, always."""
    with module(place, "loop", "max_loop=0"):
        node = Path(run("losetup", "--find", "--show", "--direct-io=on", place.file).strip())
        try:
            yield Served(node)
        finally:
            run("losetup", "--detach", node)
