"""One QEMU process."""

import shutil
from asyncio import StreamReader
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from .console import tail
from .errors import SetupError
from .kernels import Kernel
from .process import spawn
from .share import shared

_QEMU = "qemu-system-x86_64"
# Boot chatter stays off the console, warnings do not. A guest that is emulated on a busy machine stalls now and then
# without anything being wrong in it, so its own watchdogs get more patience than on real hardware.
_KERNEL_OPTIONS = (
    "console=ttyS0 loglevel=5 printk.devkmsg=on panic=-1 mitigations=off"
    " watchdog_thresh=30 rcupdate.rcu_cpu_stall_timeout=60"
    # for tests: later there may be no memory for them that is in one piece
    " hugepages=4"
)


@dataclass(frozen=True)
class Accelerator:
    """How guest instructions are executed: options for QEMU, and for the kernel."""

    name: str
    options: str
    kernel_options: str = ""
    attempts: int = 1
    """How often a machine is booted that dies before its command began."""


KVM = Accelerator("KVM", "-accel kvm -cpu host")
# QEMU's emulation has two faults (seen in 7.2) that look like the guest's. While the kernel patches its own text at
# boot it may meet a half-written instruction ("Oops: int3", one boot in ten), but not with tsc=reliable. And
# cmpxchg16b leaves wrong flags behind, which an interrupt right after it makes fatal ("double fault" in kmalloc,
# within seconds when there are more CPUs than the machine has): without that instruction the kernel takes locks.
# The CPU also goes without fast string moves, which emulation does a byte at a time.
_CPU = "-cpu max,cx16=off,erms=off,fsrm=off"
# Programs that lie where they lay before are not translated again: they start in half the time.
TCG = Accelerator("emulation", f"-accel tcg,thread=multi {_CPU}", "tsc=reliable norandmaps", attempts=3)
# Guest time is counted in guest instructions, 1 ns each, so that measurements repeat whatever else the machine does.
INSTRUCTION_CLOCK = Accelerator(
    "emulation with an instruction clock",
    f"-accel tcg,thread=single -icount shift=0,sleep=off,align=off {_CPU}",
    "tsc=reliable",
    attempts=3,
)


@dataclass(frozen=True)
class Machine:
    """A machine to be booted."""

    kernel: Kernel
    accelerator: Accelerator
    cpus: int = 1
    memory: str = "256M"
    files: bool = True
    """Whether it sees this machine's files."""


@dataclass(frozen=True)
class Running:
    """A booted machine: what comes out of its channel, and the folder of its console and logs."""

    process: Process
    channel: StreamReader
    folder: Path

    def console(self) -> str:
        return (self.folder / "console").read_text(errors="replace").replace("\r", "")

    async def check_end(self) -> None:
        """With the channel closed: was it the guest that ended, or did QEMU fail?"""
        if status := await self.process.wait():
            logs = [self.folder / "qemu.log", self.folder / "virtiofsd.log"]
            said = "".join(path.read_text(errors="replace") for path in logs if path.exists())
            raise SetupError(
                f"QEMU failed (exit status {status}):\n{tail(said, 20)}",
                "Does this machine have the memory (-m) and the CPUs (-c) for it?",
            )


@asynccontextmanager
async def boot(machine: Machine, initrd: bytes, folder: Path) -> AsyncIterator[Running]:
    """Run `machine` for as long as the block lasts, with its console and logs in the empty `folder`."""
    image, console = folder / "initrd", folder / "console"
    image.write_bytes(initrd)
    console.touch()
    argv = [
        *(qemu(), "-M", "q35", *machine.accelerator.options.split(), "-smp", str(machine.cpus), "-m", machine.memory),
        *("-no-reboot", "-nodefaults", "-display", "none", "-net", "none", "-serial", f"file:{console}"),
        *("-chardev", "file,id=channel,path=/dev/stdout"),
        *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=channel"),
        *("-kernel", str(machine.kernel.vmlinuz), "-initrd", str(image)),
        *("-append", f"{_KERNEL_OPTIONS} {machine.accelerator.kernel_options}"),
    ]
    async with AsyncExitStack() as stack:
        if machine.files:
            address = await stack.enter_async_context(shared(folder))
            argv += ["-object", f"memory-backend-memfd,id=memory,size={machine.memory},share=on"]
            argv += ["-numa", "node,memdev=memory"]
            argv += ["-chardev", f"socket,id=files,path={address}"]
            argv += ["-device", "vhost-user-fs-pci,chardev=files,tag=files"]
        log = stack.enter_context((folder / "qemu.log").open("wb"))
        process = await stack.enter_async_context(spawn(argv, stdout=PIPE, stderr=log))
        assert process.stdout
        yield Running(process, process.stdout, folder)


def qemu() -> str:
    if found := shutil.which(_QEMU):
        return found
    raise SetupError(f"{_QEMU} is not installed", "scripts/setup vm")
