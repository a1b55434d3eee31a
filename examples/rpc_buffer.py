"""A disk on an NBD server: each write lands in the message that is then sent as it is.
In other modes than get-data it works, too, and copies.

    nbdkit --port 10809 memory 1G
    ublk add examples/rpc_buffer.py --port 10809 --mode get-data
"""

import socket
import struct
from threading import Lock

from ublkpy import Geometry, Target, main, option

HEAD = struct.Struct(">IHHQQI")  # magic, flags, command, handle, offset, length
MAGIC, READ, WRITE, FLUSH = 0x25609513, 0, 1, 3


class RpcDisk(Target):
    """A disk on an NBD server."""

    host: str = option("localhost", help="where it runs")
    port: int = option(10809, help="where it listens", minimum=1, maximum=65535)

    def open(self) -> Geometry:
        self.lock = Lock()
        self.socket = socket.create_connection((self.host, self.port))  # a file, which survives the fork
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.source = self.socket.makefile("rb")
        self.source.read(18)
        self.socket.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 0))  # the export without a name
        return Geometry(*struct.unpack(">Q2x", self.source.read(10)))

    def call(self, command: int, offset: int, length: int, message: bytearray) -> bytes:
        HEAD.pack_into(message, 0, MAGIC, 0, command, 0, offset, length)
        with self.lock:
            self.socket.sendall(message)
            if error := struct.unpack(">4xI8x", self.source.read(16))[0]:
                raise OSError(error, "said the server")
            return self.source.read(length) if command == READ else b""

    def read(self, offset: int, buf: memoryview) -> None:
        buf[:] = self.call(READ, offset, len(buf), bytearray(HEAD.size))

    def write_buffer(self, offset: int, length: int) -> memoryview:
        return memoryview(bytearray(HEAD.size + length))[HEAD.size :]

    def write(self, offset: int, buf: memoryview) -> None:
        self.call(WRITE, offset, len(buf), buf.obj if isinstance(buf.obj, bytearray) else bytearray(HEAD.size) + buf)

    def flush(self) -> None:
        self.call(FLUSH, 0, 0, bytearray(HEAD.size))

    def close(self) -> None:
        self.source.close()
        self.socket.close()


if __name__ == "__main__":
    main(RpcDisk)
