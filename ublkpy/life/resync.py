"""``ublk resync``: have the daemon bring back what a device had to go on without, and see how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable

from ublkpy.daemon.channel import ask
from ublkpy.driver import inspect
from ublkpy.errors import UblkError
from ublkpy.tgt.base import Progress
from ublkpy.uring.uapi import State

_ANSWER = 30.0
_PERIOD = 0.2
_SILENCE = 120.0


def resync(dev_id: int, *, force: bool = False, tell: Callable[[Progress], None] = lambda _: None) -> None:
    """Begin, or join one that is under way, and wait for its end; ``tell`` is called now and then.

    Who interrupts it, interrupts the waiting alone. Raises UblkError, also when nothing moves for two minutes.
    """
    device = inspect.status(dev_id)
    if not device.known:
        raise UblkError(f"device {dev_id} is served by another program", "use the tool that added it")
    if device.info.state != State.LIVE or device.pid is None:
        raise UblkError(f"device {dev_id} is {device.info.state.name}, and nobody serves it", device.advice)
    ask(dev_id, "resync", _ANSWER, force=force)
    hint = "ublk list, and its log, may say more"
    before, since = None, time.monotonic()
    while True:
        found = ask(dev_id, "progress", _ANSWER)
        if not found:
            raise UblkError(
                f"device {dev_id} has another daemon now, which was not asked", f"again: ublk resync -n {dev_id}"
            )
        progress = Progress(**found)
        tell(progress)
        if progress.error:
            raise UblkError(f"device {dev_id} is not in sync: {progress.error}", progress.hint or hint)
        if progress.is_over:
            return
        if progress != before:
            before, since = progress, time.monotonic()
        elif time.monotonic() - since > _SILENCE:
            raise UblkError(
                f"device {dev_id} is not in sync yet, and nothing was copied for {_SILENCE:g} s",
                "a leg may not answer: the kernel log (dmesg) may say which; copying goes on as soon as it does",
            )
        time.sleep(_PERIOD)
