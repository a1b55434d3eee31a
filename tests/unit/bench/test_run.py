"""The programs that servers are made of."""

import os
import signal
from pathlib import Path

import pytest

from bench.servers import Place
from bench.servers.run import ServerError, process, run, until


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path, tmp_path / "disk.img", tmp_path, queues=1)


def test_what_it_prints() -> None:
    assert run("echo", Path("/a b")) == "/a b\n"


def test_a_failure_names_program_and_reason() -> None:
    with pytest.raises(ServerError, match=r"^sh -c .*: exit status 3: because$"):
        run("sh", "-c", "echo because >&2; exit 3")
    with pytest.raises(ServerError, match="nonexistent"):
        run("/nonexistent")


def test_one_that_does_not_end() -> None:
    with pytest.raises(ServerError, match=r"did not end within 0.05 s"):
        run("sleep", "60", seconds=0.05)


def test_a_daemon_left_behind_does_not_hold_us(tmp_path: Path) -> None:
    assert run("sh", "-c", f"sleep 60 & echo $! > {tmp_path}/pid; echo done", seconds=10) == "done\n"
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_a_server_lives_as_long_as_the_block(place: Place) -> None:
    with process(place, "sleep", "60") as running:
        assert running.poll() is None
    assert running.poll() is not None


def test_the_error_has_what_the_server_said(place: Place) -> None:
    def serve() -> None:
        with process(place, "sh", "-c", "echo no room"):
            until(lambda: bool((place.folder / "server.log").read_text()), "words")
            raise ServerError("in vain")

    with pytest.raises(ServerError, match=r"^in vain; sh said: no room$"):
        serve()
    assert not list(place.folder.iterdir())
