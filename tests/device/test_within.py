"""Devices that a program serves itself: here the tests' own process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ublkpy import Device, Geometry, Request, Target
from ublkpy.daemon import server
from ublkpy.driver import inspect
from ublkpy.errors import BusyError, NoDeviceError, UblkError
from ublkpy.life import within
from ublkpy.tgt.loop import LoopTarget
from ublkpy.tgt.null import NullTarget
from ublkpy.upcall.plain import Plain
from ublkpy.uring.uapi import Feature, Op

from . import disk, kernel, load, program, targets
from .devices import MIB, held_open, until
from .within import DATA, fds, nothing_of_it_stays, read, write  # noqa: F401  (an autouse fixture)


class RawRam(targets.Ram):
    """The same with requests as objects, answered by another thread."""

    def upcall(self, requests: Sequence[Request]) -> None:
        threading.Thread(target=self._answer, args=(requests,)).start()

    def _answer(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if request.op is Op.READ:
                self.read(request.offset, request.buffer)
            elif request.op is Op.WRITE:
                self.write(request.offset, request.buffer)
            request.done()


# -- what it serves --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [targets.Ram, targets.AsyncRam, targets.BlockingRam, RawRam])
def test_a_target_of_this_program(kind: type[targets.Ram]) -> None:
    target = kind()
    with Device(target) as device:
        write(device, MIB, DATA)
        assert target.data[MIB : MIB + len(DATA)] == DATA
        target.data[:4096] = b"y" * 4096
        assert read(device, 0, 4096) == b"y" * 4096
        assert device.target is target
        assert device.status().pid == os.getpid()
    assert not device.exists()


def test_a_target_whose_class_only_this_function_knows() -> None:
    class Letters(Target):
        def open(self) -> Geometry:
            return Geometry(MIB)

        def read(self, offset: int, buf: memoryview) -> None:
            buf[:] = b"a" * len(buf)

    with Device(Letters()) as device:
        assert read(device, 0, 512) == b"a" * 512


def test_maps_need_no_python(scratch: Path) -> None:
    image = disk.image(scratch / "image", 8 * MIB)
    with Device(LoopTarget({"file": image})) as device:
        write(device, MIB, DATA)
        assert image.read_bytes()[MIB : MIB + len(DATA)] == DATA
    with Device(NullTarget({"size": MIB})) as device:
        assert len(read(device, 0, 4096)) == 4096


@pytest.mark.parametrize("kind", ["Ram", "AsyncRam", "BlockingRam"])
def test_load(kind: str, way: str) -> None:
    with Device(getattr(targets, kind)(), queues=2, mode=way) as device:
        assert device.status().to_dict()["mode"] == way
        load.verify(Path(device.node), "--ioengine=libaio", "--iodepth=16", "--rw=randrw", "--bs=4k", "--size=1m")


def test_several_at_a_time_one_on_another(scratch: Path) -> None:
    with Device(targets.Ram()) as lower, Device(LoopTarget({"file": Path(lower.node)})) as upper:
        write(upper, MIB, DATA)
        assert read(lower, MIB, len(DATA)) == DATA


@pytest.mark.any_kernel
def test_a_target_has_one_device_at_a_time() -> None:
    target = targets.Ram()
    with Device(target) as device:
        with pytest.raises(BusyError, match=f"served already: {device.node}"):
            Device(target).serve()
        with pytest.raises(BusyError, match="served already"):
            device.serve()
    with Device(target) as again:
        assert read(again, 0, 512) == bytes(512)


@pytest.mark.any_kernel
def test_over_cells_of_a_notebook() -> None:
    device = Device(targets.Ram(), name="cells")
    with pytest.raises(NoDeviceError, match="no device of target ram is served yet"):
        print(device.node)
    assert not device.exists()
    device.serve()
    assert device.exists()
    assert inspect.status(device.dev_id).name == "cells"
    with pytest.raises(BusyError, match="cells already"):
        Device(targets.Ram(), name="cells").serve()
    device.delete()
    assert not device.exists()
    device.delete()
    with pytest.raises(NoDeviceError, match="is gone"):
        print(device.node)
    device.serve()
    device.delete()


def test_the_fixture(ublk_device: Callable[..., Device]) -> None:
    first, second = ublk_device(targets.Ram()), ublk_device(targets.Ram(), queues=2)
    write(first, 0, DATA)
    assert read(first, 0, len(DATA)) == DATA
    assert read(second, 0, len(DATA)) == bytes(len(DATA))


# -- asyncio -----------------------------------------------------------------------------------


@pytest.mark.any_kernel
def test_the_callers_event_loop_goes_on() -> None:
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - before)

    async def main() -> float:
        ticking = asyncio.create_task(tick())
        began = time.monotonic()
        async with Device(targets.AsyncRam(), queues=2, mode="copy") as device:
            await asyncio.to_thread(write, device, 0, DATA)
            assert await asyncio.to_thread(read, device, 0, len(DATA)) == DATA
        took = time.monotonic() - began
        ticking.cancel()
        return took

    took = asyncio.run(main())
    assert longest < took / 2, f"the loop stood still for {longest:.2f} of {took:.2f} s"


@pytest.mark.any_kernel
def test_a_task_that_is_cancelled_while_it_begins() -> None:
    async def main() -> None:
        async with Device(targets.Ram()):
            pytest.fail("it was cancelled before")

    async def cancel() -> None:
        task = asyncio.create_task(main())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())


# -- the end -----------------------------------------------------------------------------------


@pytest.mark.any_kernel
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_what_ends_the_block_is_not_hidden(error: type[BaseException]) -> None:
    with pytest.raises(error, match="of the block"), Device(targets.Ram()) as device:
        raise error("of the block")
    assert not device.exists()


def _write_and_flush(fd: int) -> None:
    os.pwrite(fd, DATA, 0)
    os.fsync(fd)


def test_the_end_while_it_is_open(caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.ExitStack() as stack:
        with Device(targets.Ram()) as device:
            node = device.node
            fd = stack.enter_context(held_open(Path(node), os.O_RDWR))
            os.pwrite(fd, DATA, 0)
        with pytest.raises(OSError, match=r"Input/output error|No such device|No space"):
            _write_and_flush(fd)
    assert f"{node} is gone, but still open in process {os.getpid()}" in caplog.text


def test_the_end_while_it_is_mounted(scratch: Path, caplog: pytest.LogCaptureFixture) -> None:
    (scratch / "mnt").mkdir()
    device = Device(targets.Ram({"size": 16 * MIB}))
    device.serve()
    kernel.run("mkfs.ext4", "-q", device.node)
    kernel.run("mount", device.node, str(scratch / "mnt"))
    try:
        with pytest.raises(BusyError, match="is mounted on"):
            device.delete()
        device.delete(force=True)
    finally:
        subprocess.run(["umount", str(scratch / "mnt")], check=True)
    assert "deleting it all the same" in caplog.text


@pytest.mark.any_kernel
def test_by_its_id_from_the_program_that_serves_it() -> None:
    """The command is not sent by this process, which would wait for itself."""
    with Device(targets.Ram()) as device:
        for refused in (Device(device.dev_id).stop, device.stop, device.quiesce, device.upgrade, device.recover):
            with pytest.raises(UblkError, match=r"cannot be .*: no daemon serves it, but a program itself"):
                refused()
        Device(device.dev_id).delete()
        assert not device.exists()


@pytest.mark.any_kernel
def test_commands_from_a_shell() -> None:
    with Device(targets.Ram()) as device:
        dev_id = device.dev_id
        for command in ("stop", "quiesce", "upgrade", "recover", "start"):
            done = program.ublk(command, "-n", str(dev_id))
            assert done.status != 0
            assert f"process {os.getpid()}" in done.err, command
        assert f" {os.getpid()} " in program.ublk("list").out
        assert program.ublk("del", "-n", str(dev_id)) == program.Result(0, "", "")
        until(lambda: not device.exists(), "this process knows that it is gone")
        with pytest.raises(NoDeviceError, match="is gone"):
            print(device.node)


def test_resize_from_a_shell_and_from_here(scratch: Path, resizable: None) -> None:
    image = disk.image(scratch / "image", 8 * MIB)
    with Device(LoopTarget({"file": image})) as device:
        assert program.ublk("resize", "-n", str(device.dev_id), "16M").status == 0
        assert device.status().size == image.stat().st_size == 16 * MIB
        device.resize(8 * MIB)
        assert device.status().size == 8 * MIB


@pytest.fixture
def resizable() -> None:
    if Feature.UPDATE_SIZE not in inspect.features():
        pytest.skip("this driver cannot change sizes")


def test_a_daemon_of_its_own(scratch: Path) -> None:
    file = scratch / "disk.yaml"
    file.write_text("target: {type: 'null', size: 8M}\n")
    with Device.add(file) as device:
        assert device.status().pid != os.getpid()
    assert not device.exists()
    with Device.add(targets.Ram(), queues=2) as device:
        assert device.status().info.queue_depth == 128
        device.delete()


# -- what goes wrong -----------------------------------------------------------------------------


def test_a_queue_that_fails(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one, too, ends then, and the device is gone before the block ends."""

    def fail(_self: Plain) -> None:
        raise SystemExit("enough")

    device = Device(targets.Ram(), queues=2)
    device.serve()
    dev_id = device.dev_id
    monkeypatch.setattr(Plain, "answer", fail)
    with pytest.raises(OSError, match="Input/output error"):
        read(device, 4 * MIB, 4096)
    until(lambda: dev_id not in inspect.device_ids(), "the device is gone")
    with pytest.raises(UblkError, match=f"/dev/ublkb{dev_id} was given up, because a queue failed: SystemExit: enough"):
        device.delete()
    assert "failed: giving the device up" in caplog.text
    device.delete()


