"""The check of the log that every test gets: it must be able to fail one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

TESTS = """
import logging
import pytest

def test_info():
    logging.getLogger("x").info("fine")

def test_warning():
    logging.getLogger("x").warning("careful")

@pytest.mark.logs
def test_marked():
    logging.getLogger("x").error("expected")

def test_caplog(caplog):
    logging.getLogger("x").error("looked at")
"""


def test_unexpected_warning_fails_the_test(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parents[1] / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "4 passed, 1 error" in done.stdout
    assert "ERROR at teardown of test_warning" in done.stdout
    assert "WARNING x: careful" in done.stdout
    assert "\nublkpy: python " in done.stdout
