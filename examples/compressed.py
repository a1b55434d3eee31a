"""A compressed disk in an SQLite file: ublk add examples/compressed.py --file disk.db --size 10G

Each block of 64 KiB is a row of it, packed by the package zstandard.
"""

import sqlite3
from pathlib import Path
from threading import Lock

from zstandard import ZstdCompressor, ZstdDecompressor

from ublkpy import Geometry, Size, Target, main, option

BLOCK = 65536
SETUP = """PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;  -- a commit survives the daemon, a flush the machine
           CREATE TABLE IF NOT EXISTS packed (n INTEGER PRIMARY KEY, data)"""


class CompressedDisk(Target):
    """A disk that is kept compressed."""

    file: Path = option(..., "-f", help="the SQLite file; made if there is none")
    size: Size = option("10G", "-s", help="size of the disk", minimum=BLOCK, multiple=BLOCK)

    def open(self) -> Geometry:
        return Geometry(self.size, io_min=BLOCK)

    def start(self) -> None:  # what this raises is told to the user, too
        self.lock, self.pack, self.unpack = Lock(), ZstdCompressor(), ZstdDecompressor()
        self.db = sqlite3.connect(self.file, check_same_thread=False).executescript(SETUP).connection

    def load(self, first: int, end: int) -> memoryview:
        found = dict(self.db.execute("SELECT n, data FROM packed WHERE n >= ? AND n < ?", (first, end)))
        blocks = (self.unpack.decompress(found[n]) if n in found else bytes(BLOCK) for n in range(first, end))
        return memoryview(bytearray().join(blocks))

    def read(self, offset: int, buf: memoryview) -> None:
        with self.lock:
            buf[:] = self.load(offset // BLOCK, -(-(offset + len(buf)) // BLOCK))[offset % BLOCK :][: len(buf)]

    def write(self, offset: int, buf: memoryview) -> None:
        first, end = offset // BLOCK, -(-(offset + len(buf)) // BLOCK)
        with self.lock, self.db:
            data = self.load(first, end)
            data[offset % BLOCK :][: len(buf)] = buf
            rows = ((n, self.pack.compress(data[(n - first) * BLOCK :][:BLOCK])) for n in range(first, end))
            self.db.executemany("REPLACE INTO packed VALUES (?, ?)", rows)

    def flush(self) -> None:
        with self.lock:
            if self.db.execute("PRAGMA wal_checkpoint(FULL)").fetchone()[0]:
                raise OSError("somebody else reads the file")

    def stop(self) -> None:
        self.db.close()


if __name__ == "__main__":
    main(CompressedDisk)
