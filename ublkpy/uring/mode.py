"""The data modes: how requests and their data travel between the driver and us.

=============  ==========================================================================
copy           the driver copies data to and from a buffer of ours, for each request
get-data       the same, but a write's data only when we have seen the request and ask
user-copy      we read and write the data at the character device
zero-copy      we have the request's own pages registered as a buffer of the ring
auto-buf       the driver registers them before we see the request
batch+...      requests come and results go many at a time (not with get-data)
=============  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from ublkpy.errors import ConfigError, UblkError
from ublkpy.uring.ffi import lib
from ublkpy.uring.uapi import Feature

Name = Literal[
    "copy",
    "get-data",
    "user-copy",
    "zero-copy",
    "auto-buf",
    "batch+copy",
    "batch+user-copy",
    "batch+zero-copy",
    "batch+auto-buf",
]


@dataclass(frozen=True)
class Mode:
    """One of them: its name, what the driver must have for it, and the engine's terms."""

    name: Name
    flags: Feature
    data: int
    batch: bool = False

    @property
    def in_place(self) -> bool:
        """Whether the backing reads and writes memory of the client itself."""
        return bool(self.flags & (Feature.SUPPORT_ZERO_COPY | Feature.AUTO_BUF_REG | Feature.SHMEM_ZC))


# With user-copy, for what no file answers: zeroes, Python, and requests that the driver could not register.
_ZERO_COPY = Feature.SUPPORT_ZERO_COPY | Feature.USER_COPY
_AUTO_BUF = Feature.AUTO_BUF_REG | Feature.USER_COPY

# With these, a daemon may leave the pages of a read as they were, with what the kernel had there.
PRIVILEGED = _ZERO_COPY | _AUTO_BUF

MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("copy", Feature(0), lib.UQ_COPY),
        Mode("get-data", Feature.NEED_GET_DATA, lib.UQ_GET_DATA),
        Mode("user-copy", Feature.USER_COPY, lib.UQ_USER_COPY),
        Mode("zero-copy", _ZERO_COPY, lib.UQ_ZERO_COPY),
        Mode("auto-buf", _AUTO_BUF, lib.UQ_AUTO_BUF),
        Mode("batch+copy", Feature.BATCH_IO, lib.UQ_COPY, batch=True),
        Mode("batch+user-copy", Feature.BATCH_IO | Feature.USER_COPY, lib.UQ_USER_COPY, batch=True),
        Mode("batch+zero-copy", Feature.BATCH_IO | _ZERO_COPY, lib.UQ_ZERO_COPY, batch=True),
        Mode("batch+auto-buf", Feature.BATCH_IO | _AUTO_BUF, lib.UQ_AUTO_BUF, batch=True),
    )
}


def fastest(features: Feature, depth: int, threads: int = 1, *, user_copy: bool = False, batches: bool = True) -> Mode:
    """The mode with the fewest instructions per request of 4 KiB that this driver has for queues so deep.

    Several threads in batch mode take turns of some requests each, and the driver waits for the one whose turn it
    is. One by one, each has tags of its own, and none waits for another. ``user_copy`` is for who has metadata, which
    the driver gives only to those who copy themselves, or for who need not copy at all. No ``batches`` for a device
    that recovers: it could not be quiesced without failing requests (ublk_drv.c, ublk_batch_cancel_queue).
    """
    way = "user-copy" if user_copy and Feature.USER_COPY in features else "copy"
    batch = Feature.BATCH_IO in features and depth > 1 and threads == 1 and batches
    return MODES[f"batch+{way}" if batch else way]


