"""``ublk del``: stop a device, delete it, leave nothing."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass

from ublkpy.driver import inspect, state
from ublkpy.driver.ctrl import Control
from ublkpy.driver.disk import completed
from ublkpy.driver.users import check_unused, openers
from ublkpy.errors import BusyError, NoDeviceError, UblkError
from ublkpy.system.spawn import isolated, wait_end
from ublkpy.uring.mode import names
from ublkpy.uring.uapi import DevInfo, Feature, State

log = logging.getLogger(__name__)

# Without any request answered. A stop writes the caches out, which may take as long as it takes; Linux 6.12
# may need 30 s to notice that a loaded daemon is dead.
DEADLINE = 60.0
_DAEMON_EXIT = 10.0
_OPEN_DEADLINE = 15.0
_A_DAY = 86400.0
_MARGIN = 5.0


@dataclass(frozen=True)
class _Device:
    """One device, and not only an id, which may be that of another by now.

    ``incarnation`` tells the devices of other servers apart, whose ``ublksrv_flags`` may all be 0; it is
    None for one that has begun to go.
    """

    info: DevInfo
    incarnation: int | None

    @classmethod
    def find(cls, dev_id: int) -> _Device:
        """The device that has the id now. Raises NoDeviceError."""
        with Control() as control:
            return cls(control.info(dev_id), inspect.incarnation(dev_id))

    @property
    def dev_id(self) -> int:
        return self.info.dev_id

    @property
    def cookie(self) -> int:
        return self.info.ublksrv_flags

    def check(self, control: Control) -> None:
        """NoDeviceError if the id is another device's by now. The driver can only be asked before each command."""
        same_cookie = control.info(self.dev_id).ublksrv_flags == self.cookie
        if not same_cookie or inspect.incarnation(self.dev_id) not in (self.incarnation, None):
            raise _another(self.dev_id)

    def daemon(self) -> int | None:
        """Its daemon, if that is ours and alive; the driver's word alone may be about a dead process."""
        return self._server(within=False)

    def program(self) -> int | None:
        """The program that serves it itself, which has other things to do: nobody waits for its end, or kills it."""
        return self._server(within=True)

    def _server(self, *, within: bool) -> int | None:
        known = _known(self.dev_id)
        is_it = known and known.cookie == self.cookie and known.within == within and known.alive()
        return known.pid if known and is_it else None

    def cure(self, *, force: bool) -> str:
        """What to do about a server that does not answer; ``force``: that did not help."""
        if pid := self.program():
            return f"end the program that serves it itself, process {pid}; its requests then fail"
        if force:
            return "end the server with kill -9"
        return f"ublk del --force -n {self.dev_id} kills a daemon of ublkpy; its requests then fail"

    def loses_dirty_pages(self) -> bool:
        """STOP_DEV writes the page cache out, but not on a device with recovery, where it fails new requests
        first (ublk_drv.c, ublk_stop_dev). Without a daemon there is nobody to write to."""
        info = self.info
        return Feature.USER_RECOVERY in info.flags and info.state == State.LIVE and self.daemon() is not None


