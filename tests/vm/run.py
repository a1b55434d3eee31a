"""One command on one kernel, from boot to verdict; and the same on several kernels side by side."""

import asyncio
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from . import nbdkit
from .channel import Channel
from .console import before, excerpt, tail, unexpected
from .guest import OVER_MARK, WATCHDOG_MARK, Guest
from .kernels import Kernel
from .machine import Accelerator, Machine, Running, boot
from .output import Lane

# exit statuses of the harness itself, the last two as coreutils' timeout and docker have them
KERNEL_WARNED = 3
TIMED_OUT = 124
CRASHED = 125

_BOOT_SECONDS = 60
_SYSTEMD_BOOT_SECONDS = 900
_CONSOLE_SECONDS = 5


@dataclass(frozen=True)
class Job:
    """What to run, and in what machine."""

    command: str
    folder: Path
    seconds: float = 600
    environment: Mapping[str, str] = field(default_factory=dict)
    write_through: bool = False
    out: Path | None = None
    cpus: int = 2
    memory: str = "2G"
    allowed: tuple[re.Pattern[str], ...] = ()
    systemd: str = ""

    @property
    def boot_seconds(self) -> int:
        return _SYSTEMD_BOOT_SECONDS if self.systemd else _BOOT_SECONDS


@dataclass(frozen=True)
class Run:
    """A job on a kernel."""

    job: Job
    kernel: Kernel

    @property
    def title(self) -> str:
        return f"Linux {self.kernel.release}" + (" with systemd" if self.job.systemd else "")


@dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    run: Run
    status: int
    failures: Sequence[str]

    def __str__(self) -> str:
        return "\n    ".join([f"{self.run.title} ({self.status})", *self.failures])


async def all_of(runs: Sequence[Run], accelerator: Accelerator, at_once: int) -> list[Outcome]:
    """Begin `runs` in this order, `at_once` of them at a time; what came of them, in this order, too."""
    lanes = [Lane() for _ in runs]
    slots = asyncio.Semaphore(at_once)

    async def take_turn(run: Run, lane: Lane) -> int:
        async with slots:
            if len(runs) > 1:
                lane.out(f"\n== {run.title} ==\n".encode())
            return await on_one(run.job, run.kernel, accelerator, lane)

    tasks = [asyncio.create_task(take_turn(*pair)) for pair in zip(runs, lanes, strict=True)]
    try:
        for lane, task in zip(lanes, tasks, strict=True):
            lane.go_live()
            await task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return [Outcome(run, task.result(), lane.failures) for run, task, lane in zip(runs, tasks, lanes, strict=True)]


async def on_one(job: Job, kernel: Kernel, accelerator: Accelerator, lane: Lane) -> int:
    """Run `job` on `kernel`, booting again where the emulator loses the guest before the command begins."""
    for _ in range(accelerator.attempts):
        status = await _attempt(job, kernel, accelerator, lane)
        if status is not None:
            return status
    lane.err(f"the guest did not get as far as the command, {accelerator.attempts} times with {accelerator.name}")
    return CRASHED


async def _attempt(job: Job, kernel: Kernel, accelerator: Accelerator, lane: Lane) -> int | None:
    """One boot: its exit status, or None when the command did not begin."""
    token = secrets.token_hex(8)
    guest = Guest(
        token=token,
        root="direct" if job.write_through else "overlay",
        command=job.command,
        systemd=job.systemd,
        folder=job.folder,
        out=job.out,
        seconds=job.seconds,
        environment={
            **job.environment,
            "UBLKPY_KERNEL": kernel.series,
            "UBLKPY_MODULES": str(kernel.modules),
            "UBLKPY_NBDKIT_EXAMPLES": str(nbdkit.folder()),
        },
    )
    machine = Machine(kernel, accelerator, job.cpus, job.memory)
    channel = Channel(token)
    with TemporaryDirectory(prefix="ublkpy-vm.") as folder:
        async with boot(machine, guest.initrd(kernel), Path(folder)) as running:
            timed_out = await _follow(running, channel, job, lane)
            if channel.status is not None:
                await _drain_console(running)
            elif not timed_out:
                await running.check_end()
        return _verdict(job, running, channel, timed_out, lane)


async def _follow(running: Running, channel: Channel, job: Job, lane: Lane) -> bool:
    """Print what the command prints, until it ends or the machine does; True if time was up before."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(job.boot_seconds) as deadline:
            while channel.status is None and (data := await running.channel.read(1 << 16)):
                booting = not channel.started
                lane.out(channel.feed(data))
                if booting and channel.started:
                    deadline.reschedule(loop.time() + job.seconds)
    except TimeoutError:
        return True
    return False


async def _drain_console(running: Running) -> None:
    """Wait for the line that the guest logged last: the kernel prints its log in the background."""
    for _ in range(_CONSOLE_SECONDS * 50):
        if OVER_MARK in running.console():
            break
        await asyncio.sleep(0.02)


def _verdict(job: Job, running: Running, channel: Channel, timed_out: bool, lane: Lane) -> int | None:
    console = running.console()
    if not channel.started:
        how = f"did not boot within {job.boot_seconds} s" if timed_out else "died while it booted"
        lane.err(f"the guest {how}; the end of its console:\n{tail(console, 20)}")
        return None
    if timed_out:
        lane.err(
            f"ended after {job.seconds:g} s (-t allows more); what the guest was waiting for:\n"
            + tail(console.partition(WATCHDOG_MARK)[2] or console, 120)
        )
    elif channel.status is None:
        lane.err(f"the guest crashed; the end of its console:\n{tail(console, 60)}")
    # the watchdog's own report looks like a complaint
    complaints = unexpected(before(console, OVER_MARK, WATCHDOG_MARK), job.allowed)
    if complaints and channel.status is not None:
        lane.err(
            f"the kernel complained {len(complaints)} time(s), which fails the run (see --allow-warning):\n"
            + "\n".join(excerpt(complaint, 40) for complaint in complaints[:3])
        )
    if timed_out:
        return TIMED_OUT
    if channel.status is None:
        return CRASHED
    return channel.status or (KERNEL_WARNED if complaints else 0)
