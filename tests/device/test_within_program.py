"""The program that serves a device itself: what of it is left alone, its forks, and its end."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ublkpy import Device
from ublkpy.driver import inspect
from ublkpy.life import within

from . import program, targets
from .within import DATA, nothing_of_it_stays, read, until_dead, write  # noqa: F401  (an autouse fixture)

# -- the program's own -----------------------------------------------------------------------------


@pytest.mark.any_kernel
def test_the_process_stays_as_it_was() -> None:
    numbers = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})

    def look() -> dict[str, object]:
        umask = os.umask(0)
        os.umask(umask)
        status = Path("/proc/self/status").read_text().splitlines()
        return {
            "handlers": [signal.getsignal(number) for number in numbers],
            "mask": signal.pthread_sigmask(signal.SIG_BLOCK, []),
            "umask": umask,
            "cwd": Path.cwd(),
            "log": (list(logging.getLogger().handlers), logging.getLogger().level),
            "streams": [Path(f"/proc/self/fd/{n}").readlink() for n in range(3)],
            "oom": Path("/proc/self/oom_score_adj").read_text(),
            "mounts": Path("/proc/self/ns/mnt").readlink(),
            "session": os.getsid(0),
            "affinity": os.sched_getaffinity(0),
            "locked": [line for line in status if line.startswith("VmLck")],
            "switch": sys.getswitchinterval(),
        }

    before = look()
    wakeup = signal.set_wakeup_fd(-1)
    pipe = os.pipe()
    os.set_inheritable(pipe[0], True)
    with Device(targets.Ram()) as device:
        assert look() == before
        assert signal.set_wakeup_fd(-1) == -1
        write(device, 0, DATA)
    assert look() == before
    signal.set_wakeup_fd(wakeup)
    for fd in pipe:
        os.close(fd)


def test_ctrl_c_while_it_serves() -> None:
    device = Device(targets.Ram())

    def work() -> None:
        with device:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(20)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert not device.exists()


# -- forks -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def forked(body: Callable[[], object]) -> Iterator[int]:
    """A child that runs this, and then lives on until the end of the block."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            body()
            os.close(write_end)
            os.read(read_end, 1)
            status = 0
        finally:
            os._exit(status)
    os.close(read_end)
    yield pid
    os.close(write_end)
    assert os.waitpid(pid, 0)[1] == 0


def _check(is_right: bool) -> None:
    assert is_right


def test_a_forked_child_uses_it_and_does_not_hold_it() -> None:
    with contextlib.ExitStack() as stack:
        with Device(targets.Ram(), queues=2) as device:
            write(device, 0, DATA)
            stack.enter_context(forked(lambda: _check(read(device, 0, len(DATA)) == DATA)))
        assert not device.exists()


def test_a_forked_child_that_leaves_the_block() -> None:
    with Device(targets.Ram()) as device:
        pid = os.fork()
        if pid == 0:
            try:
                device.__exit__(None, None, None)
                device.delete()
                within._delete_all()
            finally:
                os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        write(device, 0, DATA)


def _first(node: str) -> bytes:
    with Path(node).open("rb") as file:
        return file.read(4)


def test_a_pool_of_forked_processes() -> None:
    target = targets.Ram()
    with Device(target) as device:
        target.data[:4] = b"pool"
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(_first, [device.node] * 4) == [b"pool"] * 4
            pool.close()
            pool.join()


# -- scripts -----------------------------------------------------------------------------------------

SCRIPT = """
import logging, os, signal, subprocess, sys, threading, time
from ublkpy import Device, Geometry, Target

class Mine(Target):
    blocking = {blocking}

    def open(self):
        self.data = bytearray(1 << 20)
        return Geometry(len(self.data))

    def read(self, offset, buf):
        buf[:] = self.data[offset : offset + len(buf)]

    def write(self, offset, buf):
        self.data[offset : offset + len(buf)] = buf

device = Device(Mine())
{then}
"""


def script(then: str, *, blocking: bool = False) -> subprocess.Popen[str]:
    text = SCRIPT.format(then=then, blocking=blocking)
    return subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("blocking", [False, True], ids=["plain", "blocking"])
@pytest.mark.parametrize(
    ("then", "status"),
    [
        ("device.serve(); os.write(os.open(device.node, os.O_RDWR), b'x' * 4096)", 0),
        ("device.serve(); sys.exit(3)", 3),
        ("device.serve(); 1 / 0", 1),
        ("device.__enter__(); threading.Thread(target=time.sleep, args=[0.5]).start()", 0),
    ],
    ids=["end", "exit", "exception", "thread"],
)
def test_a_script_that_just_ends(then: str, status: int, blocking: bool) -> None:
    """Also with a request that is on its way only when it ends: what was written is written back."""
    with script(then, blocking=blocking) as running:
        out, err = running.communicate(timeout=50)
    assert (running.returncode, out) == (status, "")
    assert "error" not in err.replace("ZeroDivisionError", "").lower(), err
    assert inspect.device_ids() == []


@pytest.mark.any_kernel
@pytest.mark.timeout(240)
def test_a_script_ends_with_a_method_that_does_not() -> None:
    then = "Mine.read = lambda self, offset, buf: offset != 1 << 19 or time.sleep(600)\n"
    then += (
        "device.serve(); reader = threading.Thread(target=lambda: os.pread(os.open(device.node, 0), 4096, 1 << 19))\n"
    )
    then += "reader.daemon = True; reader.start(); time.sleep(1); device._session._server.cut()"
    with script(then, blocking=True) as running:
        running.communicate(timeout=200)
    assert running.returncode == 0


def test_a_script_that_is_killed() -> None:
    """Also while a child of it lives on."""
    then = "device.serve(); child = os.fork()\n"
    then += "if not child: time.sleep(60); os._exit(0)\n"
    then += "print(device.dev_id, child, flush=True); time.sleep(60)"
    with script(then) as running:
        assert running.stdout
        dev_id, child = map(int, running.stdout.readline().split())
        running.kill()
    until_dead(dev_id)
    os.kill(child, signal.SIGKILL)
    assert f"ublk del -n {dev_id}" in program.ublk("list").out
    for command in ("recover", "start", "upgrade", "stop"):
        done = program.ublk(command, "-n", str(dev_id))
        assert f"the program that served it itself, process {running.pid}, has ended" in done.err
        assert f"ublk del -n {dev_id}" in done.err
    assert program.ublk("del", "-n", str(dev_id)) == program.Result(0, "", "")
