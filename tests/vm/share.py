"""The guest's view of this machine's files: a virtiofsd that serves / over a socket."""

import os
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from .errors import SetupError
from .process import output_of, spawn

_CURE = "scripts/setup vm"
_PLACES = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd")


@asynccontextmanager
async def shared(folder: Path) -> AsyncIterator[Path]:
    """Serve / for as long as the block lasts; gives the socket for QEMU, made below `folder` as is the log."""
    address = folder / "files.sock"
    # The socket listens before virtiofsd starts, so nobody has to wait for it to appear.
    with socket.socket(socket.AF_UNIX) as listener, (folder / "virtiofsd.log").open("wb") as log:
        listener.bind(str(address))
        listener.listen()
        argv = await _command_line(listener.fileno())
        async with spawn(argv, stdout=log, pass_fds=[listener.fileno()]):
            # virtiofsd has its own copy: with ours closed, QEMU notices when virtiofsd is gone
            listener.close()
            yield address
    address.unlink()


async def _command_line(fd: int) -> list[str]:
    program = str(_find())
    usage = await output_of(program, "--help", seconds=10, cure=_CURE)
    if "--shared-dir" not in usage:  # the one in C that came with QEMU up to 7.2
        if os.geteuid() != 0:
            raise SetupError(
                f"{program} works for root only", "Run as root, or install a newer virtiofsd (1.7 or later)."
            )
        return [program, f"--fd={fd}", "-o", "source=/,sandbox=chroot,cache=always,log_level=err"]
    argv = [program, f"--fd={fd}", "--shared-dir=/", "--cache=always", "--log-level=error"]
    argv.append("--sandbox=chroot" if os.geteuid() == 0 else "--sandbox=none")
    # The guest would mount this machine's mounts one by one, which its overlay refuses as a lower layer.
    if "--no-announce-submounts" in usage:
        argv.append("--no-announce-submounts")
    return argv


def _find() -> Path:
    found = shutil.which("virtiofsd") or next((path for path in _PLACES if os.access(path, os.X_OK)), None)
    if found is None:
        raise SetupError("virtiofsd, which shares files with the guest, is not installed", _CURE)
    return Path(found)
