"""What the command asks of a running daemon, over a socket beside the state file.

One packet of JSON each way: ``{"do": NAME, ...}``, and then ``{"done": {...}}`` or ``{"error": {...}}``. The daemon's
main thread answers one after the other, so an order must not wait for the device itself. Only root and the daemon's
own user are heard (SO_PEERCRED, unix(7)); who has hung up meanwhile has given up, and nothing is done for him.

One order is the channel's own: ``hold`` stands as long as the connection does, and ends with the process that gave it.
It keeps the state file, or is the only one of its kind: two commands that change the size would cut each other's data.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ublkpy import folders
from ublkpy.driver import state
from ublkpy.errors import BusyError, UblkError, from_dict

_log = logging.getLogger(__name__)

Orders = Mapping[str, Callable[..., dict[str, Any]]]

_MAX_BYTES = 65536
_HEARS = 1.0  # seconds for a client to say what it wants
_HOLD = "hold"

KEEP = "keep"
"""A hold: the state file stays when the daemon ends in good order."""
RESIZE = "resize"
UPGRADE = "upgrade"
"""Holds that exclude another of the same kind."""

_ucred = struct.Struct("iII")  # pid, uid, gid: unix(7)


class SilentError(UblkError):
    """The daemon is there, but does not answer in time."""


class Channel:
    """The daemon's end. ``orders`` are called in the thread that calls ``answer``; UblkError is an answer, too."""

    def __init__(self, dev_id: int, orders: Orders) -> None:
        self._orders = {**orders, _HOLD: self._check_hold}
        self._holders: list[tuple[str, socket.socket, int]] = []  # what, and the process that said so
        self.has_lost_holder = False  # one that was about to go on with the device
        self._path = state.channel_path(dev_id)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            folders.listen(self._listener, self._path)
        except OSError as e:
            self._listener.close()
            raise UblkError(f"cannot make the socket {self._path}: {e.strerror or e}") from e

    def fileno(self) -> int:
        """Readable when somebody has something to ask."""
        return self._listener.fileno()

    def answer(self) -> None:
        """Hear one client, and do what it asks."""
        try:
            client, _ = self._listener.accept()
        except OSError:
            return  # it has gone again
        with contextlib.suppress(OSError):
            client.settimeout(_HEARS)
            pid, uid, _ = _ucred.unpack(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _ucred.size))
            reply = self._hear(client, uid)
            client.send(json.dumps(reply).encode())
            if what := reply.get("done", {}).get(_HOLD):
                self._holders.append((what, client, pid))
                return
        client.close()

    def holder(self, what: str) -> int | None:
        """The process that has given such a hold, if any."""
        for holder in [holder for holder in self._holders if _has_hung_up(holder[1])]:
            self._holders.remove(holder)
            holder[1].close()
            self.has_lost_holder |= holder[0] in (KEEP, UPGRADE)
        return next((pid for kind, _, pid in self._holders if kind == what), None)

    def _check_hold(self, what: str) -> dict[str, Any]:
        if what != KEEP and self.holder(what):
            raise BusyError(f"another command is about to {what} the device", "wait until that is done")
        return {_HOLD: what}

    def close(self) -> None:
        """Hear nobody any more."""
        self._path.unlink(missing_ok=True)
        for sock in (self._listener, *(client for _, client, _ in self._holders)):
            sock.close()

    def _hear(self, client: socket.socket, uid: int) -> dict[str, dict[str, Any]]:
        """The reply to an order. OSError if nobody waits for that."""
        try:
            if uid not in (0, os.geteuid()):
                raise UblkError("only root and the owner of the device may ask its daemon")
            order = json.loads(client.recv(_MAX_BYTES))
            action = self._orders.get(order.pop("do"))
            if action is None:
                raise UblkError("the daemon is of another version, and does not know this order")
            if _has_hung_up(client):
                raise ConnectionAbortedError
            return {"done": _obey(action, order)}
        except UblkError as e:
            return {"error": e.to_dict()}
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            _log.warning("an order that cannot be understood: %s", e)
            return {"error": UblkError(f"the daemon does not understand: {e}").to_dict()}


def _obey(action: Callable[..., dict[str, Any]], order: dict[str, Any]) -> dict[str, Any]:
    try:
        return action(**order)
    except OSError as e:  # not one of the connection
        raise UblkError(f"the daemon cannot do it: {e.strerror or e}", "its log may say more") from e


def _has_hung_up(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return not client.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


def ask(dev_id: int, order: str, timeout: float, **values: Any) -> dict[str, Any]:
    """Have the daemon of a device do something. Raises its UblkError, or one that says why it does not answer."""
    with _asked(dev_id, order, timeout, **values) as done:
        return done


@contextlib.contextmanager
def held(dev_id: int, what: str, timeout: float) -> Iterator[None]:
    """KEEP, RESIZE or UPGRADE for as long as the block lasts. Raises as ``ask``, and BusyError."""
    with _asked(dev_id, _HOLD, timeout, what=what):
        yield


@contextlib.contextmanager
def _asked(dev_id: int, order: str, timeout: float, **values: Any) -> Iterator[dict[str, Any]]:
    """The answer, with the connection open for as long as the block lasts."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as daemon:
        reply = _exchange(daemon, dev_id, order, timeout, values)
        if "error" in reply:
            raise from_dict(reply["error"])
        yield reply["done"]


def _exchange(
    daemon: socket.socket, dev_id: int, order: str, timeout: float, values: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    try:
        daemon.settimeout(timeout)
        daemon.connect(str(state.channel_path(dev_id)))
        daemon.send(json.dumps({"do": order, **values}).encode())
        reply: dict[str, dict[str, Any]] = json.loads(daemon.recv(_MAX_BYTES))
    except TimeoutError as e:
        raise SilentError(
            f"the daemon of device {dev_id} does not answer within {timeout:g} s",
            f"kill it, and: ublk recover -n {dev_id}; or end the device with: ublk del --force -n {dev_id}",
        ) from e
    except (OSError, ValueError) as e:  # an empty packet is an end
        raise UblkError(
            f"the daemon of device {dev_id} cannot be reached: {e}", "ublk list shows whether it is alive"
        ) from e
    return reply
