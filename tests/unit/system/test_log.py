"""The daemon's log: to a file, the journal or the terminal, each line with its device."""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ublkpy.errors import UblkError
from ublkpy.system import log

InChild = Callable[[Callable[[], object]], Any]
Journal = Callable[[], str]

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"


def words() -> None:
    """What a daemon may have to say."""
    logger = logging.getLogger("ublkpy.test")
    logger.info("hello {device} %s", "100%")
    log.name_device(5)
    logger.warning("careful")
    try:
        raise ValueError("first line\nsecond line")
    except ValueError:
        logger.exception("a bug")
    logger.critical("the end")


def write_to(file: Path | None) -> None:
    log.detach(file)
    words()


# -- a file --------------------------------------------------------------------------------


def test_lines_of_a_file(tmp_path: Path, in_child: InChild) -> None:
    path = tmp_path / "x.log"
    in_child(lambda: write_to(path))
    lines = path.read_text().splitlines()
    assert re.fullmatch(rf"{TIME} ublk\[\d+\]: INFO: hello {{device}} 100%", lines[0])
    assert re.fullmatch(rf"{TIME} ublkb5\[\d+\]: WARNING: careful", lines[1])
    assert lines[2].endswith("]: ERROR: a bug")
    assert lines[3].endswith("Traceback (most recent call last):")
    assert lines[-2].endswith("second line")
    assert lines[-1].endswith("]: CRITICAL: the end")


def test_each_line_of_a_traceback_carries_time_and_device(tmp_path: Path, in_child: InChild) -> None:
    path = tmp_path / "x.log"
    in_child(lambda: write_to(path))
    for line in path.read_text().splitlines()[1:]:
        assert re.match(rf"{TIME} ublkb5\[\d+\]: ", line)


def test_file_is_appended_to(tmp_path: Path, in_child: InChild) -> None:
    path = tmp_path / "x.log"
    path.write_text("old\n")
    in_child(lambda: write_to(path))
    in_child(lambda: write_to(path))
    text = path.read_text()
    assert text.startswith("old\n")
    assert text.count("careful") == 2


def test_new_file_is_not_for_everybody(tmp_path: Path, in_child: InChild) -> None:
    path = tmp_path / "x.log"
    in_child(lambda: write_to(path))
    assert path.stat().st_mode & 0o007 == 0


def test_debug_is_left_out(tmp_path: Path, in_child: InChild) -> None:
    path = tmp_path / "x.log"

    def talk() -> None:
        log.detach(path)
        logging.getLogger("ublkpy.test").debug("chatter")

    in_child(talk)
    assert path.read_text() == ""


def test_stderr_itself_goes_to_the_log_and_the_rest_to_nothing(tmp_path: Path, in_child: InChild) -> None:
    path = tmp_path / "x.log"

    def crash() -> list[str]:
        log.detach(path)
        os.write(2, b"Fatal Python error\n")
        os.write(1, b"nobody reads this")
        assert os.read(0, 1) == b""
        return [str(Path(f"/proc/self/fd/{fd}").readlink()) for fd in (0, 1, 2)]

    assert in_child(crash) == ["/dev/null", "/dev/null", str(path)]
    assert path.read_text() == "Fatal Python error\n"


def test_detach_leaves_no_file_open(tmp_path: Path, in_child: InChild) -> None:
    def count() -> list[int]:
        before = len([*Path("/proc/self/fd").iterdir()])
        log.detach(tmp_path / "x.log")
        return [before, len([*Path("/proc/self/fd").iterdir()])]

    before, after = in_child(count)
    assert after == before


@pytest.mark.parametrize("name", ["no/such/folder/x.log", "."])
def test_file_that_cannot_be_opened(tmp_path: Path, name: str, in_child: InChild) -> None:
    def fail() -> list[str]:
        with pytest.raises(UblkError) as caught:
            log.detach(tmp_path / name)
        return [caught.value.message, caught.value.hint]

    message, hint = in_child(fail)
    assert message.startswith(f"cannot open the log {tmp_path / name}: ")
    assert hint == "name another one with --log FILE"


@pytest.mark.parametrize(("said", "prefix"), [(True, "<6>ublk: "), (False, "ublk: INFO: ")])
def test_terminal_that_is_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_child: InChild, said: bool, prefix: str
) -> None:
    """systemd names the stream that it connected to the journal; stderr may be another one."""
    path = tmp_path / "stderr"
    path.touch()
    inode = path.stat().st_ino if said else 1
    monkeypatch.setenv("JOURNAL_STREAM", f"{path.stat().st_dev}:{inode}")

    def talk() -> None:
        os.dup2(os.open(path, os.O_WRONLY), 2)
        sys.__stderr__ = open(2, "w", closefd=False)  # type: ignore[misc]  # noqa: SIM115
        log.to_terminal()
        logging.getLogger("ublkpy.test").info("hello")
        sys.__stderr__.flush()

    in_child(talk)
    assert path.read_text() == f"{prefix}hello\n"