class Stuck(targets.Ram):
    """One request is never answered."""

    async def read(self, offset: int, buf: memoryview) -> None:  # type: ignore[override]
        if offset == 4 * MIB:
            await asyncio.Event().wait()
        super().read(offset, buf)


@pytest.mark.any_kernel
@pytest.mark.timeout(240)
def test_requests_that_nobody_answers_fail_in_the_end(caplog: pytest.LogCaptureFixture) -> None:
    failed: list[object] = []

    def stuck() -> None:
        with pytest.raises(OSError, match="Input/output error") as e:
            read(device, 4 * MIB, 4096)
        failed.append(e)

    reader = threading.Thread(target=stuck)
    with Device(Stuck()) as device:
        reader.start()
        until(lambda: (Path("/sys/block") / Path(device.node).name / "inflight").read_text().split()[0] != "0", "read")
    reader.join(20)
    assert failed
    assert "its requests fail now" in caplog.text


class StuckInPool(targets.BlockingRam):
    """One request waits in a thread of the pool, as long as it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go_on, self.is_closed = threading.Event(), threading.Event(), False

    def read(self, offset: int, buf: memoryview) -> None:
        if offset == 4 * MIB:
            self.entered.set()
            self.go_on.wait(120)
            assert not self.is_closed
        super().read(offset, buf)

    def close(self) -> None:
        self.is_closed = True
        super().close()


@pytest.mark.any_kernel
def test_a_target_is_not_closed_while_a_pool_is_in_its_methods(caplog: pytest.LogCaptureFixture) -> None:
    target = StuckInPool()
    device = Device(target)
    device.serve()
    node, session = device.node, within.find(device.dev_id)

    def stuck() -> None:
        with pytest.raises(OSError, match="Input/output error"):
            disk.read(Path(node), 4 * MIB, 4096)

    reader = threading.Thread(target=stuck)
    reader.start()
    assert target.entered.wait(20)
    assert session
    assert session._server
    session._server.cut()
    device.delete(force=True)
    reader.join(20)
    assert not reader.is_alive()
    assert not Path(node).exists()
    assert not target.is_closed
    assert "a method of target stuck-in-pool has not returned: the target is not closed" in caplog.text
    with pytest.raises(BusyError, match="has not returned since its device was given up"):
        device.serve()
    target.go_on.set()
    until(lambda: threading.active_count() == 1, "the method has returned")
    with device:
        assert target.is_closed
        target.is_closed = False
        assert read(device, 0, 512) == bytes(512)
    assert target.is_closed


@pytest.mark.any_kernel
@pytest.mark.parametrize("where", ["open", "start", "start_thread"])
def test_a_target_that_cannot_begin(where: str, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise OSError(5, "no disk today")

    target = targets.Ram()
    setattr(target, where, fail)
    device = Device(target)
    with pytest.raises(UblkError, match=f"failed in {where}"):
        device.serve()
    assert not device.exists()
    delattr(target, where)
    with device:
        assert read(device, 0, 512) == bytes(512)


class Late(targets.Ram):
    """Its threads do not begin."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def start_thread(self) -> None:
        assert self.go_on.wait(120)


class LateAsync(targets.AsyncRam):
    async def start(self) -> None:
        await asyncio.Event().wait()


@pytest.mark.parametrize("target", [Late(), LateAsync()], ids=["start_thread", "start"])
def test_a_target_that_does_not_begin(
    target: Target, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is left of its device, whatever it does."""
    monkeypatch.setattr(server, "START_DEADLINE", 0.5)
    before = fds()
    device = Device(target, queues=2)
    with pytest.raises(UblkError, match=r"did not get ready within 0.5 s: target .* has not returned from start"):
        device.serve()
    assert not device.exists()
    assert inspect.device_ids() == []
    monkeypatch.undo()
    if isinstance(target, Late):
        with pytest.raises(BusyError, match="has not returned since its device was given up"):
            device.serve()
        target.go_on.set()
        until(lambda: threading.active_count() == 1, "the threads have ended")
        with device:
            assert read(device, 0, 512) == bytes(512)
    assert fds() == before
