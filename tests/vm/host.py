"""No machine at all: the command runs right here, on this machine's own driver."""

import asyncio
import os
import platform
import shutil
import sys
from pathlib import Path

from .errors import SetupError
from .process import output_of, spawn
from .run import TIMED_OUT, Job

CONTROL = Path("/dev/ublk-control")
_CURE = "Without --on host (and without UBLKPY_TEST_ON), the command runs in a machine of its own instead."


async def run(job: Job) -> int:
    """Run `job.command` here and return its exit status."""
    if os.geteuid() != 0:
        raise SetupError("the ublk driver is open to root only", f"Run as root. {_CURE}")
    if not CONTROL.exists() and shutil.which("modprobe"):
        await output_of("modprobe", "ublk_drv", seconds=30, cure=f"This kernel has no ublk driver. {_CURE}")
    if not CONTROL.exists():
        raise SetupError(f"no {CONTROL}: this kernel's ublk driver is not loaded", f"modprobe ublk_drv. {_CURE}")
    series = ".".join(platform.release().split(".")[:2])
    environment = {**os.environ, "UBLKPY_KERNEL": series}
    try:
        async with (
            asyncio.timeout(job.seconds),
            spawn(["bash", "-c", job.command], stdout=None, stderr=None, env=environment, cwd=job.folder) as process,
        ):
            status = await process.wait()
    except TimeoutError:
        print(f"tests.vm: ended after {job.seconds:g} s (-t allows more)", file=sys.stderr)
        return TIMED_OUT
    return status if status >= 0 else 128 - status
