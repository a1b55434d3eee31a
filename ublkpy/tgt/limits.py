"""What the disk looks like in the end: as the target has it, changed by what was said.

The rules are those of the driver (ublk_drv.c, ublk_validate_params) and of the
block layer, which would silently mend some of it (block/blk-settings.c,
blk_validate_limits).
"""

from __future__ import annotations

from dataclasses import replace

from ublkpy.errors import ConfigError, UblkError
from ublkpy.tgt.base import MAX_DISCARD_BYTES, Geometry
from ublkpy.tgt.disk import DiskOptions
from ublkpy.tgt.options import SECTOR, exact_size

_ANY_SIZE = 1 << 40


def check(said: DiskOptions, size: int | None) -> None:
    """ConfigError for what no target could make true; ``size`` is the disk's, if that was said."""
    _settle(
        said,
        Geometry(
            size if size and said.logical_block_size else _ANY_SIZE,
            physical_block=SECTOR,
            io_min=SECTOR,
            io_opt=SECTOR,
            write_cache=said.write_cache is not False,
            discard_granularity=SECTOR,
            max_discard_bytes=MAX_DISCARD_BYTES,
            max_write_zeroes_bytes=MAX_DISCARD_BYTES,
        ),
    )


def settle(said: DiskOptions, found: Geometry) -> Geometry:
    """The disk of a target that found ``found`` when it opened. UblkError where that cannot do what was said."""
    try:
        return _settle(said, found)
    except ConfigError as e:  # the words are good, and another backing may do it
        raise UblkError(e.message, e.hint) from e


def _settle(said: DiskOptions, found: Geometry) -> Geometry:
    disk = _with_access(said, _with_sizes(said, found))
    return _with_discard(said, disk)


def _with_sizes(said: DiskOptions, found: Geometry) -> Geometry:
    """Each size is said, or the target's, or what the ones before it ask for."""
    logical = said.logical_block_size or found.logical_block
    if logical < found.logical_block:
        raise ConfigError(
            f"logical_block_size {logical} is less than the {found.logical_block} bytes of the blocks behind it",
            f"leave it out, or say {found.logical_block} or more",
        )
    if found.size % logical:
        raise ConfigError(
            f"the size {exact_size(found.size)} is not a multiple of logical_block_size {logical}",
            f"{found.size - found.size % logical}B and {found.size - found.size % logical + logical}B are",
            ["logical_block_size", "size"],
        )
    sizes, least, whose = [logical], logical, "logical_block_size"
    for name, own in (
        ("physical_block_size", found.physical_block),
        ("io_min", found.io_min),
        ("io_opt", found.io_opt),
    ):
        wanted: int | None = getattr(said, name)
        if wanted is not None and wanted < least:
            raise ConfigError(
                f"{name} {wanted} is less than {whose} {least}",
                "none may be less than the one before it: logical_block_size, physical_block_size, io_min, io_opt;"
                " what is not said is as the target has it",
                [name, whose],
            )
        size = own if wanted is None else wanted
        if size > least:
            least, whose = size, name
        sizes.append(least)
    _, physical, io_min, io_opt = sizes
    return replace(found, logical_block=logical, physical_block=physical, io_min=io_min, io_opt=io_opt)


def _with_access(said: DiskOptions, disk: Geometry) -> Geometry:
    if said.read_only:
        disk = replace(disk, read_only=True, write_cache=False, discard_granularity=0)
    if said.rotational is not None:
        disk = replace(disk, rotational=said.rotational)
    if said.write_cache and not disk.write_cache:
        raise ConfigError(
            "write_cache: nothing is written to this disk that could wait for a flush",
            "leave it out",
            ["write_cache", "read_only"],
        )
    if said.write_cache is False and disk.write_cache:
        raise ConfigError(
            "no write_cache: this target cannot make each write durable before it is done", "leave it out"
        )
    return disk


def _with_discard(said: DiskOptions, disk: Geometry) -> Geometry:
    if not disk.discard_granularity:
        for name in ("discard_granularity", "max_discard_bytes", "max_write_zeroes_bytes"):
            if getattr(said, name):
                raise ConfigError(
                    f"{name}: this disk can neither discard nor write zeroes", "leave it out", [name, "read_only"]
                )
        return disk
    # As the block layer does: what is smaller than a physical block cannot be freed.
    least = max(disk.discard_granularity, disk.physical_block)
    granularity = said.discard_granularity or least
    if granularity % least:
        raise ConfigError(
            f"discard_granularity {granularity} is not a multiple of {least}, the unit in which this disk can discard",
            "raise it, or lower physical_block_size if that was said",
            ["discard_granularity", "physical_block_size"],
        )
    discard = _maximum(said, disk, "max_discard_bytes", disk.max_discard_bytes)
    zeroes = _maximum(said, disk, "max_write_zeroes_bytes", disk.max_write_zeroes_bytes)
    if 0 < discard < granularity and (said.max_discard_bytes or granularity != disk.discard_granularity):
        raise ConfigError(
            f"max_discard_bytes {discard} is less than discard_granularity {granularity}",
            "no discard could free anything: raise the one, or lower the other",
            ["max_discard_bytes", "discard_granularity", "physical_block_size"],
        )
    return replace(
        disk,
        discard_granularity=granularity if discard or zeroes else 0,
        max_discard_bytes=discard,
        max_write_zeroes_bytes=zeroes,
    )


def _maximum(said: DiskOptions, disk: Geometry, name: str, own: int) -> int:
    """Bytes of one request: as said, or all that the target can, in whole blocks."""
    wanted: int | None = getattr(said, name)
    if wanted is None:
        return own - own % disk.logical_block
    if wanted > own:
        raise ConfigError(
            f"{name} {wanted} is more than this disk can do at once, {own}", "say less, or leave it out", [name]
        )
    if wanted % disk.logical_block:
        raise ConfigError(
            f"{name} {wanted} is not a multiple of the logical block, {disk.logical_block}",
            f"{wanted - wanted % disk.logical_block} is",
            [name, "logical_block_size"],
        )
    return wanted
