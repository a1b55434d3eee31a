"""Which legs of a mirror go together, and which of them has all that was written: decided from their labels alone."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ublkpy.errors import UblkError
from ublkpy.tgt.mirror_label import MAX_LEGS, ROOM, Label, nr_regions, room_at
from ublkpy.tgt.options import exact_size
from ublkpy.tgt.part import Part


@dataclass
class Member:
    """One of the files that were named: what is open, or why it is not, and the label on it."""

    path: Path
    leg: Part | None
    problem: UblkError | None = None
    label: Label | None = None
    index: int = -1
    """Which leg of the mirror it is."""

    @property
    def room(self) -> int:
        """Its bytes for data."""
        return room_at(self.leg.backing.end) if self.leg else 0


@dataclass(frozen=True)
class Assembly:
    """What the next label is to say, and whose turn it is."""

    label: Label
    """With the event of the last one."""
    members: tuple[Member, ...]
    """By their index."""
    is_new: bool
    """Whether there was none before; then legs that are not in sync are to get the data of the first."""


def assemble(members: Sequence[Member], *, create: bool, degraded: bool) -> Assembly:
    """UblkError where these files are no mirror, or not one that can be used without more being said.

    ``create``: what is on files without a label may be overwritten. ``degraded``: legs may be missing that had all data
    when they were seen last.
    """
    if not any(member.label for member in members):
        return _new(members, create=create)
    newest = max((member for member in members if member.label), key=lambda member: member.label.event)  # type: ignore[union-attr]
    label = newest.label
    assert label
    if not label.in_sync[label.index]:
        raise UblkError(
            f"{newest.path} was being brought back, and no leg is there that has all data",
            "bring back the leg that it was copied from",
        )
    _check_same(members, newest, label)
    _give_indices(members, label, create=create)
    in_sync = tuple(_is_in_sync(member, newest, label, degraded) for member in sorted(members, key=_index))
    return Assembly(replace(label, in_sync=in_sync), tuple(sorted(members, key=_index)), is_new=False)


def _index(member: Member) -> int:
    return member.index


def _new(members: Sequence[Member], *, create: bool) -> Assembly:
    """Blank files are alike. Else the first one counts, and the others get its data."""
    if len(members) > MAX_LEGS:
        raise UblkError(f"a mirror of {len(members)} legs", f"{MAX_LEGS} are the most")
    for member in members:
        if member.problem:
            raise member.problem
        if member.room <= 0:
            raise UblkError(
                f"{member.path} is too small for a leg of a mirror, whose label takes {exact_size(ROOM)}",
                f"truncate -s 1G {member.path}",
            )
    used = [member.path for member in members if not _is_blank(member)]
    if used and not create:
        raise UblkError(
            f"{used[0]} is not blank, and no leg of a mirror yet",
            f"--create makes it one: with the data of {members[0].path}, but for its last {exact_size(ROOM)}, on all of"
            " them",
        )
    size = min(member.room for member in members)
    for index, member in enumerate(members):
        member.index = index
    in_sync = (True, *(not used for _ in members[1:]))
    dirty = (b"\1" if used else b"\0") * nr_regions(size)  # what the first has may not be durable either
    label = Label(os.urandom(16), 0, size, in_sync, 0, dirty)
    return Assembly(label, tuple(members), is_new=True)


def _check_same(members: Sequence[Member], newest: Member, label: Label) -> None:
    """UblkError for legs that belong to different mirrors, or went different ways."""
    if len(members) != len(label.in_sync):
        raise UblkError(
            f"{newest.path} is of a mirror of {len(label.in_sync)} legs, not {len(members)}",
            "name each of them; one that is gone, by the path of the file that is to take its place",
        )
    seen: dict[int, Member] = {}
    for member in members:
        found = member.label
        if not found:
            continue
        if found.uuid != label.uuid:
            raise UblkError(
                f"{member.path} is a leg of another mirror than {newest.path}",
                f"name those that belong together; to give up what is on {member.path}: {_wipe(member)}",
            )
        if found.index in seen:
            raise UblkError(
                f"{member.path} and {seen[found.index].path} are copies of one leg", "name the original, and the others"
            )
        seen[found.index] = member
        if was_used_alone(found, label):
            raise UblkError(
                f"{member.path} and {newest.path} have been used apart, and each has data that the other has not",
                f"choose: {_wipe(member)} gives up what is on the one, {_wipe(newest)} what is on the other; then add"
                " the mirror with --degraded, and: ublk resync",
            )


def was_used_alone(found: Label, label: Label) -> bool:
    """Whether a leg with the one label has had writes without those that have the other."""
    others = [n for n, flag in enumerate(label.in_sync) if flag and n != found.index]
    return found.in_sync[found.index] and bool(others) and not any(found.in_sync[n] for n in others)


def _wipe(member: Member) -> str:
    """A command after which it has no label."""
    return f"dd if=/dev/zero of={member.path} bs=4096 seek={member.room // 4096} count={ROOM // 4096} conv=notrunc"


def _give_indices(members: Sequence[Member], label: Label, *, create: bool) -> None:
    """Files without a label take the places that nobody has. UblkError for one that holds something else."""
    for member in members:
        if member.label:
            member.index = member.label.index
    free = sorted(set(range(len(members))) - {member.index for member in members})
    for member in members:
        if not member.label:
            member.index = free.pop(0)
            if member.leg:
                check_member(member, label, force=create)


def check_member(member: Member, label: Label, *, force: bool) -> None:
    """UblkError for a file that cannot be this leg; ``force``: what it holds may be overwritten."""
    found = member.label
    if found and (found.uuid, found.index) != (label.uuid, member.index):
        raise UblkError(f"{member.path} is a leg of another mirror", f"to give up what is on it: {_wipe(member)}")
    if not found and not force and not _is_blank(member):
        raise UblkError(
            f"{member.path} is not blank, and no leg of this mirror",
            "to have it overwritten with the data of the mirror: ublk add --create, or ublk resync --force",
        )
    if found and not force and was_used_alone(found, label):
        raise UblkError(
            f"{member.path} has been used alone, and has data that the mirror has not",
            "to give that up, and have all of it overwritten with the data of the mirror: ublk resync --force",
        )
    if member.room < label.size:
        raise UblkError(
            f"{member.path} has room for {exact_size(max(0, member.room))}, too little for the"
            f" {exact_size(label.size)} of the mirror",
            f"truncate -s {label.size + ROOM} {member.path}",
        )


def _is_in_sync(member: Member, newest: Member, label: Label, degraded: bool) -> bool:
    if not label.in_sync[member.index]:
        return False
    if member.label:
        return True
    if degraded:
        return False
    why = f": {member.problem.message}" if member.problem else ", and its file has no label"
    raise UblkError(
        f"a leg of the mirror is missing, which had all data when {newest.path} saw it last{why}",
        "--degraded goes on without it; what was written while that one was used alone is then not there",
    )


def _is_blank(member: Member) -> bool:
    """Whether it holds no data at all, as far as that can be known."""
    assert member.leg
    if member.leg.backing.is_block_device:
        return False
    try:
        os.lseek(member.leg.backing.fd, 0, os.SEEK_DATA)
    except OSError as e:
        return e.errno == errno.ENXIO
    return False