def demand(
    name: str, features: Feature, depth: int, threads: int, *, user_copy: bool = False, batches: bool = True
) -> Mode:
    """The mode of this name, or the fastest for ``auto``; UblkError says what it, or so many threads, lack."""
    mode = MODES.get(name) or fastest(features, depth, threads, user_copy=user_copy, batches=batches)
    missing = mode.flags & ~features
    if missing:
        raise UblkError(
            f"this kernel's ublk driver lacks {names(missing)}, which mode {mode.name} needs",
            "leave mode out to get the fastest that it has; ublk features shows all",
        )
    if threads > 1 and not mode.batch and Feature.PER_IO_DAEMON not in features:
        raise UblkError(
            f"this kernel's ublk driver lacks {names([Feature.PER_IO_DAEMON])}, which {threads} threads per queue need",
            "leave threads_per_queue out, or use Linux 6.16 or newer; more queues have a thread each",
        )
    return mode


def check_depth(name: str, depth: int) -> None:
    """ConfigError for batches of one: the driver (UBLK_F_BATCH_IO) refuses them."""
    if name != "auto" and MODES[name].batch and depth == 1:
        raise ConfigError(
            f"mode {name} needs a depth of 2 or more", "leave mode out, or raise the depth", ["mode", "depth"]
        )


def check_metadata(name: str) -> None:
    """ConfigError for a mode in which the driver (UBLK_F_INTEGRITY) gives no metadata."""
    if name != "auto" and MODES[name].data != lib.UQ_USER_COPY:
        raise ConfigError(
            f"mode {name} cannot move metadata: the driver has it copied by the daemon itself",
            "leave mode out, or choose user-copy or batch+user-copy",
            ["mode", "metadata_size"],
        )


def check_unprivileged(name: str) -> None:
    """ConfigError for a mode that the driver keeps for CAP_SYS_ADMIN (ublk_drv.c, ublk_ctrl_add_dev)."""
    if name != "auto" and MODES[name].flags & PRIVILEGED:
        raise ConfigError(
            f"mode {name} is not for unprivileged devices: the driver copies their data itself",
            f"leave mode out, or choose {_names_of(mode for mode in MODES.values() if not mode.flags & PRIVILEGED)}",
            ["mode", "unprivileged"],
        )


def sharing(mode: Mode, features: Feature, recovers: bool) -> Mode:
    """The same with memory shared by clients (UBLK_F_SHMEM_ZC); UblkError where the driver has none."""
    if Feature.SHMEM_ZC not in features:
        raise UblkError(
            f"this kernel's ublk driver lacks {names(Feature.SHMEM_ZC)}, which shmem_zc needs",
            "leave shmem_zc out, or use Linux 7.1 or newer; ublk features shows what there is",
        )
    if recovers and mode.data == lib.UQ_COPY:  # found by auto: check_sharing() says why not
        mode = MODES[mode.name.replace("copy", "user-copy")]
    return replace(mode, flags=mode.flags | Feature.SHMEM_ZC)


def check_sharing(name: str, recovers: bool) -> None:
    """ConfigError for a mode that cannot be combined with shared memory, and says why."""
    if name == "get-data":
        raise ConfigError(
            "shmem_zc and mode get-data exclude each other: the buffer that it names would take the place of the"
            " client's (ublk_drv.c)",
            _SHARING_MODES,
            ["mode", "shmem_zc"],
        )
    if name != "auto" and MODES[name].in_place:
        raise ConfigError(
            f"shmem_zc and mode {name} exclude each other: that already serves requests in the client's memory",
            _SHARING_MODES,
            ["mode", "shmem_zc"],
        )
    if recovers and name in ("copy", "batch+copy"):
        raise ConfigError(
            f"shmem_zc with recovery does not go with mode {name}: after a recovery, requests in memory that only"
            " the old daemon had could not even be copied",
            "leave mode out, or choose user-copy or batch+user-copy",
            ["mode", "shmem_zc", "recovery"],
        )


_SHARING_MODES = "leave mode out, or choose copy, user-copy, batch+copy or batch+user-copy"


def _names_of(modes: Iterable[Mode]) -> str:
    return ", ".join(mode.name for mode in modes)


def names(flags: Iterable[Feature]) -> str:
    """Flags as the kernel spells them."""
    return ", ".join(f"UBLK_F_{flag.name}" for flag in flags)
