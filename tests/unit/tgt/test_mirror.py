"""Which files make a mirror, and which do not: opened, and without a device."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ublkpy.errors import BusyError, ConfigError, UblkError
from ublkpy.tgt import backing, handlers, mirror_keeper, mirror_label
from ublkpy.tgt.base import Geometry, Progress
from ublkpy.tgt.disk import DiskOptions
from ublkpy.tgt.mirror import MirrorTarget
from ublkpy.tgt.mirror_assembly import Member
from ublkpy.tgt.mirror_keeper import Keeper
from ublkpy.tgt.mirror_label import ROOM, Label
from ublkpy.uring.map import Error
from ublkpy.uring.uapi import Op

MIB = 1 << 20


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for those who hold a file: here they hold it until they are told."""
    monkeypatch.setattr(backing, "_RELEASE", 0.0)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, ...]:
    return blank(tmp_path, "a", "b")


def blank(folder: Path, *names: str, size: int = 8 * MIB) -> tuple[Path, ...]:
    found = tuple(folder / name for name in names)
    for file in found:
        file.touch()
        os.truncate(file, size)
    return found


@contextmanager
def opened(
    files: tuple[Path, ...], *, read_only: bool = False, **options: Any
) -> Iterator[tuple[MirrorTarget, Geometry]]:
    target = MirrorTarget({"files": files, **options})
    target.disk = DiskOptions({"read_only": read_only})
    found = target.open()
    try:
        yield target, found
    finally:
        target.close()


def serve(files: tuple[Path, ...], **options: Any) -> None:
    """A device of it, for a moment."""
    with opened(files, **options) as (target, found):
        made = handlers.make_map(target, found.size)
        target.stop()
        made.close()


def refused(files: tuple[Path, ...], **options: Any) -> UblkError:
    before = set(Path("/proc/self/fd").iterdir())
    with pytest.raises(UblkError) as caught, opened(files, **options):
        pass
    assert set(Path("/proc/self/fd").iterdir()) == before
    return caught.value


def label_of(file: Path) -> Label:
    with file.open("rb") as leg:
        found = mirror_label.read(leg.fileno(), file.stat().st_size)
    assert found
    return found


def relabel(file: Path, **changes: object) -> None:
    """Write another label, later than the one that is there."""
    label = label_of(file)
    with file.open("r+b") as leg:
        changed = replace(label, **{"event": label.event + 1, **changes})  # type: ignore[arg-type]
        mirror_label.write(leg.fileno(), file.stat().st_size, changed)


def over(target: MirrorTarget) -> Progress:
    """What was said of its copy in the end."""
    deadline = time.monotonic() + 10
    while not (progress := target.progress()) or not progress.is_over:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return progress


def test_blank_files_are_alike(files: tuple[Path, ...]) -> None:
    with opened(files) as (target, found):
        assert found.size == 8 * MIB - ROOM
        assert target.status()["legs"] == ["in sync", "in sync"]
        assert target.backing() == f"{files[0]}, {files[1]}"
    assert all(file.stat().st_blocks == 0 for file in files), "opening writes nothing"
    serve(files)
    first, second = map(label_of, files)
    assert first.of(1) == second
    assert (first.in_sync, first.event > 0, any(first.dirty)) == ((True, True), True, False)


def test_the_smallest_leg_counts(tmp_path: Path) -> None:
    (large,) = blank(tmp_path, "large", size=20 * MIB + 777)
    with opened((large, *blank(tmp_path, "small"))) as (_, found):
        assert found.size == 8 * MIB - ROOM


def test_files_with_data_are_not_overwritten_unless_that_is_said(files: tuple[Path, ...]) -> None:
    files[1].write_bytes(b"x" * 8 * MIB)
    error = refused(files)
    assert error.message == f"{files[1]} is not blank, and no leg of a mirror yet"
    assert "--create" in error.hint
    with opened(files, create=True) as (target, _):
        assert target.status()["legs"] == ["in sync", "out of sync"], "all of it is to be copied"


def test_the_same_file_twice(files: tuple[Path, ...]) -> None:
    link = files[0].with_name("link")
    link.symlink_to(files[0])
    assert isinstance(refused((files[0], link)), ConfigError)


