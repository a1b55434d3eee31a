"""fio: data that checks itself, and load."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ublkpy.driver.delete import delete

from .devices import Device, until

_COMMON = ["fio", "--direct=1", "--thread", "--minimal", "--group_reporting"]


def verify(node: Path, *options: str) -> None:
    """Write random blocks with checksums and read them back; the test fails on a difference."""
    done = subprocess.run(
        [
            *_COMMON,
            "--name=verify",
            f"--filename={node}",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--randrepeat=1",
            *options,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def running(device: Device, *options: str) -> Iterator[subprocess.Popen[str]]:
    """fio in the background, from its first completed requests on; killed at the end if it still runs."""
    argv = [*_COMMON, "--name=load", f"--filename={device.node}", "--ioengine=libaio", *options]
    before = device.completed("reads") + device.completed("writes")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as fio:
        try:
            until(
                lambda: fio.poll() is not None or device.completed("reads") + device.completed("writes") > before + 50,
                "fio sends requests",
            )
            assert fio.poll() is None, f"fio ended at once:\n{fio.stdout.read() if fio.stdout else ''}"
            yield fio
        finally:
            fio.kill()
            _free(fio, device)


def _free(fio: subprocess.Popen[str], device: Device) -> None:
    """A request that nobody answers holds fio until the device goes."""
    try:
        fio.wait(5)
    except subprocess.TimeoutExpired:
        delete(device.id, force=True)


def result(fio: subprocess.Popen[str], seconds: float = 60.0) -> tuple[int, str]:
    """The exit status of a fio that ends by itself, and what it printed."""
    output, _ = fio.communicate(timeout=seconds)
    return fio.returncode, output
