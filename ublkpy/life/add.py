"""``ublk add``: from a configuration to a block device that can be opened."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable

from ublkpy.config import DeviceConfig
from ublkpy.daemon import run
from ublkpy.daemon.plan import Plan
from ublkpy.daemon.server import Server
from ublkpy.driver import ctrl, inspect, state, udev
from ublkpy.driver.delete import delete
from ublkpy.errors import BusyError, DriverError, UblkError
from ublkpy.life import named
from ublkpy.system import spawn

_log = logging.getLogger(__name__)

# In the driver's ublksrv_flags: "ublk" in ASCII, then 32 random bits.
_COOKIE_MARK = 0x75626C6B << 32


def add(
    config: DeviceConfig,
    on_ready: Callable[[int], None] = lambda dev_id: None,
    before: Callable[[], None] = lambda: None,
    *,
    again: bool = False,
) -> int:
    """Serve a device from a daemon of its own; returns its id once its node can be opened.

    ``on_ready`` is called with the id just before, ``before`` when the target is open and nothing else done. ``again``:
    the device that has the name makes place for this one, in ``before``.
    Raises UblkError, also for what the daemon found wrong, KeyboardInterrupt, and what these raise; then nothing is
    left.
    """
    if not again:
        check_name(config)
    plan = make_plan(config)
    try:
        before()
        started = run.start(lambda: run.Start(plan, Server.create), new=True, log_file=config.device.log)
        tell_clamped(config, started.queues)
        on_ready(started.dev_id)
    except BaseException:
        _sweep(plan.cookie)
        raise
    finally:
        config.target.close()
    return started.dev_id


def check_name(config: DeviceConfig) -> None:
    """BusyError if another device has the name; one that is dead for good is deleted."""
    if left := named.waiting(config.device.name, spare_stopped=True):
        raise BusyError(
            f"{left.node} has the name {config.device.name} already, and waits for a daemon",
            f"give it one: ublk recover -n {left.info.dev_id}",
        )


def make_plan(config: DeviceConfig) -> Plan:
    """What is to be served, for a new device; opens the target. UblkError for what is wrong with it already."""
    ctrl.require_right_to_add(unprivileged=config.device.unprivileged)
    if config.device.unprivileged:
        udev.check_set_up()
    state.check_folder()
    return Plan(config, config.open(), _COOKIE_MARK | secrets.randbits(32))


def _sweep(cookie: int) -> None:
    """Delete what a daemon that is dead now may have left in the driver; it bears the cookie."""
    try:
        with spawn.uninterrupted():
            left = inspect.find_by_cookie(cookie)
            if left is not None:
                delete(left, cookie, force=True)
    except DriverError:
        pass  # closed to the daemon as well as to us
    except UblkError as e:
        _log.error("the device could not be taken back: %s", e.message)


def tell_clamped(config: DeviceConfig, queues: int) -> None:
    """Say that the driver gave fewer queues than were asked for."""
    wanted = config.device.queues
    if queues < wanted:
        _log.warning("the driver gave %d of %d queues: it makes no more than there are CPUs", queues, wanted)
