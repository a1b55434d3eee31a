"""What a daemon is to serve, in the driver's terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ublkpy.config import DeviceConfig
from ublkpy.errors import UblkError
from ublkpy.tgt.base import Geometry
from ublkpy.uring.mode import Mode, demand, names, sharing
from ublkpy.uring.uapi import IO_DESC_SIZE, SECTOR, Attr, Feature, Params

_RECOVERY_FLAGS = {
    "none": Feature(0),
    "queue": Feature.USER_RECOVERY,
    "reissue": Feature.USER_RECOVERY | Feature.USER_RECOVERY_REISSUE,
    "fail": Feature.USER_RECOVERY | Feature.USER_RECOVERY_FAIL_IO,
}


@dataclass(frozen=True)
class Plan:
    """What a daemon is to serve; decided before the fork.

    ``cookie`` marks the device as the one of this plan, in the driver and in the state file. ``stale_buffers``
    are the shared ones that the driver knows from a daemon before.
    """

    config: DeviceConfig
    geometry: Geometry
    cookie: int
    stale_buffers: Sequence[int] = ()

    def demand(self, features: Feature) -> tuple[Mode, dict[str, Feature]]:
        """The mode that a driver with these can serve it in, and what the device must have, by what needs it.

        Raises UblkError if it can't.
        """
        options, target = self.config.device, self.config.target
        recovers = options.recovery != "none"
        needed = self._features()
        for what, flags in needed.items():
            if flags & ~features:
                raise UblkError(
                    f"this kernel's ublk driver lacks {names(flags & ~features)}, which {what} needs",
                    f"ublk features shows what it has; do without {what}, or take a newer kernel",
                )
        mode = demand(
            options.mode,
            features,
            options.depth,
            options.threads_per_queue,
            user_copy=self._copies_itself(),
            batches=not (recovers or self.geometry.zones),
        )
        if self.geometry.zones and options.unprivileged:
            raise UblkError("an unprivileged device cannot be zoned: the driver refuses it", "add it as root")
        if self.geometry.zones and mode.name != "user-copy":
            raise UblkError(f"a zoned disk cannot be served in mode {mode.name}", "leave mode out, or say user-copy")
        if options.shmem_zc:
            mode = sharing(mode, features, recovers)
        needed[f"mode {mode.name}"] = mode.flags
        if recovers:
            needed["ublk upgrade"] = Feature.QUIESCE & features
        if not target.moves_data and options.part_scan is None:
            # What the kernel had in its pages before could look like partitions.
            needed["a target without data"] = Feature.NO_AUTO_PART_SCAN & features
        return mode, needed

    def _copies_itself(self) -> bool:
        """Whether the driver gives what the target needs only to who copies data himself, or no data is copied."""
        options, target = self.config.device, self.config.target
        if target.has_metadata or self.geometry.zones:
            return True
        return not (target.moves_data or options.unprivileged)

    def _features(self) -> dict[str, Feature]:
        """What was asked for; the mode comes on top."""
        options = self.config.device
        needed = {f"recovery {options.recovery!r}": _RECOVERY_FLAGS[options.recovery]}
        if options.unprivileged:
            needed["unprivileged"] = Feature.UNPRIVILEGED_DEV
        if options.io_desc_size != IO_DESC_SIZE:
            needed[f"io_desc_size {options.io_desc_size}"] = Feature.IO_DESC_SIZE
        if self.geometry.integrity:
            needed[f"metadata_size {self.geometry.integrity.metadata_size}"] = Feature.INTEGRITY
        if self.geometry.zones:
            needed["a zoned disk"] = Feature.ZONED
        if options.part_scan is False:
            needed["--no-part-scan"] = Feature.NO_AUTO_PART_SCAN
        return needed

    def params(self, max_io_buf_bytes: int, mode: Mode) -> Params:
        """The geometry in the driver's terms."""
        g, max_sectors = self.geometry, self.config.device.max_sectors
        max_io_bytes = min(max_io_buf_bytes, max_sectors * SECTOR) if max_sectors else max_io_buf_bytes
        attrs = Attr(0)
        for attr, on in (
            (Attr.READ_ONLY, g.read_only),
            (Attr.ROTATIONAL, g.rotational),
            (Attr.VOLATILE_CACHE | Attr.FUA, g.write_cache),
        ):
            attrs |= attr if on else Attr(0)
        return Params(
            size=g.size,
            max_io_bytes=max_io_bytes,
            attrs=attrs,
            logical_block=g.logical_block,
            physical_block=g.physical_block,
            io_min=g.io_min,
            io_opt=g.io_opt,
            discard_granularity=g.discard_granularity,
            # What O_DIRECT asks for of the memory, when that is the client's own.
            dma_alignment=SECTOR if mode.in_place else 0,
            max_discard_sectors=g.max_discard_bytes // SECTOR if g.discard_granularity else 0,
            max_write_zeroes_sectors=g.max_write_zeroes_bytes // SECTOR if g.discard_granularity else 0,
            integrity=g.integrity,
            zones=g.zones.within(max_io_bytes) if g.zones else None,
        )
