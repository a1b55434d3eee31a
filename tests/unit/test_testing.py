"""The suite for the tests of other people's targets: good ones pass, bad ones are found."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.device import targets
from ublkpy import Geometry, Target
from ublkpy.errors import UblkError
from ublkpy.testing import Disk, TargetContract, open_disk
from ublkpy.tgt.null import NullTarget
from ublkpy.uring.map import Map


class TestGoodOnes(TargetContract):
    @pytest.fixture(params=["Ram", "AsyncRam", "BlockingRam", "ReadOnly", "Boxes"])
    def disk(self, request: pytest.FixtureRequest) -> Iterator[Disk]:
        with open_disk(getattr(targets, request.param)()) as disk:
            yield disk


BAD = """
import pytest
from tests.device.targets import Ram
from ublkpy.testing import TargetContract, open_disk

class Bad(Ram):
    {method}

class TestBad(TargetContract):
    @pytest.fixture
    def disk(self):
        with open_disk(Bad()) as disk:
            yield disk
"""


@pytest.mark.parametrize(
    ("method", "failing"),
    [
        ("def write(self, offset, buf): pass", "test_each_end"),
        ("def write(self, offset, buf): self.data[offset:offset + 512] = buf[:512]", "test_what_was_written_is_there"),
        ("def write_zeroes(self, offset, length): pass", "test_what_was_written_is_there"),
        ("def discard(self, offset, length): self.data[offset + length:][:512] = bytes(512)", "test_what_is_beside"),
        (
            "async def write(self, offset, buf):  # the first to begin is the last to end\n"
            "        import asyncio\n"
            "        self.rank = max(0, getattr(self, 'rank', 9) - 1)\n"
            "        self.data[offset:][:256] = buf[:256]\n"
            "        await asyncio.sleep(self.rank / 50)\n"
            "        self.data[offset:][256:len(buf)] = buf[256:]",
            "test_overlapping_requests",
        ),
        ("def read(self, offset, buf): buf[:] = __import__('os').urandom(len(buf))", "test_it_reads_the_same_twice"),
        ("def read(self, offset, buf): pass", "test_it_reads_the_same_twice"),
        ("def read(self, offset, buf): return self.data[offset:][:len(buf)]", "test_each_end"),
        (
            "kept = {}\n"
            "    def write(self, offset, buf):\n"
            "        for n in range(0, len(buf), 512):\n"
            "            self.kept[offset + n] = buf[n:][:512]\n"
            "    def read(self, offset, buf):\n"
            "        for n in range(0, len(buf), 512):\n"
            "            buf[n:n + 512] = self.kept.get(offset + n, bytes(512))",
            "test_each_end",
        ),
    ],
    ids=["forgets", "short", "no zeroes", "discards too much", "torn", "random", "empty", "returns", "keeps"],
)
def test_bad_ones(tmp_path: Path, method: str, failing: str) -> None:
    (tmp_path / "test_bad.py").write_text(BAD.format(method=method))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"::{failing}" in done.stdout.replace("TestBad::", "::"), done.stdout


def test_errors_are_those_of_a_disk() -> None:
    with open_disk(targets.Failing()) as disk:
        with pytest.raises(OSError, match="No space left"):
            disk.read(0, 4096)
        with pytest.raises(KeyError):
            disk.read(4096, 4096)
        disk.read(8192, 4096)
        with pytest.raises(ValueError, match="released memoryview"):
            disk.write(0, bytes(4096))
        with pytest.raises(OSError, match="outside of the disk"):
            disk.read(disk.size, 512)


def test_flushes_follow_durable_writes() -> None:
    target = targets.AsyncCounting()
    with open_disk(target) as disk:
        disk.write(0, bytes(512))
        disk.write(512, bytes(512), durable=True)
        disk.flush()
    assert target.calls == ["write 0 512", "write 512 512", "flush", "flush"]


@pytest.mark.parametrize("name", ["Starting", "AsyncStarting"])
def test_a_start_that_fails(name: str) -> None:
    with pytest.raises(UblkError, match="failed in start"), open_disk(getattr(targets, name)({"size": 1 << 20})):
        pass


class Mapped(targets.Ram):
    """Nothing is left to its methods."""

    def map(self, target_map: Map) -> None:
        """All of it does nothing."""


@pytest.mark.parametrize("target", [NullTarget(), Mapped()])
def test_what_is_not_all_methods(target: Target) -> None:
    with pytest.raises(ValueError, match=f"target {target.name} has a map or upcall"), open_disk(target):
        pass


class Told(Target):
    """Tells what is called, in which thread."""

    def open(self) -> Geometry:
        self.calls = ["open"]
        return Geometry(1 << 20)

    def start(self) -> None:
        self.calls.append("start")

    def start_thread(self) -> None:
        self.calls.append("start_thread")

    def read(self, offset: int, buf: memoryview) -> None:
        self.calls.append("read here" if threading.current_thread() is threading.main_thread() else "read elsewhere")

    def stop_thread(self) -> None:
        self.calls.append("stop_thread")

    def stop(self) -> None:
        self.calls.append("stop")

    def close(self) -> None:
        self.calls.append("close")


class ToldBlocking(Told):
    blocking = True


class ToldAsync(ToldBlocking):  # async goes before blocking, as in a daemon
    async def flush(self) -> None:
        await asyncio.sleep(0)


class ToldAsyncStart(Told):
    async def start(self) -> None:  # type: ignore[override]
        self.calls.append("start on a loop")

    async def stop(self) -> None:  # type: ignore[override]
        self.calls.append("stop on a loop")


class ToldFailing(Told):
    def start_thread(self) -> None:
        raise OSError("no thread for you")


@pytest.mark.parametrize(
    ("made", "calls"),
    [
        (Told, "open start start_thread; read here; stop_thread stop close"),
        (ToldBlocking, "open start start_thread; read elsewhere; stop_thread stop close"),
        (ToldAsync, "open start start_thread; read here; stop_thread stop close"),
        (ToldAsyncStart, "open start_thread start on a loop; read here; stop on a loop stop_thread close"),
    ],
)
def test_each_way_is_that_of_a_daemon(made: type[Told], calls: str) -> None:
    target = made()
    with open_disk(target) as disk:
        disk.read(0, 512)
    assert " ".join(target.calls) == calls.replace(";", "")


def test_what_had_begun_is_ended_if_a_thread_does_not_begin() -> None:
    target = ToldFailing()
    with pytest.raises(UblkError, match="failed in start_thread"), open_disk(target):
        pass
    assert target.calls == ["open", "start", "stop", "close"]
