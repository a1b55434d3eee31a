"""``ublk add --foreground``: a device that this very process serves, for a terminal or a service manager."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ublkpy.config import DeviceConfig
from ublkpy.daemon.host import heed_signals
from ublkpy.daemon.notify import Manager
from ublkpy.daemon.run import Start, announce, wait_node
from ublkpy.daemon.server import Server
from ublkpy.driver import inspect
from ublkpy.errors import UblkError
from ublkpy.life import named, recover
from ublkpy.life.add import make_plan, tell_clamped
from ublkpy.system import log, process

_log = logging.getLogger(__name__)


def serve(config: DeviceConfig, on_ready: Callable[[int], None]) -> int:
    """Serve a device from this process until SIGTERM, SIGINT or its deletion; returns the exit status.

    That is a new device, or the one that has the same name and waits for a daemon. ``on_ready`` is called with
    the id once the node can be opened. Logs go to stderr. Raises UblkError.
    """
    manager = Manager.from_environment()
    try:
        log.to_terminal()
        left = named.waiting(config.device.name)
        start = Start(make_plan(config), Server.create) if left is None else _recovery(left, config)
        log.hear(type(config.target).__module__)
        process.harden()
        process.leave_mounts(start.plan.config.target.paths())
        server = Server(start.plan, manager)
        heed_signals(server)
        info = start.bring_up(server)
        log.name_device(info.dev_id)
        tell_clamped(config, info.nr_hw_queues)
        _announce(server, info.dev_id, on_ready, new=left is None)
    except UblkError as e:
        manager.failed(e)
        raise
    announce(manager, info.dev_id)
    return server.serve(info)


def _recovery(left: inspect.DeviceStatus, config: DeviceConfig) -> Start:
    """As ``ublk recover``: with the options that the device was added with. After a failure it waits on."""
    _log.info("taking up %s again, whose daemon died", left.node)
    if left.known and left.known.config != config.dump():
        _log.warning("%s keeps the options that it was added with; a new one would have others", left.node)
    return recover.prepare(left.info.dev_id)


def _announce(server: Server, dev_id: int, on_ready: Callable[[int], None], *, new: bool) -> None:
    """Wait until the node can be opened, and say so; a new device of which nobody hears is taken back."""
    try:
        wait_node(dev_id)
        on_ready(dev_id)
    except BaseException as e:
        if new:
            server.abandon(dev_id)
        if new or not isinstance(e, UblkError):
            raise
        _log.warning("%s", e.message)
