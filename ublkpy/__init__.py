"""Block devices in user space for Linux, in Python, at native speed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ublkpy.version import __version__

if TYPE_CHECKING:
    from ublkpy.device import Device
    from ublkpy.errors import ConfigError, UblkError
    from ublkpy.program import main
    from ublkpy.tgt.base import Geometry, Target
    from ublkpy.tgt.options import Duration, Offset, Rate, Size, option
    from ublkpy.uring.map import (
        Error,
        Extent,
        Fault,
        Faulty,
        File,
        Map,
        Memory,
        Mirror,
        Null,
        OpenFile,
        Pattern,
        Routing,
        Space,
        Spaces,
        Stripe,
        Sync,
        Upcall,
        Zero,
    )
    from ublkpy.uring.queue import Request
    from ublkpy.uring.uapi import IoFlag, Op
    from ublkpy.uring.zones import Zone, ZoneCond, Zones, ZoneType

_WHERE = {
    "ublkpy.device": ("Device",),
    "ublkpy.errors": ("ConfigError", "UblkError"),
    "ublkpy.program": ("main",),
    "ublkpy.tgt.base": ("Geometry", "Target"),
    "ublkpy.tgt.options": ("Duration", "Offset", "Rate", "Size", "option"),
    "ublkpy.uring.map": (
        "Error",
        "Extent",
        "Fault",
        "Faulty",
        "File",
        "Map",
        "Memory",
        "Mirror",
        "Null",
        "OpenFile",
        "Pattern",
        "Routing",
        "Space",
        "Spaces",
        "Stripe",
        "Sync",
        "Upcall",
        "Zero",
    ),
    "ublkpy.uring.queue": ("Request",),
    "ublkpy.uring.uapi": ("IoFlag", "Op"),
    "ublkpy.uring.zones": ("Zone", "ZoneCond", "ZoneType", "Zones"),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "ConfigError",
    "Device",
    "Duration",
    "Error",
    "Extent",
    "Fault",
    "Faulty",
    "File",
    "Geometry",
    "IoFlag",
    "Map",
    "Memory",
    "Mirror",
    "Null",
    "Offset",
    "Op",
    "OpenFile",
    "Pattern",
    "Rate",
    "Request",
    "Routing",
    "Size",
    "Space",
    "Spaces",
    "Stripe",
    "Sync",
    "Target",
    "UblkError",
    "Upcall",
    "Zero",
    "Zone",
    "ZoneCond",
    "ZoneType",
    "Zones",
    "__version__",
    "main",
    "option",
]


def __getattr__(name: str) -> Any:
    """What takes time to import comes with its first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(_MODULE_OF[name]), name)
