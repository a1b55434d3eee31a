"""Helpers of the unit tests."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from ublkpy.driver import state

# No deadline: machines may be slow or busy. No database: tests write nothing into the tree.
settings.register_profile("unit", deadline=None, database=None)
settings.load_profile("unit")


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """State files go to a folder of the test."""
    path = tmp_path / "run"
    monkeypatch.setattr(state, "run_dir", lambda: path)
    monkeypatch.setattr(state, "socket_path", lambda dev_id: path / f"{dev_id}.sock")
    return path


@pytest.fixture
def open_fds() -> Callable[[], set[str]]:
    """The file descriptors of this process, each with what it points to."""

    def look() -> set[str]:
        found = set()
        for link in Path("/proc/self/fd").iterdir():
            try:
                found.add(f"{link.name} {link.readlink()}")
            except FileNotFoundError:  # that of the listing itself
                continue
        return found

    return look


@pytest.fixture
def in_child() -> Callable[[Callable[[], object]], Any]:
    """Run a function in a forked process and give back what it returned, as JSON has it."""

    def run(action: Callable[[], object]) -> Any:
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                try:
                    answer = {"value": action()}
                except BaseException:
                    answer = {"error": traceback.format_exc()}
                os.write(write_end, json.dumps(answer).encode())
            finally:
                os._exit(0)
        os.close(write_end)
        with os.fdopen(read_end) as pipe:
            text = pipe.read()
        os.waitpid(pid, 0)
        answer = json.loads(text or '{"error": "the child died"}')
        if "error" in answer:
            pytest.fail(answer["error"])
        return answer["value"]

    return run
