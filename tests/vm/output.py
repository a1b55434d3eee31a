"""Several runs at once, printed one after the other."""

import sys
from typing import BinaryIO

_FAILURES = (b"FAILED ", b"ERROR ")  # how pytest's summary begins the line of each


class Lane:
    """What one run prints: kept back until its turn comes, passed on as it comes from then on."""

    def __init__(self, to_stderr: bool = False) -> None:
        """With `to_stderr`, what the command prints is only talk."""
        self._to_stderr = to_stderr
        self._live = False
        self._kept: list[tuple[BinaryIO, bytes]] = []
        self._line = b""
        self.failures: list[str] = []  # the lines in which pytest names what failed

    def out(self, data: bytes) -> None:
        *lines, self._line = (self._line + data).split(b"\n")
        self.failures += (line.decode(errors="replace").rstrip() for line in lines if line.startswith(_FAILURES))
        self._put((sys.stderr if self._to_stderr else sys.stdout).buffer, data)

    def err(self, text: str) -> None:
        self._put(sys.stderr.buffer, f"tests.vm: {text.rstrip()}\n".encode())

    def go_live(self) -> None:
        self._live = True
        for stream, data in self._kept:
            self._put(stream, data)
        self._kept.clear()

    def _put(self, stream: BinaryIO, data: bytes) -> None:
        if not data:
            return
        if self._live:
            stream.write(data)
            stream.flush()
        else:
            self._kept.append((stream, data))
