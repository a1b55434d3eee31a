"""What runs inside the machine: an initrd of busybox, modules, scripts and this run's settings."""

import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from . import cpio
from .errors import SetupError
from .kernels import Kernel

# what the guest has mounted afresh, so that this machine's files below are not seen there
PRIVATE = ("/dev", "/proc", "/sys", "/run", "/mnt")
# Lines on the console: what comes after them is not the command's doing.
OVER_MARK = "== tests.vm: the command is over =="
WATCHDOG_MARK = "== tests.vm: the time is almost up, this is what everybody waits for =="

_HERE = Path(__file__).parent
_FOLDERS = ["bin", "dev", "proc", "sys", "modules", "host", "top", "root"]
_WATCHDOG_LEAD = 20


@dataclass(frozen=True)
class Guest:
    """The settings of one run, which the scripts read as shell variables."""

    token: str
    root: Literal["overlay", "direct", "none"]
    """A copy-on-write view of this machine's files; those files themselves; or stop before there is any."""
    command: str = ""
    systemd: str = ""
    """Unless empty, systemd is the init, and this is run before it."""
    folder: Path = Path("/")
    out: Path | None = None
    seconds: float = 0
    environment: Mapping[str, str] = field(default_factory=dict)

    def settings(self) -> str:
        """The file that all scripts source."""
        variables = {
            "token": self.token,
            "root": self.root,
            "command": self.command,
            "systemd": self.systemd,
            "folder": str(self.folder),
            "out": str(self.out or ""),
            "patience": f"{self.seconds - min(_WATCHDOG_LEAD, self.seconds / 4):.1f}",
            "over_mark": OVER_MARK,
            "watchdog_mark": WATCHDOG_MARK,
        }
        lines = [f"{name}={shlex.quote(value)}\n" for name, value in variables.items()]
        lines += [f"export {name}={shlex.quote(value)}\n" for name, value in self.environment.items()]
        return "".join(lines)

    def initrd(self, kernel: Kernel) -> bytes:
        """The first file system, which the kernel unpacks into memory."""
        files = {
            "bin/busybox": (0o755, _busybox().read_bytes()),
            "init": (0o755, (_HERE / "init.sh").read_bytes()),
            "config": (0o644, self.settings().encode()),
        }
        for name in ("guest.sh", "systemd.sh"):
            files[name] = (0o644, (_HERE / name).read_bytes())
        for name in ("ublk_drv.ko", "overlay.ko"):
            files[f"modules/{name}"] = (0o644, (kernel.modules / name).read_bytes())
        return cpio.archive(_FOLDERS, files)


def _busybox() -> Path:
    if found := shutil.which("busybox"):
        return Path(found)
    raise SetupError("the guest's first programs come from busybox, which is not installed", "scripts/setup vm")
