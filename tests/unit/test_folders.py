"""Files of ours, where nobody else can put any."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ublkpy import folders
from ublkpy.errors import UblkError

InChild = Callable[[Callable[[], object]], Any]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
ANOTHER = 54321


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder that other users can reach."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.name.startswith("pytest-") or folder == tmp_path:
            folder.chmod(0o755)
    return tmp_path


def as_another(in_child: InChild, action: Callable[[], object]) -> Any:
    def run() -> object:
        os.setgroups([])
        os.setresgid(ANOTHER, ANOTHER, ANOTHER)
        os.setresuid(ANOTHER, ANOTHER, ANOTHER)
        return action()

    return in_child(run)


def said(action: Callable[[], object]) -> str:
    with pytest.raises(UblkError) as caught:
        action()
    return caught.value.message


# -- which folder --------------------------------------------------------------------------


@needs_root
def test_roots_are_those_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/elsewhere")
    monkeypatch.setenv("XDG_STATE_HOME", "/elsewhere")
    assert folders.run_dir() == Path("/run/ublkpy")
    assert folders.socket_dir() == Path("/run/ublk")
    assert folders.log_file() == Path("/var/log/ublkpy.log")


@needs_root
def test_a_users_are_his_own(place: Path, monkeypatch: pytest.MonkeyPatch, in_child: InChild) -> None:
    mine = place / "mine"
    mine.mkdir(0o700)
    os.chown(mine, ANOTHER, ANOTHER)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(mine))
    monkeypatch.setenv("XDG_STATE_HOME", str(mine / "state"))

    def look() -> list[str]:
        return [str(path) for path in (folders.run_dir(), folders.socket_dir(), folders.log_file())]

    expected = [f"{mine}/ublkpy", f"{mine}/ublkpy", f"{mine}/state/ublkpy/ublkpy.log"]
    assert as_another(in_child, look) == expected


@needs_root
def test_without_the_variable_it_is_in_run_user(
    place: Path, monkeypatch: pytest.MonkeyPatch, in_child: InChild
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(folders, "_USERS", place)
    (place / str(ANOTHER)).mkdir(0o700)
    os.chown(place / str(ANOTHER), ANOTHER, ANOTHER)
    assert as_another(in_child, lambda: str(folders.run_dir())) == f"{place}/{ANOTHER}/ublkpy"


@needs_root
@pytest.mark.parametrize("kind", ["another's", "open", "link", "none"])
def test_a_folder_that_is_not_his_alone_is_none(
    place: Path, monkeypatch: pytest.MonkeyPatch, in_child: InChild, kind: str
) -> None:
    """After su, the variable names the folder of somebody else."""
    folder = place / "folder"
    if kind == "link":
        (place / "real").mkdir(0o700)
        os.chown(place / "real", ANOTHER, ANOTHER)
        folder.symlink_to(place / "real")
    elif kind != "none":
        folder.mkdir()
        folder.chmod(0o777 if kind == "open" else 0o700)
        if kind == "open":
            os.chown(folder, ANOTHER, ANOTHER)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    monkeypatch.setattr(folders, "_USERS", place)

    def fail() -> list[str]:
        with pytest.raises(UblkError) as caught:
            folders.run_dir()
        return [caught.value.message, caught.value.hint]

    message, hint = as_another(in_child, fail)
    assert message.startswith("there is no folder for state files: neither XDG_RUNTIME_DIR nor ")
    assert f"user {ANOTHER}'s alone" in message
    assert "loginctl enable-linger" in hint


@needs_root
def test_a_relative_state_home_does_not_count(place: Path, monkeypatch: pytest.MonkeyPatch, in_child: InChild) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "here")
    monkeypatch.setenv("HOME", str(place))
    assert as_another(in_child, lambda: str(folders.log_file())) == f"{place}/.local/state/ublkpy/ublkpy.log"


# -- whose folder --------------------------------------------------------------------------


def test_make_a_folder_and_make_it_again(tmp_path: Path) -> None:
    folder = tmp_path / "ours"
    assert folders.make(folder) == folder
    assert folder.stat().st_mode & 0o7777 == 0o755
    assert folders.make(folder) == folder


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775, 0o757])
def test_a_folder_that_others_can_write(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    assert said(lambda: folders.make(folder)) == f"others can write in {folder}"


def test_a_link_to_a_folder_and_one_to_nowhere(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for target in ("real", "nowhere"):
        link = tmp_path / f"to-{target}"
        link.symlink_to(target)
        assert said(lambda link=link: folders.make(link)) == f"{link} is a link"  # type: ignore[misc]


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert said(lambda: folders.make(tmp_path / "file")) == f"{tmp_path}/file is not a folder"


@needs_root
def test_a_folder_of_another(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    os.chown(folder, ANOTHER, ANOTHER)
    assert said(lambda: folders.make(folder)) == f"{folder} belongs to user {ANOTHER}, not to root"


# -- whose file ----------------------------------------------------------------------------


def test_read_a_file_of_ours(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    with os.fdopen(folders.open_own(file)) as f:
        assert f.read() == "text"


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(OSError, match="Too many levels"):
        folders.open_own(tmp_path / "link")


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_can_write(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "file"
    file.touch()
    file.chmod(mode)
    assert f"may have been written by another: it belongs to {folders.user_name(os.geteuid())}, with mode {mode:o}" in (
        said(lambda: folders.open_own(file))
    )


@needs_root
def test_a_file_of_another(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch(0o600)
    os.chown(file, ANOTHER, ANOTHER)
    assert f"it belongs to user {ANOTHER}" in said(lambda: folders.open_own(file))


def test_a_pipe_is_no_file_and_nobody_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(OSError, match="not a file"):
        folders.open_own(tmp_path / "pipe")


# -- logs ----------------------------------------------------------------------------------


def test_a_log_in_a_folder_of_ours_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "log").symlink_to("real")
    os.close(folders.open_log(tmp_path / "log"))
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o600


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """As /tmp is."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


def test_a_log_where_all_can_write(shared: Path) -> None:
    os.close(folders.open_log(shared / "log"))
    os.close(folders.open_log(shared / "log"))


def test_a_planted_link_is_not_followed(shared: Path, tmp_path: Path) -> None:
    (shared / "log").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=r"Too many levels|Permission denied"):
        folders.open_log(shared / "log")
    assert not (tmp_path / "precious").exists()


def test_a_planted_hard_link_is_not_appended_to(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    (shared / "log").hardlink_to(tmp_path / "precious")
    assert "is not a file of" in said(lambda: folders.open_log(shared / "log"))


@needs_root
def test_a_planted_file_is_not_appended_to(shared: Path) -> None:
    (shared / "log").touch(0o666)
    os.chown(shared / "log", ANOTHER, ANOTHER)
    # The kernel may refuse by itself: sysctl fs.protected_regular.
    with pytest.raises((UblkError, PermissionError)):
        folders.open_log(shared / "log")


def test_names() -> None:
    assert folders.user_name(0) == "root"
    assert folders.user_name(ANOTHER) == f"user {ANOTHER}"
