"""The systemd unit that a daemon belongs to, as its control group names it (systemd.unit(5), cgroups(7))."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from ublkpy.errors import UblkError


def of_another(pid: int) -> str | None:
    """The unit of this process; None without one, or if we are in it ourselves."""
    theirs, ours = _groups(pid), _groups("self")
    found = re.findall(r"/([^/\n]+\.service)(?=[/\n])", theirs)
    return found[-1] if found and theirs != ours else None


def reload(unit: str, pid: int, timeout: float) -> None:
    """Have systemd do it, the one that manages this process. Raises UblkError."""
    of_user = ["--user"] if "/user@" in _groups(pid) else []
    hint = f"systemctl status {unit} and journalctl -u {unit} say why"
    try:
        done = subprocess.run(
            ["systemctl", *of_user, "reload", unit], stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout
        )
    except FileNotFoundError as e:
        raise UblkError(f"{unit} cannot be reloaded: there is no systemctl", f"is {unit} of another machine?") from e
    except subprocess.TimeoutExpired as e:
        raise UblkError(f"{unit} was not reloaded within {timeout:g} s", hint) from e
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise UblkError(f"{unit} was not reloaded: {said}", hint)


def _groups(pid: int | str) -> str:
    try:
        return Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return ""