def delete(
    dev_id: int,
    cookie: int | None = None,
    *,
    force: bool = False,
    spare_used: bool = False,
    wait: bool = True,
    timeout: float = DEADLINE,
) -> None:
    """Stop and delete a device, whoever serves it, dead or alive; with ``cookie``, only the one that bears it.

    Another device that gets the id meanwhile is left alone. Refuses a device in use, unless ``force`` without
    ``spare_used``. With ``force``, a daemon that answers no request for ``timeout`` seconds is killed. Without
    ``wait`` the id may still be taken for a moment after the return. Raises NoDeviceError, BusyError, UblkError.
    """
    device = _Device.find(dev_id)
    if cookie not in (None, device.cookie):
        raise _another(dev_id)
    user = _find_user(device)
    if user and (not force or (spare_used and not isinstance(user, _NoAnswer))):
        raise user
    if user:
        log.warning("%s; deleting it all the same: what uses it gets errors, and then frees the id", user.message)
    # Before it is stopped: a daemon that ends takes its file away, and is then no longer known.
    server = device.daemon()
    _stop_or_kill(device, timeout, force=force)
    # Before the id is free: the file may be that of the next device then.
    state.remove(dev_id, device.cookie)
    try:
        _delete(device, timeout, wait and not user)
    except TimeoutError as e:
        raise UblkError(
            f"device {dev_id} is stopped, but not deleted after {timeout:g} s: it is held open by"
            f" {', '.join(openers(dev_id)) or 'something in the kernel'}",
            "end that, and the device is gone",
        ) from e
    # The daemon itself may be our parent, waiting for us.
    if wait and server not in (None, os.getppid()):
        wait_end(server, _DAEMON_EXIT)


def stop(dev_id: int, *, safe: bool = False, force: bool = False, timeout: float = DEADLINE) -> None:
    """Stop a device and wait until its daemon has ended; the id stays.

    Refuses a device in use unless ``force``, and with ``safe`` one that anybody has open. Raises NoDeviceError,
    BusyError, UblkError.
    """
    device = _Device.find(dev_id)
    user = _find_user(device)
    if user and not force:
        raise user
    server = device.daemon()
    if safe:
        _try_stop(device)
    _stop_or_kill(device, timeout, force=force)
    if server is not None and not wait_end(server, _DAEMON_EXIT) and force:
        log.warning("the daemon of device %d does not end: killing process %d", dev_id, server)
        wait_end(server, _DAEMON_EXIT, kill=True)


def delete_each(dev_ids: list[int], *, force: bool = False, wait: bool = True) -> list[UblkError]:
    """Delete several devices, those on which others stand after those; returns what failed.

    With ``force``, too: a device writes its caches out only as long as the one that it stands on is there.
    """
    errors: dict[int, UblkError] = {}

    def attempt(dev_id: int, spare_used: bool) -> None:
        errors.pop(dev_id, None)
        try:
            delete(dev_id, force=force, spare_used=spare_used, wait=wait)
        except UblkError as e:
            errors[dev_id] = e

    left = list(dev_ids)
    while left:
        for dev_id in left:
            attempt(dev_id, spare_used=True)
        in_use = [dev_id for dev_id in left if isinstance(errors.get(dev_id), BusyError)]
        if len(in_use) == len(left):
            if not force:
                break
            top = _top(in_use)
            attempt(top, spare_used=False)
            in_use.remove(top)
        left = in_use
    return [errors[dev_id] for dev_id in dev_ids if dev_id in errors]


def _top(dev_ids: list[int]) -> int:
    """A device that none of the others stands on, as far as their state files tell; of several the latest, probably."""
    backings = {os.path.realpath(known.backing) for known in map(_known, dev_ids) if known}
    free = [n for n in dev_ids if not any(re.fullmatch(rf"/dev/ublkb{n}(p\d+)?", path) for path in backings)]
    return max(free or dev_ids)


def _known(dev_id: int) -> state.DeviceState | None:
    try:
        return state.read(dev_id)
    except UblkError:
        return None


class _NoAnswer(BusyError):
    """Nobody can tell who uses the device, because its daemon does not answer."""


def _find_user(device: _Device) -> BusyError | None:
    """Who has the device in use. Asked in another process: while a daemon is stuck, no open returns."""
    dev_id = device.dev_id
    try:
        isolated(f"device {dev_id} to be opened", lambda: check_unused(dev_id), _OPEN_DEADLINE)
    except BusyError as e:
        return e
    except TimeoutError:
        return _NoAnswer(
            f"/dev/ublkb{dev_id} cannot be opened: its daemon does not answer",
            device.cure(force=False),
        )
    return None


