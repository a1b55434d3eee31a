"""What can be said of the disk itself, whatever serves it: the options.

A target may look at them when it opens; ``limits.settle`` sees to the rest. So
they hold for every target, and a target need not know them.
"""

from __future__ import annotations

from ublkpy.tgt.options import SECTOR, Configurable, Size, option

_LARGEST = 1 << 28
"""Of block sizes and I/O sizes: the driver (Linux 7.2) takes shifts up to 28."""


class DiskOptions(Configurable):
    """Properties of the block device, sizes in bytes. What is not said is as the target has it."""

    @property
    def is_recoverable(self) -> bool:
        """Whether another daemon may go on with the device: then what is in memory has to outlive its own."""
        return False

    read_only: bool = option(False, "--ro", help="refuse writes; a target opens what is behind it read-only, too")
    write_cache: bool | None = option(
        None,
        off_flags=("--no-write-cache", "--no_write_cache"),
        help="whether writes are durable only after a flush; without a cache, each is before it is done",
    )
    rotational: bool | None = option(
        None, off_flags=("--no-rotational", "--no_rotational"), help="whether to say that the disk spins"
    )
    logical_block_size: Size | None = option(
        None, help="smallest unit of a request, 512 to 4096", minimum=SECTOR, maximum=4096, power_of_two=True
    )
    physical_block_size: Size | None = option(
        None, help="smallest unit that is written without reading", minimum=SECTOR, maximum=_LARGEST, power_of_two=True
    )
    io_min: Size | None = option(
        None, help="smallest request that is worth it", minimum=SECTOR, maximum=_LARGEST, power_of_two=True
    )
    io_opt: Size | None = option(
        None, help="size of requests that suits the disk best", minimum=SECTOR, maximum=_LARGEST, power_of_two=True
    )
    discard_granularity: Size | None = option(
        None, help="unit in which space is freed", minimum=SECTOR, maximum=_LARGEST, power_of_two=True
    )
    max_discard_bytes: Size | None = option(None, help="largest discard; 0: none", multiple=SECTOR)
    max_write_zeroes_bytes: Size | None = option(
        None, help="largest request for zeroes; 0: they are written", multiple=SECTOR
    )
