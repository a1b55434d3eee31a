"""Where a zoned disk lives: a folder with a file for its data and one for its zones, or memory."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence
from pathlib import Path

from ublkpy.errors import BusyError, UblkError
from ublkpy.tgt import zone_table
from ublkpy.tgt.backing import Backing, check_free
from ublkpy.tgt.options import exact_size
from ublkpy.tgt.zone_rules import BLOCK, Layout, State
from ublkpy.uring import libc
from ublkpy.uring.zones import ZoneCond

_DATA, _ZONES = "data", "zones"


class Store:
    """The two files, open until ``close``: a byte of the disk is at its place in ``data``."""

    def __init__(self, data: int, table: int, *, in_memory: bool) -> None:
        self.data = data
        self.table = table
        self.in_memory = in_memory
        """Whether reading and writing the data waits for no device."""

    def close(self) -> None:
        os.close(self.data)
        os.close(self.table)

    def clear(self, layout: Layout, states: Sequence[State]) -> None:
        """Nothing is above a write pointer, whatever a daemon, or the machine, that died has left there. OSError."""
        start = end = 0
        for zone, state in enumerate(states):
            above = (zone + (state.cond is ZoneCond.NOT_WP)) * layout.zone_size + state.wp
            if above > end:  # not where the range that is empty so far ends
                self._punch(start, end)
                start = above
            end = (zone + 1) * layout.zone_size
        self._punch(start, end)

    def _punch(self, start: int, end: int) -> None:
        if start < end:
            libc.punch_hole(self.data, start, end - start)


def in_memory(layout: Layout) -> Store:
    """A new disk that goes with its files. OSError."""
    store = Store(os.memfd_create("zoned data"), os.memfd_create("zoned zones"), in_memory=True)
    os.ftruncate(store.data, layout.size)
    zone_table.create(store.table, layout)
    return store


def open_folder(folder: Path, *, read_only: bool) -> tuple[Store, zone_table.Found] | None:
    """The disk in a folder; None where there is none, and one can be made. Nothing is changed. Raises UblkError,
    BusyError while another device has it.
    """
    if not _is_there(folder):
        if read_only:
            raise UblkError(
                f"there is no zoned disk in {folder}, and none is made that is read-only",
                "make it without --read-only first",
            )
        return None
    data = _open_data(folder / _DATA, read_only=read_only)
    try:
        table = _open(folder / _ZONES, os.O_RDONLY if read_only else os.O_RDWR)
        try:
            found = zone_table.read(table, folder / _ZONES)
            if data.end != found.layout.size:
                raise UblkError(
                    f"{data.path} has {exact_size(data.end)}, but the disk has {exact_size(found.layout.size)}",
                    f"bring back {folder} from a copy",
                )
            data.check_space()
            return Store(data.fd, table, in_memory=data.in_memory), found
        except BaseException:
            os.close(table)
            raise
    except BaseException:
        data.close()
        raise


def make_folder(folder: Path, layout: Layout) -> Store:
    """A new disk in a folder that is not there, or empty. Nothing is left where that fails. Raises UblkError."""
    with contextlib.ExitStack() as undo:
        try:
            if not folder.exists():
                folder.mkdir(0o700)
                undo.callback(folder.rmdir)
            _make(folder / _DATA, layout.size, undo)
            data = _open_data(folder / _DATA, read_only=False)
            undo.callback(data.close)
            _make(folder / _ZONES, 0, undo)
            table = _open(folder / _ZONES, os.O_RDWR)
            undo.callback(os.close, table)
            zone_table.create(table, layout)
            for path in (folder / _DATA, folder / _ZONES, folder, folder.parent):
                _sync(path)
        except FileExistsError as e:
            raise BusyError(f"somebody else makes a disk in {folder}", "name another folder") from e
        except OSError as e:
            raise _cannot(f"make a disk of {exact_size(layout.size)} in {folder}", e) from e
        undo.pop_all()
        return Store(data.fd, table, in_memory=data.in_memory)


def check_new(folder: Path, layout: Layout) -> None:
    """Whether a disk can be made there. Raises UblkError."""
    if not folder.parent.is_dir():
        raise UblkError(
            f"folder {folder} cannot be made: there is no folder {folder.parent}", f"mkdir -p {folder.parent}"
        )
    check_free(folder, layout.size, os.statvfs(folder if folder.exists() else folder.parent))


def _is_there(folder: Path) -> bool:
    try:
        names = {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return False
    except NotADirectoryError as e:
        raise UblkError(
            f"{folder} is not a folder", "a zoned disk is a folder, which is made where there is none"
        ) from e
    except OSError as e:
        raise _cannot(f"open {folder}", e) from e
    if not names:
        return False
    if not names & {_DATA, _ZONES}:
        raise UblkError(
            f"folder {folder} has other files, and no zoned disk", "name one that is empty, or not there yet"
        )
    for name in (_DATA, _ZONES):
        if name not in names:
            raise UblkError(
                f"folder {folder} has half a zoned disk: there is no file {name} in it",
                f"bring that back; or, if nobody has ever written to the disk: rm -r {folder}",
            )
    return True


def _open_data(path: Path, *, read_only: bool) -> Backing:
    data = Backing(path, read_only=read_only, direct=None)
    try:
        limits = data.limits()
        if data.direct and not 0 < limits.direct_block <= BLOCK:
            data.without_direct()
        if not limits.discard_granularity:
            raise UblkError(
                f"the file system of {path.parent} is not known to free parts of a file, as a reset of a zone does",
                "put it on ext4, XFS, Btrfs, F2FS, bcachefs, ZFS or tmpfs",
            )
    except BaseException:
        data.close()
        raise
    return data


def _make(path: Path, size: int, undo: contextlib.ExitStack) -> None:
    """What a disk holds is for nobody else to read."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        undo.callback(path.unlink)
        os.ftruncate(fd, size)
    finally:
        os.close(fd)


def _sync(path: Path) -> None:
    fd = _open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as e:
        raise _cannot(f"open {path}", e) from e


def _cannot(what: str, e: OSError) -> UblkError:
    return UblkError(f"cannot {what}: {os.strerror(e.errno or errno.EIO)}")
