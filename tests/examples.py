"""The examples, and the servers that two of them ask: for the tests with and without a kernel."""

from __future__ import annotations

import re
import socketserver
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeVar

from ublkpy.tgt import load
from ublkpy.tgt.base import Target

Server = TypeVar("Server", bound=socketserver.BaseServer)

FOLDER = Path(__file__).parents[1] / "examples"
FILES = sorted(FOLDER.glob("*.py"))


def path(name: str) -> str:
    return str(FOLDER / f"{name}.py")


def example(name: str, **options: object) -> Target:
    """One of them, with parsed options."""
    return load.find(path(name))(options)


class WebServer(ThreadingHTTPServer):
    """Serves one file, whatever is asked for; ``ranges`` are those that were, None for a request without."""

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _WebRequest)
        self.content = content
        self.ranges: list[tuple[int, int] | None] = []
        self.fails = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/disk.img?version=1"


class _WebRequest(BaseHTTPRequestHandler):
    server: WebServer

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def do_GET(self) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        wanted = (int(found[1]), int(found[2])) if found else None
        self.server.ranges.append(wanted)
        content = self.server.content
        if self.server.fails or (wanted and wanted[0] >= len(content)):
            self.send_error(503 if self.server.fails else 416)
            return
        data = content[wanted[0] : wanted[1] + 1] if wanted else content
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(data)))
        if wanted:
            self.send_header("Content-Range", f"bytes {wanted[0]}-{wanted[0] + len(data) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_args: object) -> None:
        """Nothing on stderr."""


class NbdServer(socketserver.ThreadingTCPServer):
    """An NBD server (fixed newstyle, NBD_OPT_EXPORT_NAME) of ``data``; ``commands`` are those that came."""

    daemon_threads = True

    def __init__(self, size: int) -> None:
        super().__init__(("127.0.0.1", 0), _NbdConnection)
        self.data = bytearray(size)
        self.commands: list[int] = []

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class _NbdConnection(socketserver.StreamRequestHandler):
    server: NbdServer

    def handle(self) -> None:
        self.wfile.write(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        flags, magic, option, length = struct.unpack(">I8sII", self.rfile.read(20))
        assert (flags, magic, option, length) == (3, b"IHAVEOPT", 1, 0)
        self.wfile.write(struct.pack(">QH", len(self.server.data), 1 | 4))
        while head := self.rfile.read(28):
            magic, _, command, handle, offset, length = struct.unpack(">IHHQQI", head)
            assert magic == 0x25609513
            data, place = b"", slice(offset, offset + length)
            if command == 0:
                data = bytes(self.server.data[place])
            elif command == 1:
                self.server.data[place] = self.rfile.read(length)
            self.server.commands.append(command)
            self.wfile.write(struct.pack(">IIQ", 0x67446698, 0, handle) + data)


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """A server that runs in a thread of this process."""
    thread = threading.Thread(target=server.serve_forever, args=[0.05])
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
