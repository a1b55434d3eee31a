"""State files: written whole or not at all, and read with suspicion."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ublkpy.driver import state
from ublkpy.driver.state import DeviceState, QueueState, process_start_time
from ublkpy.errors import UblkError

STATE = DeviceState(
    dev_id=5,
    cookie=1 << 40,
    pid=4711,
    start_time=42,
    mode="copy",
    queues=[QueueState(0, 12, [0, 1]), QueueState(1, 13, [2])],
    config={"device": {"id": 5}, "target": {"type": "loop", "file": "/Bücher.img"}},
    target={"name": "loop", "offset": 0},
    backing="/Bücher.img",
)


@pytest.fixture
def path(run_dir: Path) -> Path:
    """Where the state of device 5 is; the folder is there."""
    run_dir.mkdir()
    return run_dir / "5.json"


# -- writing -------------------------------------------------------------------------------


def test_round_trip_makes_the_folder(run_dir: Path) -> None:
    state.write(STATE)
    assert state.read(5) == STATE
    assert run_dir.stat().st_mode & 0o777 == 0o755


def test_file_is_for_its_owner_only(path: Path) -> None:
    umask = os.umask(0)
    try:
        state.write(STATE)
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o600


def test_file_is_versioned_json(path: Path) -> None:
    state.write(STATE)
    assert json.loads(path.read_text()) == {"version": 2, **asdict(STATE)}


def test_write_replaces_and_leaves_nothing_else(path: Path) -> None:
    state.write(STATE)
    state.write(replace(STATE, pid=1))
    again = state.read(5)
    assert again
    assert again.pid == 1
    assert [entry.name for entry in path.parent.iterdir()] == ["5.json"]


def test_failed_write_keeps_the_old_file_and_no_part_of_the_new(path: Path) -> None:
    state.write(STATE)
    with pytest.raises(TypeError):
        state.write(replace(STATE, target={"what": object()}))
    assert state.read(5) == STATE
    assert [entry.name for entry in path.parent.iterdir()] == ["5.json"]


def test_failed_rename_leaves_nothing(path: Path) -> None:
    path.mkdir()  # a file cannot replace a folder
    with pytest.raises(UblkError, match=f"cannot write the state file {path}: Is a directory"):
        state.write(STATE)
    assert [entry.name for entry in path.parent.iterdir()] == ["5.json"]


def test_write_over_the_rest_of_a_killed_process(path: Path) -> None:
    """Process ids come again, in a container soon."""
    path.with_name(f"5.{os.getpid()}.new").write_text("half")
    state.write(STATE)
    assert state.read(5) == STATE


# -- reading -------------------------------------------------------------------------------


def test_no_file(run_dir: Path) -> None:
    assert state.read(5) is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "5", '"x"', "null", "{}", '{"version": 2}', '{"version": 2, "queues": 5}', "\x00" * 100],
    ids=["empty", "half", "list", "number", "text", "null", "no version", "no keys", "queues", "zeros"],
)
def test_damaged_file(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(UblkError) as caught:
        state.read(5)
    assert caught.value.message.startswith(f"{path} is damaged: ")
    assert "ublk del -n 5" in caught.value.hint


def test_file_that_is_no_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UblkError, match="is damaged"):
        state.read(5)


@pytest.mark.parametrize("change", [{"extra": 1}, {"queues": [{"q_id": 0}]}, {"queues": [5]}])
def test_file_with_other_keys(path: Path, change: dict[str, object]) -> None:
    path.write_text(json.dumps({"version": 2, **asdict(STATE), **change}))
    with pytest.raises(UblkError, match="is damaged"):
        state.read(5)


@pytest.mark.parametrize("version", [0, 1, "2", None])
def test_file_of_another_version(path: Path, version: object) -> None:
    path.write_text(json.dumps({**asdict(STATE), "version": version}))
    with pytest.raises(UblkError) as caught:
        state.read(5)
    assert caught.value.message == f"{path} was written by another version of ublkpy"
    assert caught.value.hint == "delete the device: ublk del -n 5"


def test_file_that_cannot_be_read(path: Path) -> None:
    path.mkdir()
    with pytest.raises(UblkError, match=r"cannot read .*5\.json: Is a directory"):
        state.read(5)


def test_link(path: Path, tmp_path: Path) -> None:
    """Where it leads, another may say what to recover."""
    state.write(STATE)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UblkError, match=r"cannot read .*5\.json: it is a link"):
        state.read(5)
    state.write(STATE)  # takes its place, and does not follow it
    assert not path.is_symlink()
    assert state.read(5) == STATE


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_others_can_write_is_not_believed(path: Path, what: str) -> None:
    state.write(STATE)
    (path if what == "file" else path.parent).chmod(0o777)
    with pytest.raises(UblkError, match=r"others can write in|may have been written by another"):
        state.read(5)


def test_folder_that_others_can_write_gets_no_file(path: Path) -> None:
    path.parent.chmod(0o777)
    for act in (state.check_folder, lambda: state.write(STATE)):
        with pytest.raises(UblkError, match="others can write in"):
            act()
    assert [*path.parent.iterdir()] == []


# -- removing ------------------------------------------------------------------------------


def test_remove(path: Path) -> None:
    state.write(STATE)
    state.remove(5)
    assert state.read(5) is None
    state.remove(5)  # once more is no error


def test_remove_with_the_devices_cookie(path: Path) -> None:
    state.write(STATE)
    state.remove(5, STATE.cookie)
    assert not path.exists()


def test_remove_spares_the_file_of_a_later_device(path: Path) -> None:
    state.write(STATE)
    state.remove(5, STATE.cookie + 1)
    assert state.read(5) == STATE


def test_remove_takes_a_damaged_file_away(path: Path) -> None:
    path.write_text("{")
    state.remove(5, 1)
    assert not path.exists()


# -- processes -----------------------------------------------------------------------------


def test_start_time_of_this_process() -> None:
    start = process_start_time(os.getpid())
    assert start is not None
    assert start == process_start_time(os.getpid())
    seconds = start / os.sysconf("SC_CLK_TCK")
    assert 0 < seconds <= float(Path("/proc/uptime").read_text().split()[0])


def test_start_time_of_a_process_with_a_wild_name() -> None:
    code = "open('/proc/self/comm', 'w').write('a) Z 1 (b'); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        own = process_start_time(os.getpid())
        start = process_start_time(process.pid)
        assert own is not None
        assert start is not None
        assert start >= own


def test_start_time_of_nobody_and_of_a_zombie() -> None:
    pid = os.fork()
    if pid == 0:
        signal.pause()
    assert process_start_time(pid) is not None
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert process_start_time(pid) is None  # still there, as a zombie
    os.waitpid(pid, 0)
    assert process_start_time(pid) is None


def test_alive() -> None:
    pid = os.getpid()
    start = process_start_time(pid)
    assert start is not None
    assert replace(STATE, pid=pid, start_time=start).alive()
    assert not replace(STATE, pid=pid, start_time=start + 1).alive(), "a later process with the same pid"
    assert not replace(STATE, pid=1 << 22).alive()