@pytest.mark.parametrize("options", [{}, {"degraded": True}])
def test_a_missing_leg_of_a_new_one(files: tuple[Path, ...], options: dict[str, object]) -> None:
    assert refused((*files, files[0].with_name("none")), **options).message.endswith("/none does not exist")


def test_a_leg_too_small_for_a_label(tmp_path: Path) -> None:
    small = blank(tmp_path, "a", "b", size=ROOM)
    assert refused(small).message == f"{small[0]} is too small for a leg of a mirror, whose label takes 64K"


def test_order_does_not_matter(files: tuple[Path, ...]) -> None:
    serve(files)
    with opened(files[::-1]) as (target, _):
        assert [member.path for member in target._assembly.members] == list(files)


def test_a_missing_leg(files: tuple[Path, ...]) -> None:
    serve(files)
    files[1].unlink()
    error = refused(files)
    assert error.message.startswith(f"a leg of the mirror is missing, which had all data when {files[0]} saw it last")
    assert "--degraded" in error.hint
    with opened(files, degraded=True) as (target, _):
        assert target.status()["legs"] == ["in sync", "out of sync"]
    serve(files, degraded=True)
    with opened(files) as (target, _):  # once it is known, it need not be said again
        assert target.status()["legs"] == ["in sync", "out of sync"]


def test_a_blank_file_in_the_place_of_a_leg(files: tuple[Path, ...]) -> None:
    serve(files)
    files[0].unlink()
    blank(files[0].parent, "a")
    assert "its file has no label" in refused(files).message
    with opened(files, degraded=True) as (target, _):
        assert target.status()["legs"] == ["out of sync", "in sync"]


def test_a_file_with_data_in_the_place_of_a_leg(files: tuple[Path, ...]) -> None:
    serve(files)
    files[0].write_bytes(b"x" * 8 * MIB)
    assert refused(files, degraded=True).message == f"{files[0]} is not blank, and no leg of this mirror"
    with opened(files, degraded=True, create=True):
        pass


def test_a_small_file_in_the_place_of_a_leg(files: tuple[Path, ...]) -> None:
    serve(files)
    files[0].unlink()
    blank(files[0].parent, "a", size=4 * MIB)
    error = refused(files, degraded=True)
    assert "too little for the 7.93M" in error.message
    assert error.hint == f"truncate -s {8 * MIB} {files[0]}"


def test_a_leg_of_another_mirror(files: tuple[Path, ...], tmp_path: Path) -> None:
    serve(files)
    others = blank(tmp_path, "c", "d")
    serve(others)
    relabel(others[0], event=1)  # so that the other one is the newest
    with files[0].open("r+b") as file:
        file.write(b"data")
    relabel(files[1], event=90)
    hint = refused((others[0], files[1])).hint
    assert f"of={others[0]}" in hint
    before = files[1].read_bytes()
    assert os.system(f"{hint.partition(': ')[2]} 2>/dev/null") == 0
    with others[0].open("rb") as file:
        assert mirror_label.read(file.fileno(), 8 * MIB) is None
    assert others[0].stat().st_size == 8 * MIB
    assert files[1].read_bytes() == before


def test_another_number_of_legs(files: tuple[Path, ...], tmp_path: Path) -> None:
    serve(files)
    assert "is of a mirror of 2 legs, not 3" in refused((*files, *blank(tmp_path, "c"))).message


def test_a_copy_of_a_leg(files: tuple[Path, ...], tmp_path: Path) -> None:
    serve(files)
    shutil.copy(files[0], tmp_path / "copy")
    assert "are copies of one leg" in refused((files[0], tmp_path / "copy")).message


def test_legs_that_were_used_apart(files: tuple[Path, ...]) -> None:
    serve(files)
    kept = files[0].read_bytes(), files[1].read_bytes()
    files[1].unlink()
    serve(files, degraded=True)
    first = files[0].read_bytes()
    files[0].unlink()
    files[1].write_bytes(kept[1])
    serve(files, degraded=True)
    files[0].write_bytes(first)
    error = refused(files)
    assert "have been used apart, and each has data that the other has not" in error.message
    assert f"of={files[0]}" in error.hint
    assert f"of={files[1]}" in error.hint


