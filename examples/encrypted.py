"""An encrypted disk: AES-256-XTS over a file, for each block with the number of its first sector as tweak.
Needs the package cryptography. The key is made from whatever is in the key file.

    truncate -s 1G disk.img
    ublk add examples/encrypted.py --file disk.img --key-file key
"""

import hashlib
import os
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from ublkpy import Geometry, Target, UblkError, main, option

BLOCK, SECTOR, MAGIC = 4096, 512, b"ublkpy encrypted"


class EncryptedDisk(Target):
    """An encrypted disk in a file."""

    blocking = True  # it waits for the file
    file: Path = option(..., "-f", help="where it is kept")
    key_file: Path = option(..., "-k", help="a file with a password, or with anything else that is hard to guess")

    def open(self) -> Geometry:
        self.fd = os.open(self.file, os.O_RDWR)
        found, size = os.pread(self.fd, 64, 0), os.lseek(self.fd, 0, os.SEEK_END) // BLOCK * BLOCK - BLOCK
        salt = found[16:32] if any(found) else os.urandom(16)
        made = hashlib.scrypt(self.key_file.read_bytes(), salt=salt, n=2**15, r=8, p=1, maxmem=2**26, dklen=96)
        self.key, head = made[:64], MAGIC + salt + made[64:]  # the last tells a wrong key
        if size <= 0 or (any(found) and found != head):
            raise UblkError(f"this is not the key of {self.file}, or no disk", "a new one is 8192 or more zeroes")
        os.pwrite(self.fd, head, 0)
        return Geometry(size, logical_block=BLOCK)

    def crypt(self, offset: int, data: bytes | memoryview, *, encrypt: bool) -> bytearray:
        done = bytearray()
        for n in range(0, len(data), BLOCK):
            cipher = Cipher(algorithms.AES(self.key), modes.XTS(((offset + n) // SECTOR).to_bytes(16, "little")))
            done += (cipher.encryptor() if encrypt else cipher.decryptor()).update(data[n : n + BLOCK])
        return done

    def read(self, offset: int, buf: memoryview) -> None:
        buf[:] = self.crypt(offset, os.pread(self.fd, len(buf), BLOCK + offset), encrypt=False)

    def write(self, offset: int, buf: memoryview) -> None:
        if os.pwrite(self.fd, self.crypt(offset, buf, encrypt=True), BLOCK + offset) < len(buf):
            raise OSError(f"{self.file} has no space left")

    def flush(self) -> None:
        os.fdatasync(self.fd)

    def close(self) -> None:
        os.close(self.fd)


if __name__ == "__main__":
    main(EncryptedDisk)
