"""Forks: what comes back through the pipe, and what is left behind: nothing."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ublkpy.driver.state import process_start_time
from ublkpy.errors import BusyError, ConfigError, UblkError
from ublkpy.system import spawn
from ublkpy.system.spawn import Ready, isolated, wait_end

OpenFds = Callable[[], set[str]]
NO_PROCESS = 1 << 22


def nothing() -> None:
    """Succeed at once."""


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens soon."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# -- isolated ------------------------------------------------------------------------------


def test_isolated_runs_in_another_process(tmp_path: Path) -> None:
    isolated("nothing", lambda: (tmp_path / "pid").write_text(str(os.getpid())), 5)
    assert int((tmp_path / "pid").read_text()) != os.getpid()
    assert children() == []


@pytest.mark.parametrize(("result", "seconds"), [(None, 0), ({"a": {"b": 2**64 - 1}}, 0), ([1, "text"], 1.1)])
def test_isolated_returns_what_its_action_returned(result: object, seconds: float) -> None:
    def action() -> object:
        time.sleep(seconds)
        return result

    assert isolated("nothing", action, 5) == result


def test_isolated_returns_nothing_that_it_does_not_wait_for(tmp_path: Path) -> None:
    def action() -> str:
        until((tmp_path / "go").exists)
        return "late"

    assert isolated("nothing", action, 5, enough=lambda: True) is None
    (tmp_path / "go").touch()


@pytest.mark.parametrize("error", [UblkError("a", "b"), BusyError("in use", ""), ConfigError("wrong", "cure")])
def test_isolated_raises_what_its_action_raised(error: UblkError) -> None:
    def action() -> None:
        raise error

    with pytest.raises(UblkError) as caught:
        isolated("nothing", action, 5)
    assert type(caught.value) is type(error)
    assert (caught.value.message, caught.value.hint) == (error.message, error.hint)
    assert children() == []


def test_bug_in_an_isolated_action_shows_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    def action() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(UblkError, match="a helper process died before it was done"):
        isolated("nothing", action, 5)
    assert "RuntimeError: a bug" in caplog.text
    assert children() == []


def test_what_an_isolated_action_logs_is_logged_here(caplog: pytest.LogCaptureFixture) -> None:
    def action() -> None:
        logging.getLogger("any").warning("half of %s", "it")
        raise BusyError("the other half")

    with pytest.raises(BusyError):
        isolated("nothing", action, 5)
    assert caplog.record_tuples == [("ublkpy.system.spawn", logging.WARNING, "half of it")]


def test_isolated_action_that_outlives_us_keeps_no_pipe_open(tmp_path: Path) -> None:
    code = (
        "import os, time\n"
        "from pathlib import Path\n"
        "from ublkpy.system.spawn import isolated\n"
        "os.dup2(1, 9)\n"
        "def action():\n"
        "    while not Path('go').exists(): time.sleep(0.01)\n"
        "try: isolated('the test', action, 0.1)\n"
        "except TimeoutError: print('late')\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path, timeout=30
    )
    (tmp_path / "go").touch()
    assert shown.stdout == b"late\n"


def test_isolated_action_that_is_killed() -> None:
    with pytest.raises(UblkError, match="a helper process died before it was done"):
        isolated("nothing", lambda: os.kill(os.getpid(), signal.SIGKILL), 5)
    assert children() == []


def test_isolated_timeout_leaves_the_child_to_finish(tmp_path: Path) -> None:
    go, done = tmp_path / "go", tmp_path / "done"

    def action() -> None:
        until(go.exists)
        done.touch()

    started = time.monotonic()
    with pytest.raises(TimeoutError):
        isolated("the test", action, 0.1)
    assert time.monotonic() - started < 5
    assert not done.exists()
    go.touch()
    until(done.exists)
    assert children() == []


def test_isolated_says_what_it_waits_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    isolated("quick things", nothing, 60)
    assert caplog.messages == []
    isolated("slow things", lambda: time.sleep(1.2), 60)
    assert caplog.messages == ["waiting for slow things, up to 60 s"]


def test_isolated_child_does_not_flush_what_the_parent_had_to_say() -> None:
    code = (
        "from ublkpy.system.spawn import isolated\n"
        "print('once')\n"
        "isolated('nothing', lambda: None, 5)\n"
        "print('twice')\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "once\ntwice\n"


def test_isolated_child_is_not_ended_by_ctrl_c() -> None:
    isolated("nothing", lambda: os.kill(os.getpid(), signal.SIGINT), 5)


def test_fifty_isolated_calls_leave_no_file_and_no_zombie(open_fds: OpenFds) -> None:
    def fail() -> None:
        raise UblkError("x")

    before = open_fds()
    for _ in range(25):
        isolated("nothing", nothing, 5)
        with pytest.raises(UblkError):
            isolated("nothing", fail, 5)
    assert open_fds() == before
    assert children() == []


# -- daemon --------------------------------------------------------------------------------


def serve(ready: Ready) -> int:
    """A daemon that gets ready and runs until it is asked to end."""
    ready.done({"pid": os.getpid(), "sid": os.getsid(0), "pgid": os.getpgid(0)})
    while True:
        signal.pause()


def test_daemon_is_detached_from_us() -> None:
    child = spawn.daemon(serve)
    done = child.wait(5)
    try:
        assert done["pid"] == child.pid != os.getpid()
        assert done["sid"] != os.getsid(0)
        assert done["sid"] != child.pid, "a session leader could get a terminal"
        assert children() == []
        assert parent_of(child.pid) != os.getpid()
    finally:
        child.end()
        child.close()
    assert process_start_time(child.pid) is None


def test_daemon_that_fails_tells_why() -> None:
    def body(ready: Ready) -> int:
        ready.failed(BusyError("in use", "wait"))
        return 1

    child = spawn.daemon(body)
    with pytest.raises(BusyError) as caught:
        child.wait(5)
    assert (caught.value.message, caught.value.hint) == ("in use", "wait")
    child.close()
    until(lambda: process_start_time(child.pid) is None)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_death_without_a_word(number: signal.Signals) -> None:
    def body(ready: Ready) -> int:
        os.kill(os.getpid(), number)
        return 0

    child = spawn.daemon(body)
    with pytest.raises(EOFError):
        child.wait(5)
    child.end()  # nobody to end
    child.close()


def test_return_without_a_word() -> None:
    child = spawn.daemon(lambda ready: 0)
    with pytest.raises(EOFError):
        child.wait(5)
    child.close()


def test_bug_in_a_daemon_shows_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    def body(ready: Ready) -> int:
        raise RuntimeError("a bug")

    child = spawn.daemon(body)
    with pytest.raises(EOFError):
        child.wait(5)
    until(lambda: process_start_time(child.pid) is None)
    child.close()
    assert "RuntimeError: a bug" in capfd.readouterr().err


def test_ctrl_c_waits_until_somebody_attends_to_the_daemon() -> None:
    """Else it could end the command in between, and nobody would end the daemon."""
    child = spawn.daemon(serve)
    try:
        signal.raise_signal(signal.SIGINT)
        assert process_start_time(child.pid) is not None
        with pytest.raises(KeyboardInterrupt):
            child.attend()
    finally:
        child.end()
        child.close()
    assert process_start_time(child.pid) is None
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_wait_has_a_deadline_and_end_ends_the_daemon() -> None:
    def body(ready: Ready) -> int:
        while True:
            signal.pause()

    child = spawn.daemon(body)
    with pytest.raises(TimeoutError):
        child.wait(0.1)
    assert process_start_time(child.pid) is not None
    child.end()
    assert process_start_time(child.pid) is None
    child.close()


def test_end_kills_a_daemon_that_does_not_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(ready: Ready) -> int:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return serve(ready)

    monkeypatch.setattr(spawn, "_ORDERLY_END", 0.2)
    child = spawn.daemon(body)
    child.wait(5)
    child.end()
    until(lambda: process_start_time(child.pid) is None)
    child.close()


def test_end_gives_ctrl_c_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    child = spawn.daemon(serve)
    child.wait(5)
    child.end()
    child.close()
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_uninterrupted_is_not_interrupted(number: signal.Signals) -> None:
    before = signal.signal(number, signal.default_int_handler)
    try:
        with spawn.uninterrupted():
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    finally:
        signal.signal(number, before)


def test_daemon_ignores_ctrl_c_and_ends_with_sigterm() -> None:
    child = spawn.daemon(serve)
    child.wait(5)
    os.kill(child.pid, signal.SIGINT)
    assert not wait_end(child.pid, 0.1)
    os.kill(child.pid, signal.SIGTERM)
    assert wait_end(child.pid, 5)
    child.close()


def test_daemon_outlives_a_command_that_does_not_wait_and_knows_of_it(tmp_path: Path) -> None:
    go, heard = tmp_path / "go", tmp_path / "heard"

    def body(ready: Ready) -> int:
        until(go.exists)
        heard.with_suffix(".new").write_text(str(ready.done({})))
        heard.with_suffix(".new").rename(heard)
        return 0

    child = spawn.daemon(body)
    assert child.pid
    child.close()
    go.touch()
    until(heard.exists)
    assert heard.read_text() == "False"


def test_daemon_that_is_heard_knows_of_it(tmp_path: Path) -> None:
    def body(ready: Ready) -> int:
        return 0 if ready.done({}) else 1

    child = spawn.daemon(body)
    assert child.wait(5) == {}
    child.close()


def test_end_at_once_gives_no_time_for_good_order(tmp_path: Path) -> None:
    def body(ready: Ready) -> int:
        signal.signal(signal.SIGTERM, lambda number, frame: (tmp_path / "asked").touch())
        return serve(ready)

    child = spawn.daemon(body)
    child.wait(5)
    child.end(kill=True)
    child.close()
    assert process_start_time(child.pid) is None
    assert not (tmp_path / "asked").exists()


def test_daemons_leave_no_file_and_no_zombie(open_fds: OpenFds) -> None:
    before = open_fds()
    for _ in range(10):
        child = spawn.daemon(lambda ready: 0)
        with pytest.raises(EOFError):
            child.wait(5)
        child.close()
    assert open_fds() == before
    assert children() == []


def test_fork_that_fails_half_way_does_not_double_the_command() -> None:
    """The second fork of a daemon may fail where the first did not; only the command may go on."""
    code = """
