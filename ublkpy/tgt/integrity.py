"""Metadata with each block, for the targets that can keep it: the options, and the file where it lives."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Literal

from ublkpy.errors import ConfigError, UblkError
from ublkpy.tgt.backing import Backing
from ublkpy.tgt.base import Target
from ublkpy.tgt.options import option
from ublkpy.uring.integrity import MAX_METADATA, Csum, Integrity


class IntegrityTarget(Target):
    """A target whose blocks can have metadata. Its options are named as kublk's, the kernel's test server."""

    metadata_size: int | None = option(
        None, help="bytes of metadata with each logical block; needs Linux 7.0", minimum=1, maximum=MAX_METADATA
    )
    csum_type: Literal["ip", "t10dif", "nvme"] | None = option(
        None, help="checksum that the kernel puts there when it writes a block, and checks when it reads it"
    )
    pi_offset: int | None = option(
        None, help="where checksum and tags begin in the metadata", minimum=0, maximum=MAX_METADATA
    )
    tag_size: int | None = option(
        None, help="bytes of the tags that are for applications, as the device tells them", minimum=0, maximum=255
    )
    integrity_capable: bool | None = option(None, help="the device tells that it keeps checksums")
    integrity_reftag: bool | None = option(None, help="the tags name the block: one in a wrong place is found")

    @property
    def has_metadata(self) -> bool:
        return self.metadata_size is not None

    def integrity(self, block: int) -> Integrity | None:
        """What the options say about blocks of so many bytes; None without metadata. Raises ConfigError."""
        said = [name for name in IntegrityTarget.options if getattr(self, name)]
        if not said:
            return None
        if self.metadata_size is None:
            raise ConfigError(
                f"{', '.join(said)}: there is nothing without metadata", "say how many bytes: metadata_size"
            )
        csum, pi_offset = Csum[self.csum_type or "none"], self.pi_offset or 0
        if self.integrity_reftag and not csum:
            raise ConfigError(
                "integrity_reftag: tags come with a checksum only", "choose one: csum_type ip, t10dif or nvme"
            )
        if pi_offset + csum.tuple_size > self.metadata_size:
            raise ConfigError(
                f"the {csum.tuple_size} bytes of checksum and tags at pi_offset {pi_offset} do not fit into"
                f" metadata_size {self.metadata_size}",
                f"metadata_size must be {pi_offset + csum.tuple_size} or more",
            )
        return Integrity(
            interval=block,
            metadata_size=self.metadata_size,
            pi_offset=pi_offset,
            csum_type=csum,
            tag_size=self.tag_size or 0,
            capable=bool(self.integrity_capable),
            reftag=bool(self.integrity_reftag),
        )


def open_metadata(
    path: Path, data: Path, size: int, integrity: Integrity, *, read_only: bool, durable: bool
) -> Backing:
    """The file with the metadata of ``size`` bytes in ``data``. Raises UblkError.

    Through the page cache: the metadata of a block is smaller than a block.
    """
    needed = size // integrity.interval * integrity.metadata_size
    # Nothing but ones: the kernel does not check such blocks.
    make = f"make one with: head -c {needed} /dev/zero | tr '\\0' '\\377' > {path}"
    if not path.exists():
        raise UblkError(f"metadata file {path} does not exist", make)
    if data.samefile(path):
        raise ConfigError(f"{path} cannot be the file and its own metadata", "name another file for metadata")
    backing = Backing(path, read_only=read_only, direct=False, durable=durable)
    try:
        if backing.end < needed:
            raise UblkError(
                f"metadata file {path} is too short: {backing.end} of {needed} bytes, {integrity.metadata_size} for"
                f" each block of {integrity.interval}",
                make,
            )
        status = os.fstat(backing.fd)
        if integrity.csum_type and stat.S_ISREG(status.st_mode) and not status.st_blocks:
            raise UblkError(f"metadata file {path} has only holes, no checksums: no block could be read", make)
        backing.check_space()
    except BaseException:
        backing.close()
        raise
    return backing
