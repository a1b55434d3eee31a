"""Where a load runs."""

import os
import threading
from pathlib import Path

import pytest

from bench import cpus
from bench.servers import Served


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0\n", [0]), ("0, 2\n", [0, 2]), ("1, 3, 5\n", [1, 3, 5])],
)
def test_lists_of_cpus(text: str, numbers: list[int]) -> None:
    assert cpus.parse(text) == numbers


@pytest.fixture
def block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device with two hardware queues, in a folder instead of /sys/block."""
    for number, text in enumerate(("0, 2", "1, 3")):
        queue = tmp_path / "disk" / "mq" / str(number)
        queue.mkdir(parents=True)
        (queue / "cpu_list").write_text(f"{text}\n")
    monkeypatch.setattr(cpus, "_BLOCK", tmp_path)
    return Path("/dev/disk")


@pytest.mark.parametrize(("jobs", "chosen"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (5, [0, 1, 2, 3, 0])])
def test_jobs_take_the_queues_by_turns(block: Path, jobs: int, chosen: list[int]) -> None:
    assert cpus.of_jobs(Served(block), jobs) == chosen


def test_away_from_a_thread_of_the_server(block: Path) -> None:
    settled, done = threading.Event(), threading.Event()

    def serve() -> None:
        os.sched_setaffinity(0, {0})
        settled.set()
        done.wait()

    server = threading.Thread(target=serve)
    server.start()
    try:
        assert settled.wait(10)
        assert cpus.of_jobs(Served(block, os.getpid()), 2) == [2, 1]
    finally:
        done.set()
        server.join()