def test_a_leg_that_was_dropped_and_is_older(files: tuple[Path, ...]) -> None:
    serve(files)
    old = files[1].read_bytes()
    files[1].unlink()
    serve(files, degraded=True)
    files[1].write_bytes(old)
    with opened(files) as (target, _):
        assert target.status()["legs"] == ["in sync", "out of sync"]


def test_a_crash_between_two_labels(files: tuple[Path, ...]) -> None:
    """The newer one counts, and its owner says who is in sync."""
    serve(files)
    dirty = bytearray(label_of(files[0]).dirty)
    dirty[3] = 1
    relabel(files[0], dirty=bytes(dirty))
    with opened(files) as (target, _):
        assert target.status()["legs"] == ["in sync", "in sync"]
        assert target._assembly.label.dirty == bytes(dirty)


def test_read_only_changes_nothing(files: tuple[Path, ...]) -> None:
    serve(files)
    before = [file.read_bytes() for file in files]
    with opened(files, read_only=True) as (target, found):
        made = handlers.make_map(target, found.size)
        with pytest.raises(UblkError, match="read-only"):
            target.resync(force=False)
        target.stop()
        made.close()
    assert [file.read_bytes() for file in files] == before


def test_a_copy_that_was_given_up_is_taken_up(files: tuple[Path, ...]) -> None:
    target = MirrorTarget({"files": files})
    target.disk = DiskOptions()
    found = target.open()
    made = handlers.make_map(target, found.size)
    keeper = target._keeper
    assert keeper
    with files[0].open("r+b") as first:
        first.seek(2 * MIB)
        first.write(b"new")
    keeper.regions.dirty[2] = keeper.regions.behind[2] = 1
    target.resync(force=False)
    progress = over(target)
    assert (progress.error, progress.done, keeper.regions.behind[2]) == ("", MIB, 0)
    target.stop()
    made.close()
    target.close()
    assert files[1].read_bytes()[2 * MIB : 2 * MIB + 3] == b"new"


@pytest.mark.logs
def test_a_resync_is_not_told_of_what_failed_before_it(files: tuple[Path, ...]) -> None:
    """It is asked for as soon as the leg shows as lost, while the mirror sees to the rest of that."""
    with opened(files) as (target, found):
        made = handlers.make_map(target, found.size)
        keeper = target._keeper
        assert keeper
        keeper._changed = lambda: target.resync(force=False)
        keeper._inbox.put([lost(keeper, file=1)])
        assert over(target).error == ""
        assert target.status()["legs"] == ["in sync", "in sync"]
        keeper._changed = lambda: None
        target.stop()
        made.close()


@pytest.mark.logs
@pytest.mark.parametrize("names", ["ab", "abc"])
def test_a_leg_that_fails_at_the_end_of_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: str) -> None:
    """The copy ends all the same, without that leg."""
    files = blank(tmp_path, *names)
    serve(files)
    with live(files) as target:
        lose(target, 1)
        syncs_fail(monkeypatch, files[1])
        target.resync(force=False)
        assert over(target).error == f"{files[1]}: Input/output error"
        assert target.status()["legs"] == ["in sync", "out of sync", "in sync"][: len(names)]


