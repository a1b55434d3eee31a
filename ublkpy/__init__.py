"""Block devices in user space for Linux, in Python, at native speed."""

from typing import TYPE_CHECKING, Any

from ublkpy.version import __version__

if TYPE_CHECKING:
    from ublkpy.device import Device

__all__ = ["Device", "__version__"]


def __getattr__(name: str) -> Any:
    """What takes time to import comes with its first use."""
    if name != "Device":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from ublkpy.device import Device

    return Device
