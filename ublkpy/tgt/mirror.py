"""mirror: the same data on several files or block devices (RAID 1), natively.

Requests go to the legs without Python. Python is asked at the first write to a region, and where a leg fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ublkpy.errors import BusyError, UblkError
from ublkpy.tgt import mirror_label
from ublkpy.tgt.base import Geometry, Progress, Target
from ublkpy.tgt.legs import check_different, geometry
from ublkpy.tgt.mirror_assembly import Member, assemble, check_member, was_used_alone
from ublkpy.tgt.mirror_keeper import Keeper
from ublkpy.tgt.options import option
from ublkpy.tgt.part import Part
from ublkpy.uring.map import Map
from ublkpy.uring.queue import Request


class MirrorTarget(Target):
    """The same data on several files or block devices: RAID 1."""

    name = "mirror"
    files: tuple[Path, ...] = option(..., "-f", "--file", help="files or block devices; repeatable", minimum=2)
    create: bool = option(
        False, help="make a mirror of files that are not blank: with the data of the first one, on all of them"
    )
    degraded: bool = option(False, help="go on without a leg that is missing, though it had all data when last seen")
    direct: bool | None = option(
        None,
        help="O_DIRECT or an error; default: O_DIRECT where a file allows it",
        off_flags=("--buffered_io", "--buffered-io"),
    )

    def open(self) -> Geometry:
        check_different(self.files)
        self._keeper: Keeper | None = None
        self._opened: list[Part] = []
        try:
            self._assembly = assemble(
                [self._member(path) for path in self.files], create=self.create, degraded=self.degraded
            )
            return geometry(self._opened, self._assembly.label.size)
        except BaseException:
            self.close()
            raise

    def map(self, target_map: Map) -> None:
        self._keeper = Keeper(self._assembly.members, self._assembly.label, self._reopen, self.tell_changed)
        self._keeper.begin(target_map, read_only=self.disk.read_only, create=self.create)

    def upcall(self, requests: Sequence[Request]) -> None:
        assert self._keeper
        self._keeper.ask(requests)

    def resync(self, *, force: bool) -> None:
        assert self._keeper
        if self.disk.read_only:
            raise UblkError("the mirror is read-only", "delete it, and add it without read_only")
        self._keeper.resync(force=force)

    def dump(self) -> dict[str, object]:
        """``create`` and ``degraded`` were said of what was there when the mirror was added: the next finds other
        legs.
        """
        return {name: value for name, value in super().dump().items() if name not in ("create", "degraded")}

    def progress(self) -> Progress | None:
        return self._keeper.progress if self._keeper else None

    def stop(self) -> None:
        if self._keeper:
            self._keeper.stop(clean=not self.was_cut and not self.disk.read_only)

    def close(self) -> None:
        for leg in self._opened:
            leg.close()
        self._opened.clear()

    def backing(self) -> str:
        states = self._states()
        return ", ".join(str(path) if states[path] == "in sync" else f"{path} ({states[path]})" for path in self.files)

    def status(self) -> dict[str, object]:
        states = self._states()
        return {
            "files": [str(path) for path in self.files],
            "legs": [states[path] for path in self.files],
            "direct_io": [int(leg.backing.direct) for leg in self._opened],
        }

    def _states(self) -> dict[Path, str]:
        if self._keeper:
            return self._keeper.states()
        label = self._assembly.label
        return {
            member.path: "in sync" if label.in_sync[member.index] else "out of sync"
            for member in self._assembly.members
        }

    def _member(self, path: Path) -> Member:
        """What is there, or why it is not."""
        try:
            leg = Part(path, self.disk, direct=self.direct, unit=mirror_label.BLOCK)
        except BusyError:  # it is there: whoever has it may be the last daemon, which will go
            raise
        except UblkError as e:
            return Member(path, None, e)
        try:
            label = mirror_label.read(leg.backing.fd, leg.backing.end)
        except BaseException as e:
            leg.close()
            if not isinstance(e, OSError):
                raise
            return Member(path, None, UblkError(f"the label of {path} cannot be read: {e.strerror}"))
        self._opened.append(leg)
        return Member(path, leg, label=label)

    def _reopen(self, member: Member, force: bool) -> None:
        """The file of a leg that is to come back: the one that is open, if it is still that and can be read."""
        label = replace(self._assembly.label, in_sync=self._keeper.in_sync() if self._keeper else ())
        found = member
        if member.leg is None or not member.leg.is_current():
            found = self._member(member.path)
            if found.problem:
                raise found.problem
            found.index = member.index
        try:
            check_member(found, label, force=force or (self.create and not found.label))
        except UblkError:
            if found is not member and found.leg:
                self._opened.remove(found.leg)
                found.leg.close()
            raise
        member.leg, member.label = found.leg, found.label
        if found.label and was_used_alone(found.label, label):
            member.label = None  # nothing of it counts
