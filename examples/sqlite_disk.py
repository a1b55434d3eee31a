"""A disk in an SQLite file: a row for each block of 4096 bytes that was written.
A flush commits what was written before it.

    ublk add examples/sqlite_disk.py --file disk.db --size 1G
"""

import sqlite3
from contextlib import closing
from pathlib import Path
from threading import Lock

from ublkpy import Geometry, Size, Target, main, option

BLOCK = 4096
SETUP = "PRAGMA journal_mode = WAL; CREATE TABLE IF NOT EXISTS blocks (n INTEGER PRIMARY KEY, data)"


class SqliteDisk(Target):
    """A disk in an SQLite file."""

    file: Path = option(..., "-f", help="the SQLite file; made if there is none")
    size: Size = option("1G", "-s", help="size of the disk", minimum=BLOCK, multiple=BLOCK)

    def open(self) -> Geometry:
        with closing(sqlite3.connect(self.file)) as db:  # no connection survives the fork
            db.executescript(SETUP)
        return Geometry(self.size, logical_block=BLOCK)

    def start(self) -> None:
        self.db, self.lock = sqlite3.connect(self.file, check_same_thread=False), Lock()

    def read(self, offset: int, buf: memoryview) -> None:
        first, end = offset // BLOCK, (offset + len(buf)) // BLOCK
        with self.lock:
            found = dict(self.db.execute("SELECT n, data FROM blocks WHERE n >= ? AND n < ?", (first, end)))
        buf[:] = b"".join(found.get(n, bytes(BLOCK)) for n in range(first, end))

    def write(self, offset: int, buf: memoryview) -> None:
        rows = (((offset + n) // BLOCK, buf[n : n + BLOCK]) for n in range(0, len(buf), BLOCK))
        with self.lock:
            self.db.executemany("REPLACE INTO blocks VALUES (?, ?)", rows)

    def write_zeroes(self, offset: int, length: int) -> None:  # what has no row reads as zeroes
        with self.lock:
            self.db.execute("DELETE FROM blocks WHERE n >= ? AND n < ?", (offset // BLOCK, (offset + length) // BLOCK))

    discard = write_zeroes

    def flush(self) -> None:
        with self.lock:
            self.db.commit()

    def stop(self) -> None:
        self.db.commit()
        self.db.close()


if __name__ == "__main__":
    main(SqliteDisk)