def test_without_a_journal_the_file_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_child: InChild) -> None:
    monkeypatch.setattr(log, "JOURNAL", tmp_path / "no socket")
    monkeypatch.setattr(log, "log_file", lambda: tmp_path / "ublkpy.log")
    in_child(lambda: write_to(None))
    assert "careful" in (tmp_path / "ublkpy.log").read_text()


# -- the journal ---------------------------------------------------------------------------


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    """A listener where journald's would be; gives back all that one client sent."""
    path = tmp_path / "journal"
    monkeypatch.setattr(log, "JOURNAL", path)
    monkeypatch.setattr(log, "log_file", lambda: tmp_path / "ublkpy.log")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(5)

        def receive() -> str:
            connection, _ = listener.accept()
            with connection, connection.makefile() as stream:
                return stream.read()

        yield receive


def test_header_of_a_journal_stream(journal: Journal, in_child: InChild) -> None:
    in_child(lambda: log.detach(None))
    # systemd's stream protocol: identifier, unit, priority, level prefix, to syslog, to kmsg, to console
    assert journal().split("\n") == ["ublkpy", "", "6", "1", "0", "0", "0", ""]


def test_lines_of_the_journal_carry_priority_and_device(journal: Journal, in_child: InChild, tmp_path: Path) -> None:
    in_child(lambda: write_to(None))
    lines = journal().splitlines()[7:]
    assert lines[0] == "<6>ublk: hello {device} 100%"
    assert lines[1] == "<4>ublkb5: careful"
    assert lines[2] == "<3>ublkb5: a bug"
    assert lines[3] == "<3>ublkb5: Traceback (most recent call last):"
    assert lines[-3:] == ["<3>ublkb5: ValueError: first line", "<3>ublkb5: second line", "<2>ublkb5: the end"]
    assert all(line.startswith("<3>ublkb5: ") for line in lines[2:-1])
    assert not (tmp_path / "ublkpy.log").exists()


def test_file_that_was_asked_for_wins_over_the_journal(journal: Journal, in_child: InChild, tmp_path: Path) -> None:
    in_child(lambda: write_to(tmp_path / "mine.log"))
    assert "careful" in (tmp_path / "mine.log").read_text()


def test_journal_that_nobody_reads_is_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_child: InChild
) -> None:
    """A socket is left behind by a journald that was stopped."""
    monkeypatch.setattr(log, "JOURNAL", tmp_path / "journal")
    monkeypatch.setattr(log, "log_file", lambda: tmp_path / "ublkpy.log")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(tmp_path / "journal"))
    in_child(lambda: write_to(None))
    assert "careful" in (tmp_path / "ublkpy.log").read_text()


# -- the terminal --------------------------------------------------------------------------


def test_terminal() -> None:
    code = """
import logging
from ublkpy.system import log
log.to_terminal()
log.name_device(3)
logging.getLogger("ublkpy.test").warning("careful")
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (shown.stdout, shown.stderr) == ("", "ublkb3: WARNING: careful\n")


# -- who is heard --------------------------------------------------------------------------


def test_libraries_are_heard_from_warnings_on(tmp_path: Path, in_child: InChild) -> None:
    """What a target says itself is heard, whatever its logger is called."""
    installed = tmp_path / "site-packages"
    installed.mkdir()
    for name in ("chatty", "cloud_disk"):
        (installed / f"{name}.py").write_text(
            f"import logging\nlog = logging.getLogger('{name}.part')\n"
            f"def talk():\n    log.info('{name} works')\n    log.warning('{name} fears')\n"
        )

    def talk() -> None:
        sys.path.insert(0, str(installed))
        log.detach(tmp_path / "x.log")
        log.hear("cloud_disk.disks")
        logging.getLogger("mine").info("hello")
        logging.info("hello, root")
        for name in ("chatty", "cloud_disk"):
            __import__(name).talk()

    in_child(talk)
    said = [line.partition(": ")[2] for line in (tmp_path / "x.log").read_text().splitlines()]
    assert said == [
        *("INFO: hello", "INFO: hello, root", "WARNING: chatty fears"),
        *("INFO: cloud_disk works", "WARNING: cloud_disk fears"),
    ]
