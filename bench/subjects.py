"""The table of all that is measured, and the choice from it."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from . import peers, workloads
from .servers import SIZE_BYTES, kernel, nbd, ublkpy
from .subject import Family, Subject
from .workloads import Workload

FLOOR = "null_blk"
"""The block layer and fio alone: what it costs is subtracted from the others, so it is always measured."""

# ublkpy's data modes
_ONE_BY_ONE = ("copy", "get-data", "user-copy", "zero-copy", "auto-buf")
_BATCH = ("batch+copy", "batch+user-copy", "batch+zero-copy", "batch+auto-buf")

# the name's suffix, the options of `ublk add`
_VARIANTS = (("", ()), *((f"-{mode}", ("--mode", mode)) for mode in (*_ONE_BY_ONE, *_BATCH)))

# of those, what matters to targets in Python: they have the data in a buffer in any mode
_BUFFERED = tuple(variant for variant in _VARIANTS if variant[0] in ("", "-copy"))
# what the label of a mirror takes at the end of each file
_LABEL = 64 << 10
_PYTHON = (("python", ublkpy.ram), ("python-async", ublkpy.ram_async), ("python-plugin", ublkpy.ram_plugin))

_TABLE = (
    Subject(FLOOR, "null", kernel.null_blk),
    *(Subject(f"null{suffix}", "null", ublkpy.null(*options), ours=True) for suffix, options in _VARIANTS),
    *(
        Subject(f"{name}{suffix}", "null", disk(*options), ours=True)
        for name, disk in _PYTHON
        for suffix, options in _BUFFERED
    ),
    *(Subject(f"loop{suffix}", "file", ublkpy.loop(*options), ours=True) for suffix, options in _VARIANTS),
    Subject("ram", "file", ublkpy.memory(), ours=True),
    Subject("concat", "file", ublkpy.over_two("concat", SIZE_BYTES // 2), ours=True),
    Subject("stripe", "file", ublkpy.over_two("stripe", SIZE_BYTES // 2), ours=True),
    Subject("mirror", "file", ublkpy.over_two("mirror", SIZE_BYTES + _LABEL), ours=True),
    Subject("extents-1", "file", ublkpy.extents(1), ours=True),
    Subject("extents-1M", "file", ublkpy.extents(1_000_000), ours=True),
    Subject("kernel-loop", "file", kernel.loop),
    Subject("nbdkit-memory", "null", nbd.nbdkit_memory),
    Subject("nbdkit-python", "null", nbd.nbdkit_python),
    Subject("nbdkit-file", "file", nbd.nbdkit_file),
    Subject("qemu-nbd-raw", "file", nbd.qemu_nbd_raw),
    Subject("qemu-nbd-qcow2", "file", nbd.qemu_nbd_qcow2),
)

# what ratios are to, unless it is said: the first that was measured
_BASES: dict[Family, tuple[str, ...]] = {"null": ("kublk-null", FLOOR), "file": ("kublk-loop", "kernel-loop", FLOOR)}


class ChoiceError(Exception):
    """A name that nothing has."""


def known(peer: Path | None) -> list[Subject]:
    """All subjects, with those of a `peer` program."""
    if peer is None:
        return list(_TABLE)
    if peer.name not in peers.KNOWN:
        raise ChoiceError(f"no adapter for a server called {peer.name}; there are: {', '.join(peers.KNOWN)}")
    return [*_TABLE, *peers.subjects(peer)]


def choose_subjects(patterns: Sequence[str], subjects: Sequence[Subject]) -> list[Subject]:
    """Those that match one of the `patterns` (all if there are none), and the floor."""
    names = _matching(patterns, [subject.name for subject in subjects], "subject")
    return [subject for subject in subjects if subject.name in {*names, FLOOR}]


def choose_workloads(patterns: Sequence[str]) -> list[Workload]:
    """Those that match one of the `patterns`, all if there are none."""
    names = _matching(patterns, [workload.name for workload in workloads.ALL], "workload")
    return [workload for workload in workloads.ALL if workload.name in names]


def choose_bases(wanted: Sequence[str], subjects: Sequence[Subject]) -> dict[Family, str]:
    """For each family the subject that ratios are to: the one `wanted`, else the first known that is in `subjects`."""
    families = {subject.name: subject.family for subject in subjects}
    for name in wanted:
        if name not in families:
            raise ChoiceError(f"the base {name} is not among the subjects: {', '.join(families)}")
    bases = {family: next(name for name in names if name in families) for family, names in _BASES.items()}
    return bases | {families[name]: name for name in wanted}


def _matching(patterns: Sequence[str], names: Sequence[str], what: str) -> set[str]:
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise ChoiceError(f"no {what} {pattern}; there are: {', '.join(names)}")
        chosen |= found
    return chosen or set(names)
