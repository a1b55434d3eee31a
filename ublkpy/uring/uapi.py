"""The driver's constants and structs as Python objects.

Names and numbers are those of include/uapi/linux/ublk_cmd.h; the values come
from the compiled module.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any

from ublkpy.uring.ffi import ffi, lib
from ublkpy.uring.integrity import Integrity
from ublkpy.uring.zones import Zones

MAX_QUEUE_DEPTH: int = lib.UBLK_MAX_QUEUE_DEPTH
IO_DESC_SIZE: int = ffi.sizeof("struct ublksrv_io_desc")
SECTOR = 512


class Feature(IntFlag):
    """UBLK_F_*: what a driver has, and what a device was added with."""

    SUPPORT_ZERO_COPY = lib.UBLK_F_SUPPORT_ZERO_COPY
    URING_CMD_COMP_IN_TASK = lib.UBLK_F_URING_CMD_COMP_IN_TASK
    NEED_GET_DATA = lib.UBLK_F_NEED_GET_DATA
    USER_RECOVERY = lib.UBLK_F_USER_RECOVERY
    USER_RECOVERY_REISSUE = lib.UBLK_F_USER_RECOVERY_REISSUE
    UNPRIVILEGED_DEV = lib.UBLK_F_UNPRIVILEGED_DEV
    CMD_IOCTL_ENCODE = lib.UBLK_F_CMD_IOCTL_ENCODE
    USER_COPY = lib.UBLK_F_USER_COPY
    ZONED = lib.UBLK_F_ZONED
    USER_RECOVERY_FAIL_IO = lib.UBLK_F_USER_RECOVERY_FAIL_IO
    UPDATE_SIZE = lib.UBLK_F_UPDATE_SIZE
    AUTO_BUF_REG = lib.UBLK_F_AUTO_BUF_REG
    QUIESCE = lib.UBLK_F_QUIESCE
    PER_IO_DAEMON = lib.UBLK_F_PER_IO_DAEMON
    BUF_REG_OFF_DAEMON = lib.UBLK_F_BUF_REG_OFF_DAEMON
    BATCH_IO = lib.UBLK_F_BATCH_IO
    INTEGRITY = lib.UBLK_F_INTEGRITY
    SAFE_STOP_DEV = lib.UBLK_F_SAFE_STOP_DEV
    NO_AUTO_PART_SCAN = lib.UBLK_F_NO_AUTO_PART_SCAN
    SHMEM_ZC = lib.UBLK_F_SHMEM_ZC
    IO_DESC_SIZE = lib.UBLK_F_IO_DESC_SIZE


class State(IntEnum):
    """UBLK_S_DEV_*: the life of a device as the driver sees it."""

    DEAD = lib.UBLK_S_DEV_DEAD
    LIVE = lib.UBLK_S_DEV_LIVE
    QUIESCED = lib.UBLK_S_DEV_QUIESCED
    FAIL_IO = lib.UBLK_S_DEV_FAIL_IO


class Op(IntEnum):
    """UBLK_IO_OP_* (include/uapi/linux/ublk_cmd.h): the requests that the engine serves."""

    READ = lib.UBLK_IO_OP_READ
    """Fill a buffer."""
    WRITE = lib.UBLK_IO_OP_WRITE
    """Take the bytes of a buffer."""
    FLUSH = lib.UBLK_IO_OP_FLUSH
    """Make durable what was written before."""
    DISCARD = lib.UBLK_IO_OP_DISCARD
    """Forget bytes that nobody needs any more."""
    WRITE_ZEROES = lib.UBLK_IO_OP_WRITE_ZEROES
    """Have zeroes there."""
    ZONE_OPEN = lib.UBLK_IO_OP_ZONE_OPEN
    """Open a zone explicitly."""
    ZONE_CLOSE = lib.UBLK_IO_OP_ZONE_CLOSE
    """Close it."""
    ZONE_FINISH = lib.UBLK_IO_OP_ZONE_FINISH
    """Make it full."""
    ZONE_APPEND = lib.UBLK_IO_OP_ZONE_APPEND
    """Take the bytes of a buffer at its write pointer."""
    ZONE_RESET_ALL = lib.UBLK_IO_OP_ZONE_RESET_ALL
    """Make all zones empty."""
    ZONE_RESET = lib.UBLK_IO_OP_ZONE_RESET
    """Make one empty."""
    REPORT_ZONES = lib.UBLK_IO_OP_REPORT_ZONES
    """Fill a buffer with ``struct blk_zone`` (include/uapi/linux/blkzoned.h)."""


class IoFlag(IntFlag):
    """UBLK_IO_F_* (include/uapi/linux/ublk_cmd.h): what is to be known of a request besides."""

    FUA = lib.UBLK_IO_F_FUA
    """A WRITE that has to be durable before it is done."""
    NOUNMAP = lib.UBLK_IO_F_NOUNMAP
    """A WRITE_ZEROES that has to keep its space."""
    SHMEM_ZC = lib.UBLK_IO_F_SHMEM_ZC
    """Its data is in memory that the client shares."""


class Attr(IntFlag):
    """UBLK_ATTR_*: properties of the block device."""

    READ_ONLY = lib.UBLK_ATTR_READ_ONLY
    ROTATIONAL = lib.UBLK_ATTR_ROTATIONAL
    VOLATILE_CACHE = lib.UBLK_ATTR_VOLATILE_CACHE
    FUA = lib.UBLK_ATTR_FUA


@dataclass(frozen=True)
class DevInfo:
    """``struct ublksrv_ctrl_dev_info``. Sizes in bytes; pid -1 means none.

    ``io_desc_size`` is that of a request's descriptor. Without the flag IO_DESC_SIZE it is the smallest, and the
    driver's field means nothing: before Linux 7.3, it echoes what was asked for.
    """

    dev_id: int
    nr_hw_queues: int
    queue_depth: int
    max_io_buf_bytes: int
    flags: Feature
    ublksrv_flags: int = 0
    state: State = State.DEAD
    ublksrv_pid: int = -1
    owner_uid: int = 0
    owner_gid: int = 0
    io_desc_size: int = IO_DESC_SIZE

    def to_c(self) -> Any:
        """The struct for ADD_DEV; fields that the driver fills stay zero, as 6.18 requires of ``state``."""
        info = ffi.new("struct ublksrv_ctrl_dev_info *")
        info.dev_id = self.dev_id
        info.nr_hw_queues = self.nr_hw_queues
        info.queue_depth = self.queue_depth
        info.max_io_buf_bytes = self.max_io_buf_bytes
        info.flags = int(self.flags)
        info.ublksrv_flags = self.ublksrv_flags
        info.io_desc_size = self.io_desc_size if Feature.IO_DESC_SIZE in self.flags else 0
        return info

    @classmethod
    def from_c(cls, info: Any) -> DevInfo:
        return cls(
            dev_id=info.dev_id,
            nr_hw_queues=info.nr_hw_queues,
            queue_depth=info.queue_depth,
            max_io_buf_bytes=info.max_io_buf_bytes,
            flags=Feature(info.flags),
            ublksrv_flags=info.ublksrv_flags,
            state=State(info.state),
            ublksrv_pid=info.ublksrv_pid,
            owner_uid=info.owner_uid,
            owner_gid=info.owner_gid,
            io_desc_size=info.io_desc_size if info.flags & Feature.IO_DESC_SIZE else IO_DESC_SIZE,
        )


@dataclass(frozen=True)
class Params:
    """``struct ublk_params``: sizes in bytes here, shifts and 512-byte sectors in the kernel.

    A discard granularity of 0 leaves discard and write-zeroes out, a DMA alignment of 0 the driver's own.
    """

    size: int
    max_io_bytes: int
    attrs: Attr
    logical_block: int = 512
    physical_block: int = 512
    io_min: int = 512
    io_opt: int = 512
    discard_granularity: int = 0
    max_discard_sectors: int = 0
    max_write_zeroes_sectors: int = 0
    dma_alignment: int = 0
    integrity: Integrity | None = None
    zones: Zones | None = None

    def to_c(self) -> Any:
        """The struct for SET_PARAMS."""
        params = ffi.new("struct ublk_params *")
        params.len = ffi.sizeof("struct ublk_params")
        params.types = lib.UBLK_PARAM_TYPE_BASIC
        basic = params.basic
        basic.attrs = int(self.attrs)
        basic.logical_bs_shift = _shift(self.logical_block)
        basic.physical_bs_shift = _shift(self.physical_block)
        basic.io_min_shift = _shift(self.io_min)
        basic.io_opt_shift = _shift(self.io_opt)
        basic.max_sectors = self.max_io_bytes // SECTOR
        basic.dev_sectors = self.size // SECTOR
        if self.discard_granularity:
            params.types |= lib.UBLK_PARAM_TYPE_DISCARD
            params.discard.discard_granularity = self.discard_granularity
            params.discard.max_discard_sectors = self.max_discard_sectors
            params.discard.max_write_zeroes_sectors = self.max_write_zeroes_sectors
            params.discard.max_discard_segments = 1
        if self.dma_alignment:
            params.types |= lib.UBLK_PARAM_TYPE_DMA_ALIGN
            params.dma.alignment = self.dma_alignment - 1
        if self.integrity:
            self.integrity.fill(params)
        if self.zones:
            self.zones.fill(params)
        return params

    @classmethod
    def from_c(cls, params: Any) -> Params:
        basic, discard = params.basic, params.discard
        has_discard = params.types & lib.UBLK_PARAM_TYPE_DISCARD
        return cls(
            size=basic.dev_sectors * SECTOR,
            max_io_bytes=basic.max_sectors * SECTOR,
            attrs=Attr(basic.attrs),
            logical_block=1 << basic.logical_bs_shift,
            physical_block=1 << basic.physical_bs_shift,
            io_min=1 << basic.io_min_shift,
            io_opt=1 << basic.io_opt_shift,
            discard_granularity=discard.discard_granularity if has_discard else 0,
            max_discard_sectors=discard.max_discard_sectors if has_discard else 0,
            max_write_zeroes_sectors=discard.max_write_zeroes_sectors if has_discard else 0,
            dma_alignment=params.dma.alignment + 1 if params.types & lib.UBLK_PARAM_TYPE_DMA_ALIGN else 0,
            integrity=Integrity.found(params),
            zones=Zones.found(params),
        )


# The members of struct ublk_params, and the bit of ``types`` that says that one counts.
_PARAM_GROUPS = {
    "basic": lib.UBLK_PARAM_TYPE_BASIC,
    "discard": lib.UBLK_PARAM_TYPE_DISCARD,
    "devt": lib.UBLK_PARAM_TYPE_DEVT,
    "zoned": lib.UBLK_PARAM_TYPE_ZONED,
    "dma": lib.UBLK_PARAM_TYPE_DMA_ALIGN,
    "seg": lib.UBLK_PARAM_TYPE_SEGMENT,
    "integrity": lib.UBLK_PARAM_TYPE_INTEGRITY,
}

ParamGroups = dict[str, dict[str, int]]
"""Parameters with the kernel's names and units, in its groups."""


def param_groups(params: Any) -> ParamGroups:
    """What a ``struct ublk_params`` holds, as it is; only the groups that count."""
    found = {}
    for name, bit in _PARAM_GROUPS.items():
        if params.types & bit:
            group = getattr(params, name)
            found[name] = {field: getattr(group, field) for field, _ in ffi.typeof(group).fields}
    return found


def _shift(size: int) -> int:
    """log2 of a power of two."""
    return size.bit_length() - 1
