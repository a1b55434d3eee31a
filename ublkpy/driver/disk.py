"""A block device as the block layer shows it in sysfs: to look there waits for nobody."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ublkpy.uring.uapi import SECTOR, Attr


def completed(dev_id: int) -> tuple[int, ...] | None:
    """How many reads, writes, discards and flushes were answered so far; None when there is no disk.

    Kernel: Documentation/block/stat.rst.
    """
    try:
        fields = Path(f"/sys/block/ublkb{dev_id}/stat").read_text().split()
    except OSError:
        return None
    return tuple(int(fields[n]) for n in (0, 4, 11, 15))


@dataclass(frozen=True)
class Disk:
    """/dev/ublkbN as it is now: sizes in bytes, its number as "major:minor".

    Kernel: Documentation/ABI/stable/sysfs-block.
    """

    devno: str
    size: int
    logical_block: int
    physical_block: int
    attrs: Attr

    @classmethod
    def read(cls, dev_id: int) -> Disk | None:
        """The disk of a device; None when there is none."""
        folder = Path(f"/sys/block/ublkb{dev_id}")

        def number(name: str) -> int:
            return int((folder / name).read_text())

        try:
            attrs = Attr(0)
            for attr, on in (
                (Attr.READ_ONLY, number("ro")),
                (Attr.ROTATIONAL, number("queue/rotational")),
                (Attr.VOLATILE_CACHE, (folder / "queue/write_cache").read_text() == "write back\n"),
                (Attr.FUA, number("queue/fua")),
            ):
                attrs |= attr if on else Attr(0)
            return cls(
                devno=(folder / "dev").read_text().strip(),
                size=number("size") * SECTOR,
                logical_block=number("queue/logical_block_size"),
                physical_block=number("queue/physical_block_size"),
                attrs=attrs,
            )
        except OSError:  # ENOENT, or ENODEV while it goes
            return None
