"""What a service manager is told about us: systemd's protocol, sd_notify(3), in a datagram a message.

Nothing is sent where nobody asked to be told, which is everywhere but in a unit with ``Type=notify``.
"""

from __future__ import annotations

import contextlib
import os
import socket
from array import array
from collections.abc import Sequence
from typing import Any

from ublkpy.system.wait import readable

_TEXT_LIMIT = 1000
_HEARD = 10.0


class Manager:
    """The service manager that started this process; false if there is none.

    ``period`` is the number of seconds after which ``alive`` is to be said again, None if nobody counts.
    """

    def __init__(self, address: str = "", period: float | None = None) -> None:
        self._address = address
        self.period = period

    @classmethod
    def from_environment(cls) -> Manager:
        """Who started us. What it says about that leaves the environment: our children are not the service."""
        said = {name: os.environ.pop(name, "") for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")}
        meant = said["WATCHDOG_PID"] in ("", str(os.getpid()))
        # Half of what it waits for, as sd_watchdog_enabled(3) advises.
        period = int(said["WATCHDOG_USEC"]) / 2e6 if said["WATCHDOG_USEC"] and meant else None
        return cls(said["NOTIFY_SOCKET"], period)

    def to_dict(self) -> dict[str, Any]:
        """For the process that takes over from this one: ``Manager(**it)``."""
        return {"address": self._address, "period": self.period}

    def __bool__(self) -> bool:
        return bool(self._address)

    def ready(self, status: str) -> None:
        """The service is up."""
        self._tell({"READY": "1", "STATUS": status})

    def main_process(self, pid: int) -> bool:
        """Another process than before is the service; returns when the manager knows: the first one may end then.

        False if it could not be told, or did not say within ten seconds that it knows.
        """
        heard, hears = os.pipe()
        try:
            # It closes this when it has read all that came before.
            told = self._tell({"MAINPID": str(pid)}) and self._tell({"BARRIER": "1"}, [hears])
            os.close(hears)
            return told and bool(readable([heard], _HEARD))
        finally:
            os.close(heard)

    def alive(self) -> None:
        """Keep the watchdog quiet for another while."""
        if self.period:
            self._tell({"WATCHDOG": "1"})

    def stopping(self, status: str) -> None:
        self._tell({"STOPPING": "1", "STATUS": status})

    def failed(self, error: Exception) -> None:
        """The last word: why there is no service, with the number of the error that the system gave."""
        number = next((str(e.errno) for e in _causes(error) if isinstance(e, OSError) and e.errno), "")
        self._tell({"STATUS": str(error)} | ({"ERRNO": number} if number else {}))

    def _tell(self, said: dict[str, str], fds: Sequence[int] = ()) -> bool:
        """One assignment a line; whether that could be sent. That nobody listens any more is no reason to end."""
        if not self._address:
            return False
        text = "\n".join(f"{name}={' '.join(value.split())[:_TEXT_LIMIT]}" for name, value in said.items())
        # A name that begins with @ is an abstract one, unix(7).
        address = self._address.replace("@", "\0", 1) if self._address.startswith("@") else self._address
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendmsg([text.encode(errors="replace")], rights, socket.MSG_DONTWAIT, address)
            return True
        return False


def _causes(error: BaseException | None) -> list[BaseException]:
    found = []
    while error:
        found.append(error)
        error = error.__cause__
    return found