def _another(dev_id: int) -> NoDeviceError:
    return NoDeviceError(
        f"the device that had the id {dev_id} is gone, and another one has it now", "ublk list shows what there is"
    )


def _try_stop(device: _Device) -> None:
    """TRY_STOP_DEV loses dirty pages as STOP_DEV does; but nobody has it open, and the last who had wrote them."""

    def try_stop() -> None:
        with Control() as control:
            if Feature.SAFE_STOP_DEV not in control.features():
                raise UblkError(
                    f"this kernel's ublk driver lacks {names(Feature.SAFE_STOP_DEV)}, which --safe needs",
                    "use Linux 7.0 or newer; without --safe, a device that is mounted or claimed is refused as well",
                )
            device.check(control)
            control.try_stop(device.dev_id, _A_DAY)  # as in _stop

    try:
        isolated(f"device {device.dev_id} to stop", try_stop, DEADLINE, lambda: completed(device.dev_id))
    except BusyError as e:
        raise BusyError(
            f"device {device.dev_id} is open in {', '.join(openers(device.dev_id)) or 'a process'}", e.hint
        ) from e
    except TimeoutError as e:
        raise UblkError(f"device {device.dev_id} did not stop within {DEADLINE:g} s", "see: ublk list") from e


def _stop_or_kill(device: _Device, timeout: float, *, force: bool) -> None:
    dev_id = device.dev_id
    daemon = device.daemon()
    then = " (else its daemon is killed)" if force and daemon is not None else ""
    try:
        _stop(device, timeout, flush=device.loses_dirty_pages(), then=then)
    except TimeoutError as e:
        daemon = device.daemon()
        if not force or daemon is None:
            raise UblkError(
                f"device {dev_id} did not stop within {timeout:g} s: its server holds requests and does not answer"
                f" them; it is open in {', '.join(openers(dev_id)) or 'no process'}",
                device.cure(force=force),
            ) from e
        log.warning("the daemon of device %d does not answer: killing process %d", dev_id, daemon)
        _stop_without_daemon(device, daemon)


def _stop(device: _Device, timeout: float, *, flush: bool = False, then: str = "") -> None:
    dev_id = device.dev_id

    def stop() -> None:
        if flush:
            _flush(dev_id)
        with Control() as control:
            device.check(control)
            control.stop(dev_id, _A_DAY)  # the process that waits for this one judges, by progress

    # A slow disk is not a stuck one.
    isolated(f"device {dev_id} to stop{then}", stop, timeout, lambda: completed(dev_id))


def _flush(dev_id: int) -> None:
    try:
        fd = os.open(f"/dev/ublkb{dev_id}", os.O_RDONLY | os.O_CLOEXEC)
        os.fsync(fd)
        os.close(fd)
    except OSError as e:
        log.warning("what was not yet written to device %d is lost: %s", dev_id, e.strerror)


def _stop_without_daemon(device: _Device, daemon: int) -> None:
    dev_id = device.dev_id
    wait_end(daemon, DEADLINE, kill=True)
    try:
        _stop(device, DEADLINE)
    except TimeoutError as e:
        raise UblkError(
            f"device {dev_id} did not stop within {DEADLINE:g} s, even without its daemon",
            f"it is held open by {', '.join(openers(dev_id)) or 'something in the kernel'}; see also dmesg",
        ) from e


def _delete(device: _Device, timeout: float, wait: bool) -> None:
    def remove() -> None:
        with Control() as control:
            device.check(control)
            # Not to end first: who waits for this process knows what to say.
            if wait:
                control.delete(device.dev_id, timeout + _MARGIN)
            else:
                control.delete_async(device.dev_id, timeout + _MARGIN)

    def gone() -> bool:
        """Only the id is still taken, until nobody has the device open: all that DEL_DEV_ASYNC would do is done."""
        return not wait and inspect.incarnation(device.dev_id) is None

    isolated(f"device {device.dev_id} to be deleted", remove, timeout, enough=gone)
