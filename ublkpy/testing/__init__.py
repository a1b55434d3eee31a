"""For the tests of your own targets, with and without a kernel.

::

    from ublkpy.testing import TargetContract, open_disk


    class TestRam(TargetContract):
        @pytest.fixture
        def disk(self):
            with open_disk(Ram({"size": 8 << 20})) as disk:
                yield disk

``ublk_device`` is a fixture for tests that want a device: ``ublk_device(Ram(), queues=2).node``. It needs pytest,
``TargetContract`` also hypothesis; ``open_disk`` and ``open_device`` need nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ublkpy.testing.disk import Disk, open_device, open_disk

if TYPE_CHECKING:
    from ublkpy.testing.contract import TargetContract
    from ublkpy.testing.fixture import ublk_device

_WHERE = {"TargetContract": "ublkpy.testing.contract", "ublk_device": "ublkpy.testing.fixture"}

__all__ = ["Disk", "TargetContract", "open_device", "open_disk", "ublk_device"]


def __getattr__(name: str) -> Any:
    """What needs more than ublkpy comes with its first use."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(_WHERE[name]), name)
