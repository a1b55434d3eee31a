"""A machine that systemd booted is needed here, with what `prepare` put there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.device import kernel

from .units import Unit

_TIMEOUT = 180


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(_TIMEOUT))


@pytest.fixture(scope="session", autouse=True)
def booted() -> None:
    """The guest of ``tests.vm --systemd``; nothing else, for these tests change what a machine has."""
    if Path("/proc/1/comm").read_text() != "systemd\n" or not Path("/run/vm/systemd.sh").exists():
        pytest.skip("run these tests with python3 -m tests.vm --systemd tests/systemd/prepare --pytest tests/systemd")


@pytest.fixture(autouse=True)
def kernel_content(booted: None) -> Iterator[None]:
    """A kernel that did not complain."""
    log = kernel.Log()
    yield
    complaints = kernel.complaints(log.lines())
    log.close()
    assert not complaints, "the kernel complained:\n" + "\n".join(complaints)


@pytest.fixture
def disk() -> Unit:
    """The one that was there at boot, with a mounted file system."""
    return Unit("disk")


@pytest.fixture
def plain() -> Unit:
    """One without recovery, which runs."""
    return _running("plain")


@pytest.fixture
def hangs() -> Unit:
    """One with recovery and a short watchdog, which runs."""
    return _running("hangs")


def _running(name: str) -> Unit:
    unit = Unit(name)
    unit.systemctl("start")
    return unit
