"""The C core under AddressSanitizer and UndefinedBehaviorSanitizer: every path of a request, and a recovery."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ublkpy.driver import inspect
from ublkpy.uring.uapi import Feature

from . import disk, load
from .devices import MIB, Device, Devices, until
from .program import executable

pytestmark = pytest.mark.any_kernel

_BUILD = Path(__file__).parents[2] / "build" / "sanitized"


def _runtime(name: str) -> str:
    """The path of a sanitizer's library: it must be loaded before Python."""
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


@pytest.fixture
def watched(scratch: Path) -> Iterator[dict[str, str]]:
    """The environment in which ``ublk`` runs the sanitized build; a report of theirs fails the test."""
    assert _BUILD.exists(), "scripts/setup sanitized makes the build that this test needs"
    yield os.environ | {
        "LD_PRELOAD": f"{_runtime('libasan.so')} {_runtime('libubsan.so')}",
        "PYTHONPATH": str(_BUILD),
        # Leaks are Python's own here: a process that ends does not free what it has.
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={scratch}/report",
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={scratch}/report",
    }
    reports = [path.read_text() for path in scratch.glob("report*")]
    assert not reports, "\n".join(reports)


def _ublk(environment: dict[str, str], *args: str) -> str:
    done = subprocess.run([executable(), *args], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.timeout(180)
def test_every_kind_of_request(scratch: Path, devices: Devices, watched: dict[str, str]) -> None:
    image = disk.image(scratch / "image", 8 * MIB)
    node = _ublk(watched, "add", "-t", "loop", "-f", str(image), "-q", "2", "-r", "1", "--max-io-buf-bytes", "256k")
    device = devices.adopt(int(node.removeprefix("/dev/ublkb")))
    assert _runs_sanitized(device), "the daemon is not the sanitized build"
    options = ["--rw=randrw", "--bsrange=512-256k", "--size=4M", "--iodepth=8", "--ioengine=libaio", "--fsync=8"]
    load.verify(device.node, *options)
    subprocess.run(["blkdiscard", device.node], check=True)
    subprocess.run(["blkdiscard", "-z", device.node], check=True)
    device.kill_daemon()
    _ublk(watched, "recover", "-n", str(device.id))
    assert _runs_sanitized(device), "the new daemon is not the sanitized build"
    load.verify(device.node, *options)
    # Reads behind the end of the file: the way of errors.
    os.truncate(image, 4 * MIB)
    with pytest.raises(OSError, match="Input/output error"), device.node.open("rb", buffering=0) as f:
        os.pread(f.fileno(), 4096, 6 * MIB)


@pytest.mark.timeout(180)
def test_metadata(scratch: Path, devices: Devices, watched: dict[str, str]) -> None:
    if Feature.INTEGRITY not in inspect.features():
        pytest.skip("this driver has no metadata")
    image, metadata = disk.image(scratch / "image", 8 * MIB), scratch / "metadata"
    metadata.write_bytes(b"\xff" * (8 * MIB // 512 * 8))
    options = ["-f", str(image), "--metadata", str(metadata), "--metadata_size", "8", "--csum_type", "ip", "-q", "2"]
    node = _ublk(watched, "add", "-t", "loop", *options)
    device = devices.adopt(int(node.removeprefix("/dev/ublkb")))
    assert _runs_sanitized(device), "the daemon is not the sanitized build"
    load.verify(device.node, "--rw=randrw", "--bsrange=512-256k", "--size=4M", "--iodepth=8", "--ioengine=libaio")
    os.truncate(metadata, 4096)
    with pytest.raises(OSError, match="Input/output error"):
        disk.read(device.node, 6 * MIB, 4096)


@pytest.mark.timeout(180)
@pytest.mark.logs
def test_faults(scratch: Path, devices: Devices, watched: dict[str, str]) -> None:
    """Delays and errors, and a device that goes while there are some."""
    image, on = disk.image(scratch / "image", 8 * MIB), scratch / "on"
    options = ["--delay", "1ms", "--distribution", "exponential", "--error-rate", "10%", "--while-file", str(on)]
    node = _ublk(watched, "add", "-t", "fault", "-f", str(image), "-q", "2", *options, "--ranges", "1M-3M")
    device = devices.adopt(int(node.removeprefix("/dev/ublkb")))
    assert _runs_sanitized(device), "the daemon is not the sanitized build"
    on.touch()
    work = ["--rw=randrw", "--bsrange=512-256k", "--size=4M", "--iodepth=8", "--fsync=8", "--continue_on_error=all"]
    with load.running(device, *work, "--time_based", "--runtime=60"):
        until(lambda: device.completed("writes") > 200, "much is written")
        devices.remove(device)


def _runs_sanitized(device: Device) -> bool:
    return str(_BUILD) in Path(f"/proc/{device.pid}/maps").read_text()
