"""The thread that keeps a mirror together: it answers what the map leaves to Python, and brings legs back.

One thread, so that nothing here needs a lock. What it is told, and what queues ask, comes through one inbox::

    a write to a clean region      its bit on all legs, durably; then writes there go without asking
    a leg that failed              the others' labels say so, durably; then the map goes without it
    resync                         a leg that is back is written to, and gets all that it missed, bit by bit
    nothing for some time          bits of regions that nobody writes to any more are taken back
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ublkpy.errors import UblkError
from ublkpy.tgt import mirror_label
from ublkpy.tgt.base import Progress
from ublkpy.tgt.mirror_assembly import Member
from ublkpy.tgt.mirror_label import Label
from ublkpy.tgt.mirror_regions import Regions
from ublkpy.uring.map import Map
from ublkpy.uring.queue import Request
from ublkpy.uring.uapi import Op

_log = logging.getLogger(__name__)

_PATIENCE = 5.0  # seconds for which a region stays dirty at least
_HOT = 60.0  # and one that is written to all the time
_DRAIN = 20.0
_END = 30.0  # for what is under way at a leg
_UNIT = 1 << 20  # bytes that are copied at once, while writes to them wait
_CANNOT = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY}  # of a discard: no fault of the leg


class Keeper:
    """Keeps the legs of one mirror alike, from ``start`` to ``stop``.

    ``members`` are its legs by their index, ``label`` is what their labels are to say. ``reopen`` opens the file of a
    leg that is to come back (True: whatever is in it), or raises UblkError. ``changed`` is called when a leg has gone
    or come back.
    """

    def __init__(
        self,
        members: Sequence[Member],
        label: Label,
        reopen: Callable[[Member, bool], None],
        changed: Callable[[], None],
    ) -> None:
        self.regions = Regions(label.size, label.dirty)
        self.progress: Progress | None = None
        self._members = members
        self._label = label
        self._reopen = reopen
        self._changed = changed
        self._in_sync = [member for member in members if label.in_sync[member.index]]
        self._joining: list[Member] = []
        self._slots: dict[int, Member] = {}  # all that the map ever had
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._copying: Progress | None = None  # of the copy that is under way; what was asked for since has another
        self._todo: list[int] = []  # regions to be copied
        self._place = 0  # in the first of them
        self._due = [0.0] * self.regions.count  # when to look whether each can be closed
        self._closed: set[int] = set()  # those that were, the last time
        self._overwritten: list[Member] = []  # legs whose page cache may show what their disk has not
        self._left_out: UblkError | None = None  # why a leg does not come back with the others
        self._is_refused = False  # no leg takes its label: nothing may be written
        self._is_read_only = False
        self._cleaned = time.monotonic()
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="mirror")
        self._buffers = [mmap.mmap(-1, _UNIT) for _ in range(2)]
        if len(self._in_sync) > 1 and any(label.dirty):
            self.regions.behind[:] = label.dirty
            self._copy([n for n, flag in enumerate(label.dirty) if flag])

    # -- for others ------------------------------------------------------------------------

    def begin(self, target_map: Map, *, read_only: bool, create: bool) -> None:
        """Show the regions in the map, write the labels, and begin to keep them. Raises UblkError.

        Legs that were being brought back when the last daemon ended are brought back; to ``create``, so are those that
        have something else.
        """
        self._map = target_map
        self._is_read_only = read_only
        if read_only:
            self._stop_copying()
        self._use()
        try:
            self._write_labels()
        except OSError as e:
            raise UblkError(
                f"the labels of the mirror cannot be written: {e.strerror}", "the kernel log may say why"
            ) from e
        self.regions.begin(target_map)
        if not read_only:
            self.progress = self.progress or Progress(0)
            self._bring_back([member for member in self._members if self._is_to_return(member, create)])
        self._thread.start()

    def _is_to_return(self, member: Member, create: bool) -> bool:
        if member in self._in_sync or not member.leg:
            return False
        return not member.label.in_sync[member.index] if member.label else create

    def stop(self, *, clean: bool) -> None:
        """End it; ``clean``: nothing is under way any more, so that legs do not differ where they could."""
        if self._thread.is_alive():
            self._inbox.put(None)
            self._thread.join(_END)
        if self._thread.is_alive():
            _log.error("a leg of the mirror does not answer: after the next start, what may differ is copied")
            return
        if clean and self._is_whole():
            with contextlib.suppress(OSError):
                self._sync()
                self._settle(range(self.regions.count))

    def ask(self, requests: Sequence[Request]) -> None:
        """Have them answered. Any thread."""
        self._inbox.put(requests)

    def resync(self, *, force: bool) -> None:
        """Have the legs brought back that are not in sync; ``progress`` says what becomes of it. Any thread."""
        if not self.progress or self.progress.is_over:
            self.progress = Progress(0)
        self._inbox.put(force)

    def in_sync(self) -> tuple[bool, ...]:
        """Of each leg, whether it has all that was written."""
        return self._states()

    def states(self) -> dict[Path, str]:
        """What each leg is. Any thread."""
        joining = self._joining
        return {
            member.path: "in sync" if member in self._in_sync else "resyncing" if member in joining else "out of sync"
            for member in self._members
        }

    # -- the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_over:
            try:
                self._turn()
            except Exception:
                _log.exception("the mirror's keeper failed")
                time.sleep(0.1)

    def _turn(self) -> None:
        said = self._hear(0.0 if self._todo else _PATIENCE)
        if said:
            self._obey(said)
        elif self._todo:
            self._copy_some()
        if not self._is_read_only and time.monotonic() - self._cleaned > _PATIENCE:
            self._clean()
            self._cleaned = time.monotonic()

    def _hear(self, timeout: float) -> list[Any]:
        """All that was said meanwhile."""
        said = []
        try:
            said.append(self._inbox.get(timeout=timeout) if timeout else self._inbox.get_nowait())
            while True:
                said.append(self._inbox.get_nowait())
        except queue.Empty:
            return said

    def _obey(self, said: list[Any]) -> None:
        requests = [request for what in said if isinstance(what, Sequence) for request in what]
        try:
            self._see_to(requests)
        except BaseException as e:
            for request in requests:
                if not request.answered:
                    request.fail(e.errno or errno.EIO if isinstance(e, OSError) else errno.EIO)
            raise
        finally:
            for what in said:
                if what is None:
                    self._is_over = True
                elif isinstance(what, bool):
                    self._join(force=what)

    def _see_to(self, requests: list[Request]) -> None:
        again = []
        for request in requests:
            if request.failure and not self._is_excused(request):
                continue
            again.append(request)
        self._open(
            {
                n
                for request in again
                if request.op not in (Op.READ, Op.FLUSH)
                for n in self.regions.of(request.offset, request.length)
            }
        )
        for request in again:
            request.retry()

    def _is_excused(self, request: Request) -> bool:
        """Whether a request that failed at a leg can go on without that; else it has failed."""
        failure = request.failure
        assert failure
        member = self._slots.get(failure.file)
        if request.op in (Op.DISCARD, Op.WRITE_ZEROES) and failure.errno in _CANNOT:
            request.fail(errno.EOPNOTSUPP)
            return False
        if member in self._joining:
            self._give_up_joining(member, failure.errno)
            return True
        if member not in self._in_sync:
            return True  # it has gone since then
        if len(self._in_sync) == 1:
            request.fail(failure.errno)
            return False
        self._drop(member, failure.errno)
        return True

    # -- legs that go and come -------------------------------------------------------------

    def _drop(self, member: Member, error: int) -> None:
        """Go on without it: as soon as that is written down, so that nobody takes it for good any more."""
        self._forget(member, error)
        self._write_labels()
        self._use()

    def _forget(self, member: Member, error: int) -> None:
        _log.error("%s failed: %s; the mirror goes on without it", member.path, os.strerror(error))
        self._in_sync.remove(member)
        self._changed()
        if len(self._in_sync) == 1 and not self._joining:  # the one that is left differs from nobody
            self.regions.behind[:] = bytes(self.regions.count)
            self._stop_copying(f"{member.path}: {os.strerror(error)}")

    def _give_up_joining(self, member: Member, error: int, why: str = "") -> None:
        """With it all that were to come back: what is not copied to the end is not in sync."""
        _log.error("%s failed while it was brought back: %s", member.path, os.strerror(error))
        self._joining.clear()
        self._changed()
        self._stop_copying(why or f"{member.path}: {os.strerror(error)}")
        self._use()

    def _join(self, *, force: bool) -> None:
        """Write to the legs that are not in sync from now on, and begin to copy what they missed."""
        assert self.progress
        if self._joining:
            return
        self._left_out = None
        try:
            if self._is_refused:
                self._write_labels()
            returning = [
                member for member in self._members if member not in self._in_sync and self._find(member, force)
            ]
            self._bring_back(returning)
        except OSError as e:
            self._left_out = UblkError(f"no leg takes its label: {e.strerror}", "the kernel log (dmesg) may say why")
            self._joining.clear()
        if self._joining or self._copying:
            return
        if behind := [n for n in range(self.regions.count) if self.regions.behind[n]]:
            self._copy(behind)  # what is left of a copy that was given up
        elif not self.progress.is_over:
            self._end(self.progress)

    def _find(self, member: Member, force: bool) -> bool:
        """Open a leg's file; if it cannot be used, that is told when all others are back."""
        try:
            self._reopen(member, force)
        except UblkError as e:
            self._left_out = self._left_out or e
            return False
        return True

    def _bring_back(self, returning: list[Member]) -> None:
        """Write to these legs from now on, and begin to copy what they missed. OSError."""
        whole = False
        self._overwritten = []
        for member in returning:
            try:
                is_blank = self._mark(member)
            except OSError as e:
                self._left_out = UblkError(f"{member.path} does not take its label: {e.strerror}")
                continue
            assert member.leg
            if not is_blank and not member.leg.backing.direct:
                self._overwritten.append(member)
            whole |= is_blank
            self._joining.append(member)
        if not self._joining:
            return
        self._use()
        dirty = self.regions.dirty
        self._copy([n for n in range(self.regions.count) if whole or dirty[n]])
        _log.info("bringing %s back", ", ".join(str(member.path) for member in self._joining))
        self._changed()
        if not self._todo:
            self._finish()

    def _mark(self, member: Member) -> bool:
        """Have it say, until it is back, that it has not all data. Whether it has to be copied as a whole. OSError."""
        found, index = member.label, member.index
        is_blank = not found or (found.event <= 1 and not found.in_sync[index])
        # Of two records, the one with the higher event counts.
        for event in (0, 1) if is_blank or not found else (found.event,):
            label = replace(self._label.of(index), event=event, in_sync=self._states())
            assert member.leg
            mirror_label.write(member.leg.backing.fd, member.leg.backing.end, label)
            member.label = label
        return is_blank

    def _use(self) -> None:
        """Have the map use the legs that there are now."""
        used = [*self._in_sync, *self._joining]
        slots = self._map.add_files([member.leg.open_file for member in used if member.leg])
        self._slots.update(zip(slots, used, strict=True))
        count = len(self._in_sync)
        if self._is_refused:
            self.regions.refuse(slots[:count])
        else:
            self.regions.use(slots[:count], slots[count:])

    # -- copying ---------------------------------------------------------------------------

    def _copy(self, regions: list[int]) -> None:
        self._todo, self._place = regions, 0
        size = sum(min(self.regions.region, self.regions.size - n * self.regions.region) for n in regions)
        if self.progress and not self.progress.is_over:
            self.progress.total = size
        else:
            self.progress = Progress(size)
        self._copying = self.progress

    def _stop_copying(self, error: str = "") -> None:
        self._todo = []
        if self._copying:
            self._end(self._copying, error)
            self._copying = None

    def _end(self, progress: Progress, error: str = "") -> None:
        if self._left_out and not error:
            progress.error, progress.hint = self._left_out.message, self._left_out.hint
        else:
            progress.error = error
        progress.is_over = True

    def _copy_some(self) -> None:
        """The next unit, from the first leg to all others. Writes to it wait until it is through."""
        region = self._todo[0]
        start = region * self.regions.region + self._place
        length = min(_UNIT, self.regions.size - start)
        try:
            self.regions.lock(start, length)
            self._copy_unit(start, length)
        except TimeoutError:
            _log.warning("requests to the mirror take long; copying waits for them")
            self.regions.show([region])
            return
        except _AnotherLegError:  # that has unlocked it
            self.regions.show([region])
            return
        self._place += length
        if self._copying:
            self._copying.done += length
        if self._place < self.regions.region and start + length < self.regions.size:
            self.regions.show([region])
            return
        self._place = 0
        if self._todo:
            self._todo.pop(0)
            self.regions.behind[region] = 0
        self.regions.show([region])
        if self._copying and not self._todo:
            self._finish()

    def _copy_unit(self, start: int, length: int) -> None:
        source, *others = [*self._in_sync, *self._joining]
        data, there = (memoryview(buffer)[:length] for buffer in self._buffers)
        try:
            _read(source, data, start)
        except OSError as e:
            if len(self._in_sync) > 1:
                self._drop(source, e.errno or errno.EIO)
                raise _AnotherLegError from e
            why = f"{source.path} cannot be read: {e.strerror}"
            if self._joining:
                self._give_up_joining(self._joining[0], e.errno or errno.EIO, why)
            self._stop_copying(why)
            return
        for member in others:
            try:
                _read(member, there, start)
                if there != data or member in self._overwritten:
                    _write(member, data, start)
            except OSError as e:
                if member in self._joining:
                    self._give_up_joining(member, e.errno or errno.EIO)
                    return
                self._drop(member, e.errno or errno.EIO)
                raise _AnotherLegError from e

    def _finish(self) -> None:
        """All is copied: who was brought back is as good as the others, once that is durable.

        What the others have is not made durable here, so that none of their errors is lost to who flushes: regions stay
        dirty until all legs are.
        """
        for member in list(self._joining):
            assert member.leg
            try:
                os.fdatasync(member.leg.backing.fd)
            except OSError as e:
                self._give_up_joining(member, e.errno or errno.EIO)
                return
        if self._joining:
            _log.info("%s back in sync", ", ".join(str(member.path) for member in self._joining))
            self._in_sync = sorted([*self._in_sync, *self._joining], key=lambda member: member.index)
            self._joining = []
            self._write_labels()
            self._use()
            self._changed()
        self._stop_copying()

    # -- dirty regions ---------------------------------------------------------------------

    def _open(self, regions: Iterable[int]) -> None:
        """Let writes there go without asking, once the labels say that legs may differ."""
        closed = [n for n in regions if not self.regions.open[n]]
        for n in closed:  # one that is opened again at once is written to all the time
            self._due[n] = time.monotonic() + (_HOT if n in self._closed else _PATIENCE)
        if clean := [n for n in closed if not self.regions.dirty[n]]:
            for n in clean:
                self.regions.dirty[n] = 1
            try:
                self._write_labels()
            except OSError:
                for n in clean:
                    self.regions.dirty[n] = 0
                raise
        for n in closed:
            self.regions.open[n] = 1
        self.regions.show(closed)

    def _is_whole(self) -> bool:
        """Whether all legs are in sync: what others miss has to stay known."""
        return len(self._in_sync) == len(self._members) and not self._todo and not any(self.regions.behind)

    def _clean(self) -> None:
        """Take back the bits of regions that nobody writes to while all legs are made durable."""
        regions, now = self.regions, time.monotonic()
        self._closed = {n for n in range(regions.count) if regions.dirty[n] and self._due[n] <= now}
        if not self._closed or not self._is_whole():
            return
        with contextlib.suppress(OSError):
            self._sync()  # most of it, while writes go on
            for n in self._closed:
                regions.open[n] = 0
            regions.show(self._closed)
            try:
                self._map.drain(0, regions.size, _DRAIN)
                self._sync()
            except OSError:
                self._open(self._closed)
                raise
            self._obey(self._hear(0.0))
            if self._is_whole():
                self._settle(n for n in self._closed if not regions.open[n])

    def _settle(self, regions: Iterable[int]) -> None:
        """Legs are alike in these. OSError."""
        for n in regions:
            self.regions.dirty[n] = self.regions.open[n] = 0
        self._write_labels()

    def _sync(self) -> None:
        """Have all that was written durable. OSError when a leg has failed, and was dropped."""
        for member in list(self._in_sync):
            assert member.leg
            try:
                os.fdatasync(member.leg.backing.fd)
            except OSError as e:
                if len(self._in_sync) > 1:
                    self._drop(member, e.errno or errno.EIO)
                raise

    def _write_labels(self) -> None:
        """On all legs that are in sync, with one event more; those that do not take it are dropped.

        OSError if none does. Then nobody would know who has what is written from now on, so nothing is.
        """
        was_refused, others = self._is_refused, 0
        while not self._is_read_only:
            dirty = bytes(self.regions.dirty)
            self._label = replace(self._label, event=self._label.event + 1, in_sync=self._states(), dirty=dirty)
            failed = [(member, e) for member in self._in_sync if (e := self._write_label(member))]
            if not failed:
                break
            if len(failed) == len(self._in_sync):
                _log.critical("no leg of the mirror takes its label: all writes fail from now on")
                self._is_refused = True
                self._use()
                raise failed[0][1]
            for member, e in failed:
                self._forget(member, e.errno or errno.EIO)
            others += 1
        self._is_refused = False
        if was_refused or others:
            self._use()

    def _states(self) -> tuple[bool, ...]:
        return tuple(member in self._in_sync for member in self._members)

    def _write_label(self, member: Member) -> OSError | None:
        assert member.leg
        label = self._label.of(member.index)
        try:
            mirror_label.write(member.leg.backing.fd, member.leg.backing.end, label)
        except OSError as e:
            return e
        member.label = label
        return None


class _AnotherLegError(Exception):
    """A leg was dropped, and the map is another: what was to be copied is to be locked and copied anew."""


def _read(member: Member, buffer: memoryview, start: int) -> None:
    assert member.leg
    if os.preadv(member.leg.backing.fd, [buffer], start) != len(buffer):
        raise OSError(errno.EIO, "a short read")


def _write(member: Member, buffer: memoryview, start: int) -> None:
    assert member.leg
    if os.pwritev(member.leg.backing.fd, [buffer], start) != len(buffer):
        raise OSError(errno.EIO, "a short write")
