"""Which accelerator to use here: KVM if it really boots a guest, which /dev/kvm alone does not prove."""

import asyncio
import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from .cache import cache
from .channel import Channel
from .guest import Guest
from .kernels import Kernel
from .machine import KVM, TCG, Accelerator, Machine, boot, qemu
from .process import output_of

_PROBE_SECONDS = 15


async def choose(kernel: Kernel) -> Accelerator:
    """KVM or TCG. The answer is kept until this machine reboots or gets another QEMU."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return TCG
    version = await output_of(qemu(), "--version", seconds=10, cure="Is QEMU properly installed?")
    asked = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), version.splitlines()[0]]
    path = cache() / "kvm.json"
    works = _remembered(path, asked)
    if works is None:
        works = await _boots(kernel)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({"asked": asked, "works": works}))
        draft.rename(path)
    return KVM if works else TCG


def _remembered(path: Path, asked: list[str]) -> bool | None:
    try:
        answer = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return bool(answer["works"]) if answer.get("asked") == asked else None


async def _boots(kernel: Kernel) -> bool:
    """Whether a guest gets as far as its first program."""
    print("tests.vm: trying KVM", file=sys.stderr, flush=True)
    channel = Channel("probe")
    initrd = Guest(token="probe", root="none").initrd(kernel)
    with TemporaryDirectory(prefix="ublkpy-vm.") as folder:
        try:
            async with (
                asyncio.timeout(_PROBE_SECONDS),
                boot(Machine(kernel, KVM, files=False), initrd, Path(folder)) as running,
            ):
                while data := await running.channel.read(4096):
                    channel.feed(data)
                    if channel.started:
                        return True
        except TimeoutError:
            pass
    print("tests.vm: KVM does not boot a guest here, using emulation", file=sys.stderr, flush=True)
    return False
