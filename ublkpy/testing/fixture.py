"""A fixture of real block devices, for pytest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ublkpy.device import Device
from ublkpy.errors import DriverError
from ublkpy.tgt.base import Target


@pytest.fixture
def ublk_device() -> Iterator[Callable[..., Device]]:
    """``ublk_device(target, **options)``: a ``Device`` that this process serves, until the end of the test.

    The test is skipped where there is no driver, or no right to add devices. To be imported in ``conftest.py``.
    """
    with contextlib.ExitStack() as stack:

        def make(target: Target, **options: Any) -> Device:
            try:
                return stack.enter_context(Device(target, **options))
            except DriverError as e:
                pytest.skip(f"{e.message}; {e.hint}")

        yield make
