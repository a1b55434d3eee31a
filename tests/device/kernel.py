"""The running kernel: its log, its modules, its block trace."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MODULES = os.environ.get("UBLKPY_MODULES", "")
HERE = os.environ.get("UBLKPY_KERNEL")
FIRST = os.environ.get("UBLKPY_FIRST_KERNEL", HERE)
"""The series of this one, and of the first of those that the tests are run on."""
TRACING = Path("/sys/kernel/tracing")

_COMPLAINT = re.compile(
    r"kernel BUG|BUG:|WARNING:|Oops|Call Trace|blocked for more than|general protection|KASAN|UBSAN|rcu:.*stall"
)


class Log:
    """What the kernel says from now on."""

    def __init__(self) -> None:
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(self._fd, 0, os.SEEK_END)

    def lines(self) -> list[str]:
        """All that is new."""
        found: list[str] = []
        while True:
            try:
                record = os.read(self._fd, 8192).decode(errors="replace")
            except BlockingIOError:
                return found
            except BrokenPipeError:  # overwritten meanwhile; the next read goes on behind the gap
                continue
            found.append(record.partition(";")[2].partition("\n")[0])

    def close(self) -> None:
        os.close(self._fd)


def complaints(lines: list[str]) -> list[str]:
    """The lines that no test should cause."""
    return [line for line in lines if _COMPLAINT.search(line)]


def run(*argv: str | Path) -> str:
    """A system tool; its failure fails the test."""
    done = subprocess.run([str(arg) for arg in argv], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


_NEEDS = {
    "btrfs": ("libcrc32c", "xor", "raid6_pq", "libblake2b", "crc32c-cryptoapi")
}  # each kernel has some of them as modules


def load_module(name: str, *parameters: str) -> None:
    """Load a module, once; the test is skipped where there is none."""
    if Path("/sys/module", name.replace("-", "_")).exists():
        return
    for needed in _NEEDS.get(name, ()):
        if MODULES and Path(MODULES, f"{needed}.ko").exists():
            load_module(needed)
    file = Path(MODULES) / f"{name}.ko"
    argv = ["insmod", str(file), *parameters] if MODULES and file.exists() else ["modprobe", name, *parameters]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no kernel module {name}: {done.stderr.strip()}")


@contextmanager
def kernel_loop(file: Path, *options: str) -> Iterator[Path]:
    """A block device of the kernel's own loop driver over a file."""
    load_module("loop")
    node = Path(run("losetup", "--find", "--show", *options, file).strip())
    try:
        yield node
    finally:
        run("losetup", "--detach", node)


@contextmanager
def null_block(scratch: Path, name: str, **settings: str) -> Iterator[Path]:
    """A block device of the kernel's null_blk driver, which can be memory, slow, or bad in parts."""
    load_module("configfs")
    load_module("null_blk", "nr_devices=0")
    with mounted("none", scratch / f"{name}.config", "-t", "configfs") as config:
        folder = config / "nullb" / name
        folder.mkdir()
        try:
            for key, value in settings.items():
                (folder / key).write_text(value)
            (folder / "power").write_text("1")
            node = Path(f"/dev/nullb{(folder / 'index').read_text().strip()}")
            yield node if node.exists() else Path("/dev") / name
        finally:
            folder.rmdir()


@contextmanager
def mounted(source: Path | str, point: Path, *options: str) -> Iterator[Path]:
    """A file system, unmounted at the end of the block if it still is mounted."""
    point.mkdir(exist_ok=True)
    run("mount", *options, source, point)
    try:
        yield point
    finally:
        if point.is_mount():
            run("umount", point)


def keep_file(node: Path, point: Path, data: bytes) -> None:
    """A file system on the device is good, and keeps a file, from one mount to the next."""
    run("mkfs.ext4", "-q", node)
    with mounted(node, point):
        (point / "file").write_bytes(data)
    run("fsck.ext4", "-fn", node)
    with mounted(node, point):
        assert (point / "file").read_bytes() == data


@contextmanager
def traced(event: str) -> Iterator[list[str]]:
    """The lines that a trace event produces within the block, there at its end."""
    if not (TRACING / "events").exists():
        subprocess.run(["mount", "-t", "tracefs", "tracefs", str(TRACING)], capture_output=True)
    switch = TRACING / "events" / event / "enable"
    if not switch.exists():
        pytest.skip(f"this kernel has no trace event {event}")
    lines: list[str] = []
    (TRACING / "trace").write_text("")
    switch.write_text("1")
    try:
        yield lines
    finally:
        switch.write_text("0")
        lines += [line for line in (TRACING / "trace").read_text().splitlines() if not line.startswith("#")]
