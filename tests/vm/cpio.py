"""Writes the "newc" cpio archives that Linux unpacks as its first file system."""

import stat
from collections.abc import Mapping

_HEADER = "070701" + "{:08X}" * 13
_TRAILER = "TRAILER!!!"


def archive(folders: list[str], files: Mapping[str, tuple[int, bytes]]) -> bytes:
    """Pack `folders` (parents before children) and `files`, a map from path to permissions and content."""
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in folders]
    entries += [(name, stat.S_IFREG | mode, content) for name, (mode, content) in files.items()]
    entries.append((_TRAILER, 0, b""))
    return b"".join(_entry(inode, *entry) for inode, entry in enumerate(entries, start=1))


def _entry(inode: int, name: str, mode: int, content: bytes) -> bytes:
    path = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    # inode, mode, uid, gid, links, mtime, size, device (major, minor), rdevice (major, minor), name length, checksum
    header = _HEADER.format(inode, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(path), 0)
    return _padded(header.encode() + path) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