import os
from ublkpy.system import spawn

command, fork = os.getpid(), os.fork

def fork_once():
    if os.getpid() != command:
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return fork()

os.fork = fork_once
try:
    spawn.daemon(lambda ready: 0).wait(5)
except Exception as e:
    print(type(e).__name__)
print("end", flush=True)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "EOFError\nend\n"
    assert "BlockingIOError" in shown.stderr


def test_large_message_comes_whole() -> None:
    def body(ready: Ready) -> int:
        ready.failed(UblkError("x" * 60000))
        return 0

    child = spawn.daemon(body)
    with pytest.raises(UblkError, match=r"^x{60000}$"):
        child.wait(5)
    child.close()


# -- waiting for processes -----------------------------------------------------------------


@pytest.mark.parametrize("kill", [False, True])
def test_end_of_nobody(kill: bool) -> None:
    assert wait_end(NO_PROCESS, 0, kill=kill)


def test_end_of_an_id_that_is_no_longer_of_a_process() -> None:
    """As an id is while the kernel releases its process, a thread's is known and of no process."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        assert thread.native_id is not None
        assert wait_end(thread.native_id, 0)
    finally:
        done.set()
        thread.join()


def test_wait_end_and_kill(open_fds: OpenFds) -> None:
    before = open_fds()
    pid = os.fork()
    if pid == 0:
        while True:
            signal.pause()
    assert not wait_end(pid, 0.05)
    assert wait_end(pid, 5, kill=True)
    assert wait_end(pid, 0), "a zombie has ended"
    os.waitpid(pid, 0)
    assert open_fds() == before
