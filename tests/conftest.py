"""What all tests share: stack dumps after a crash, a header, and no unexpected warnings in the log."""

from __future__ import annotations

import faulthandler
import logging
import platform
from collections.abc import Iterator

import pytest

from ublkpy.driver import inspect
from ublkpy.driver.ctrl import CONTROL
from ublkpy.errors import UblkError


def pytest_configure(config: pytest.Config) -> None:
    if not faulthandler.is_enabled():
        faulthandler.enable()
    config.addinivalue_line("markers", "logs: the test may log warnings and errors")


def pytest_report_header() -> str:
    return f"ublkpy: python {platform.python_version()}, kernel {platform.release()}, driver: {_driver()}"


def _driver() -> str:
    if not CONTROL.exists():
        return "none"
    try:
        return f"features {int(inspect.features()):#x}"
    except UblkError as e:
        return e.message


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(f"{record.levelname} {record.name}: {record.getMessage()}")


@pytest.fixture(autouse=True)
def _no_unexpected_warnings(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that logs a warning or worse, unless it looks at the log (caplog) or is marked ``logs``."""
    collector = _Collector()
    logging.getLogger().addHandler(collector)
    yield
    logging.getLogger().removeHandler(collector)
    if collector.messages and "caplog" not in request.fixturenames and not request.node.get_closest_marker("logs"):
        pytest.fail("unexpected in the log:\n" + "\n".join(collector.messages), pytrace=False)