@pytest.mark.logs
def test_a_copy_takes_no_error_from_who_flushes(files: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told once, of the leg that has all data: to a client, or to nobody who could tell one."""
    serve(files)
    with live(files) as target:
        lose(target, 1)
        syncs_fail(monkeypatch, files[0])
        target.resync(force=False)
        assert over(target).error == ""
        assert target.status()["legs"] == ["in sync", "in sync"]


@pytest.mark.logs
@pytest.mark.parametrize("force", [False, True])
def test_a_leg_that_was_used_alone_comes_back_by_force_alone(files: tuple[Path, ...], force: bool) -> None:
    first, second = files
    hidden = first.with_name("hidden")
    serve(files)
    second.rename(hidden)
    with live(files, degraded=True) as target:
        write(target, 3 * MIB, b"first", [first])
    hidden.rename(second)
    first.rename(hidden)
    with live(files, degraded=True) as target:
        write(target, 5 * MIB, b"second", [second])
        hidden.rename(first)
        target.resync(force=force)
        assert ("has been used alone" in over(target).error) == (not force)
        assert target.status()["legs"] == ["in sync" if force else "out of sync", "in sync"]
    if force:
        assert first.read_bytes()[: 7 * MIB] == second.read_bytes()[: 7 * MIB]


@pytest.mark.logs
def test_a_new_mirror_whose_first_file_cannot_be_read(files: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing takes the place of its data."""
    files[0].write_bytes(b"data" * 2 * MIB)
    files[1].write_bytes(b"else" * 2 * MIB)
    read = mirror_keeper._read

    def fails(member: Member, buffer: memoryview, start: int) -> None:
        if member.path == files[0] and start == 4 * MIB:
            raise OSError(errno.EIO, "bad sector")
        read(member, buffer, start)

    monkeypatch.setattr(mirror_keeper, "_read", fails)
    with live(files, create=True) as target:
        assert "bad sector" in over(target).error
        assert target.status()["legs"] == ["in sync", "out of sync"]
    assert label_of(files[1]).in_sync == (True, False)


@pytest.mark.logs
def test_the_map_goes_without_a_leg_when_a_label_says_so(
    files: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with live(files) as target:
        keeper = keeper_of(target)
        real, used = mirror_label.write, []

        def fails(fd: int, end: int, label: Label) -> None:
            if os.fstat(fd).st_ino == files[0].stat().st_ino:
                raise OSError(errno.EIO, "no label")
            used.append(len(keeper.regions._legs))
            real(fd, end, label)

        monkeypatch.setattr(mirror_label, "write", fails)
        write(target, 0, b"x", [files[1]])
        assert used == [2, 2]
        assert len(keeper.regions._legs) == 1


@pytest.mark.logs
def test_no_leg_takes_its_label(files: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written, by whatever way, until one does."""
    with live(files) as target:
        keeper = keeper_of(target)
        write(target, 0, b"x", files)
        real, broken = mirror_label.write, [True]

        def fails(fd: int, end: int, label: Label) -> None:
            if broken:
                raise OSError(errno.EIO, "no label")
            real(fd, end, label)

        monkeypatch.setattr(mirror_label, "write", fails)
        keeper.ask([lost(keeper, file=0)])
        until(lambda: keeper._is_refused)
        (extent,) = keeper._map.extents(0, 512)
        assert extent.routing.write == Error(errno.EIO)
        assert [keeper._slots[n].path for n in keeper.regions._legs] == [files[1]]
        target.resync(force=False)
        assert "no leg takes its label" in over(target).error
        assert keeper._is_refused
        broken.clear()
        target.resync(force=False)
        assert over(target).error == ""
        assert (keeper._is_refused, target.status()["legs"]) == (False, ["in sync", "in sync"])


@pytest.mark.logs
def test_a_leg_of_a_read_only_mirror_fails(files: tuple[Path, ...]) -> None:
    serve(files)
    before = [file.read_bytes() for file in files]
    with live(files, read_only=True) as target:
        keeper = keeper_of(target)
        answered = threading.Event()
        failed = lost(keeper, file=0)
        failed.op, failed.retry = Op.READ, answered.set
        target.upcall([failed])
        assert answered.wait(10)
        assert target.status()["legs"] == ["out of sync", "in sync"]
    assert [file.read_bytes() for file in files] == before


def test_a_leg_that_is_locked_is_not_missing(files: tuple[Path, ...]) -> None:
    serve(files)
    with files[1].open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert isinstance(refused(files, degraded=True), BusyError)


def test_the_next_daemon_is_not_told_what_was_said_once(files: tuple[Path, ...]) -> None:
    with opened(files, create=True, degraded=True) as (target, _):
        assert set(target.dump()) == {"files"}


@pytest.mark.logs
def test_only_a_leg_that_was_being_brought_back(files: tuple[Path, ...]) -> None:
    serve(files)
    relabel(files[1], event=1, in_sync=(True, False))
    with files[1].open("r+b") as leg:
        mirror_label.write(leg.fileno(), 8 * MIB, replace(label_of(files[1]), event=0))
    files[0].unlink()
    assert "was being brought back" in refused(files, degraded=True).message


@pytest.mark.logs
def test_a_leg_that_was_being_brought_back_is_brought_back(files: tuple[Path, ...]) -> None:
    serve(files)
    files[1].unlink()
    serve(files, degraded=True)
    blank(files[0].parent, "b")
    with live(files) as target:
        keeper = keeper_of(target)
        keeper._copy_some = lambda: time.sleep(0.01)  # type: ignore[method-assign]
        write(target, 0, b"new", files[:1])
        target.resync(force=False)
        until(lambda: target.status()["legs"] == ["in sync", "resyncing"])
    with live(files) as target:
        assert over(target).error == ""
        assert target.status()["legs"] == ["in sync", "in sync"]
    assert files[1].read_bytes()[:3] == b"new"


@pytest.mark.logs
def test_a_label_that_cannot_be_read(files: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    serve(files)
    real = os.preadv
    inode = files[0].stat().st_ino

    def fails(fd: int, buffers: Any, offset: int) -> int:
        if os.fstat(fd).st_ino == inode:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", fails)
    assert f"the label of {files[0]} cannot be read: Input/output error" in refused(files).message
    with opened(files, degraded=True) as (target, _):
        assert target.status()["legs"] == ["out of sync", "in sync"]


@pytest.mark.logs
def test_what_resync_advises_helps(files: tuple[Path, ...], tmp_path: Path) -> None:
    serve(files)
    files[1].unlink()
    others = blank(tmp_path, "c", "d")
    serve(others)
    with live(files, degraded=True) as target:
        others[0].rename(files[1])
        target.resync(force=True)
        progress = over(target)
        assert "is a leg of another mirror" in progress.error
        subprocess.run(progress.hint.partition(": ")[2], shell=True, check=True, stderr=subprocess.DEVNULL)
        os.truncate(files[1], 4 * MIB)
        target.resync(force=True)
        progress = over(target)
        assert "too little for" in progress.error
        subprocess.run(progress.hint, shell=True, check=True)
        target.resync(force=True)
        assert over(target).error == ""


@pytest.mark.logs
def test_a_leg_that_is_missing_keeps_no_other_from_coming_back(tmp_path: Path) -> None:
    files = blank(tmp_path, "a", "b", "c")
    serve(files)
    hidden = files[2].rename(tmp_path / "hidden")
    files[1].unlink()
    with live(files, degraded=True) as target:
        hidden.rename(files[2])
        target.resync(force=False)
        assert over(target).error.endswith("/b does not exist")
        assert target.status()["legs"] == ["in sync", "out of sync", "in sync"]


@contextmanager
def live(files: tuple[Path, ...], **options: Any) -> Iterator[MirrorTarget]:
    """A device of it."""
    with opened(files, **options) as (target, found):
        made = handlers.make_map(target, found.size)
        try:
            yield target
        finally:
            target.stop()
            made.close()


def keeper_of(target: MirrorTarget) -> Keeper:
    assert target._keeper
    return target._keeper


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lose(target: MirrorTarget, file: int) -> None:
    keeper = keeper_of(target)
    keeper.ask([lost(keeper, file)])
    until(lambda: "out of sync" in str(target.status()["legs"]))


def write(target: MirrorTarget, offset: int, data: bytes, files: Sequence[Path]) -> None:
    """As a device does: it asks, and then writes to these."""
    answered = threading.Event()
    asked: Any = SimpleNamespace(
        op=Op.WRITE, offset=offset, length=len(data), answered=False, failure=None, retry=answered.set
    )
    keeper_of(target).ask([asked])
    assert answered.wait(10)
    for file in files:
        with file.open("r+b") as leg:
            leg.seek(offset)
            leg.write(data)


def syncs_fail(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    fdatasync = os.fdatasync

    def fails(fd: int) -> None:
        if os.fstat(fd).st_ino == file.stat().st_ino:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fdatasync(fd)

    monkeypatch.setattr(os, "fdatasync", fails)


def lost(keeper: Keeper, file: int) -> Any:
    """A write that has failed at this file of the map."""
    assert file in keeper._slots
    return SimpleNamespace(
        op=Op.WRITE,
        offset=0,
        length=4096,
        answered=False,
        failure=SimpleNamespace(file=file, errno=errno.EIO),
        retry=lambda: None,
        fail=lambda error: None,
    )
