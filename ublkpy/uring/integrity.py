"""Metadata with each block: how much there is, what the kernel checks with it, and where it lives."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from ublkpy.uring.ffi import lib

MAX_METADATA = 255
"""Bytes for each block: the driver has 8 bits for their number."""


class Csum(IntEnum):
    """LBMD_PI_CSUM_*: the checksum in a block's protection information, by ublk's names."""

    none = lib.LBMD_PI_CSUM_NONE
    ip = lib.LBMD_PI_CSUM_IP
    t10dif = lib.LBMD_PI_CSUM_CRC16_T10DIF
    nvme = lib.LBMD_PI_CSUM_CRC64_NVME

    @property
    def tuple_size(self) -> int:
        """Bytes of the protection information: checksum and tags."""
        return {Csum.none: 0, Csum.nvme: 16}.get(self, 8)


@dataclass(frozen=True)
class Integrity:
    """``struct ublk_param_integrity``, sizes in bytes: each ``interval`` of data has ``metadata_size``."""

    interval: int
    metadata_size: int
    pi_offset: int = 0
    csum_type: Csum = Csum.none
    tag_size: int = 0
    capable: bool = False
    reftag: bool = False

    def fill(self, params: Any) -> None:
        """Into a ``struct ublk_params``."""
        params.types |= lib.UBLK_PARAM_TYPE_INTEGRITY
        c = params.integrity
        c.flags = self.capable * lib.LBMD_PI_CAP_INTEGRITY | self.reftag * lib.LBMD_PI_CAP_REFTAG
        c.interval_exp = self.interval.bit_length() - 1
        c.metadata_size, c.pi_offset = self.metadata_size, self.pi_offset
        c.csum_type, c.tag_size = self.csum_type, self.tag_size

    @classmethod
    def found(cls, params: Any) -> Integrity | None:
        """The one in a ``struct ublk_params``, if it has one."""
        c = params.integrity
        if not params.types & lib.UBLK_PARAM_TYPE_INTEGRITY:
            return None
        return cls(
            interval=1 << c.interval_exp,
            metadata_size=c.metadata_size,
            pi_offset=c.pi_offset,
            csum_type=Csum(c.csum_type),
            tag_size=c.tag_size,
            capable=bool(c.flags & lib.LBMD_PI_CAP_INTEGRITY),
            reftag=bool(c.flags & lib.LBMD_PI_CAP_REFTAG),
        )


@dataclass(frozen=True)
class Metadata:
    """Where a device's metadata lives: in a file of its map, that of one block after that of the other.

    Without a file it is forgotten, and reads are not checked.
    """

    integrity: Integrity
    file: int | None = None

    def to_c(self) -> dict[str, int]:
        """The members of struct uq_metadata."""
        return {
            "bytes": self.integrity.metadata_size,
            "interval_shift": self.integrity.interval.bit_length() - 1,
            "kind": lib.UM_NULL if self.file is None else lib.UM_FILE,
            "slot": self.file or 0,
        }
