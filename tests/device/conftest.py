"""A driver is needed here, and nothing may be left behind."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ublkpy.driver import inspect
from ublkpy.driver.ctrl import CONTROL
from ublkpy.testing import ublk_device as ublk_device
from ublkpy.uring.mode import MODES

from . import kernel, traces
from .devices import Devices

_TIMEOUT = 60
_SETTLE = 15.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """No test may hang, for a request that nobody answers cannot be killed; and not all is repeated on each kernel."""
    elsewhere = pytest.mark.skip(reason=f"the same on every kernel: Linux {kernel.FIRST} runs it")
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        if not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(_TIMEOUT))
        if kernel.FIRST != kernel.HERE and item.get_closest_marker("any_kernel"):
            item.add_marker(elsewhere)


@pytest.fixture(scope="session", autouse=True)
def driver() -> Iterator[None]:
    """The ublk driver; where a kernel was asked for, its absence is a failure."""
    problem = ""
    if not CONTROL.exists():
        problem = f"no {CONTROL}: run these tests with python3 -m tests.vm --pytest tests/device"
    elif os.geteuid() != 0:
        problem = "the ublk driver is open to root only"
    if problem and os.environ.get("UBLKPY_KERNEL"):
        pytest.fail(problem)
    elif problem:
        pytest.skip(problem)
    before = traces.present()
    yield
    _expect_nothing_left(before)


@pytest.fixture(autouse=True)
def nothing_left(driver: None) -> Iterator[None]:
    """No device, node, state file or process that was not there before, and a kernel that did not complain."""
    log = kernel.Log()
    before = traces.present()
    yield
    complaints = kernel.complaints(log.lines())
    log.close()
    _expect_nothing_left(before)
    assert not complaints, "the kernel complained:\n" + "\n".join(complaints)


def _expect_nothing_left(before: set[str]) -> None:
    """A daemon may take a moment to end after its device is gone."""
    deadline = time.monotonic() + _SETTLE
    while left := traces.left_since(before):
        if time.monotonic() > deadline:
            described = [traces.describe(what) for what in sorted(left)]
            traces.clear(left)
            pytest.fail("left behind: " + "; ".join(described))
        time.sleep(0.02)


@pytest.fixture(params=list(MODES))
def mode(request: pytest.FixtureRequest) -> str:
    """Each mode that this driver has."""
    missing = MODES[request.param].flags & ~inspect.features()
    if missing:
        pytest.skip(f"this driver lacks {missing!r}")
    return str(request.param)


@pytest.fixture(params=[mode for mode in MODES if not mode.startswith("batch+")])
def way(request: pytest.FixtureRequest) -> str:
    """A mode for each way of the data, with batches where this driver has them."""
    batch = MODES.get(f"batch+{request.param}")
    mode = batch if batch and not batch.flags & ~inspect.features() else MODES[request.param]
    if mode.flags & ~inspect.features():
        pytest.skip(f"this driver lacks {mode.flags & ~inspect.features()!r}")
    return mode.name


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder in memory whose files take O_DIRECT."""
    folder = Path(tempfile.mkdtemp(prefix="ublkpy-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def devices(scratch: Path) -> Iterator[Devices]:
    """Adds devices, and removes them before their files go."""
    added = Devices()
    yield added
    added.close()
