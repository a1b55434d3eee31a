"""Waiting for a mirror, without a device."""

from __future__ import annotations

import os
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest

from ublkpy.driver import inspect
from ublkpy.errors import UblkError
from ublkpy.life import resync
from ublkpy.tgt.base import Progress
from ublkpy.uring.uapi import State


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second goes with each look."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(resync, "time", SimpleNamespace(monotonic=lambda: next(ticks), sleep=lambda _: None))
    served = SimpleNamespace(known=True, info=SimpleNamespace(state=State.LIVE), pid=os.getpid())
    monkeypatch.setattr(inspect, "status", lambda _: served)


def answers(monkeypatch: pytest.MonkeyPatch, *told: Progress) -> None:
    """What the daemon says, one after the other; the last of it again and again."""
    left = list(told)

    def ask(_dev_id: int, order: str, _timeout: float, **_: Any) -> dict[str, Any]:
        if order == "resync":
            return {}
        return asdict(left.pop(0) if len(left) > 1 else left[0])

    monkeypatch.setattr(resync, "ask", ask)


def test_where_nothing_moves(monkeypatch: pytest.MonkeyPatch, clock: None) -> None:
    answers(monkeypatch, Progress(1000, 0), Progress(1000, 10))
    with pytest.raises(UblkError) as caught:
        resync.resync(0)
    assert caught.value.message == "device 0 is not in sync yet, and nothing was copied for 120 s"
    assert "a leg may not answer" in caught.value.hint


def test_slowly_is_good_enough(monkeypatch: pytest.MonkeyPatch, clock: None) -> None:
    said = [Progress(1000, n) for n in range(1000) for _ in range(2)]
    answers(monkeypatch, *said, Progress(1000, 1000, is_over=True))
    told: list[int] = []
    resync.resync(0, tell=lambda progress: told.append(progress.done))
    assert told[-1] == 1000
