"""udev's rules, and what is said when it is not set up."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ublkpy.driver import owner, udev
from ublkpy.errors import DriverError, ExitCode, UblkError

SOCKET_MISSING = Path("/nonexistent/control")


def test_rules_run_this_python() -> None:
    text = udev.rules("/opt/my tools/100%/$x/bin/python")
    assert "PROGRAM!=\"'/opt/my tools/100%%/$$x/bin/python' -I -m ublkpy.driver.owner %k\"," in text
    assert "@" not in text


def test_rules_open_nothing_to_everybody() -> None:
    text = udev.rules("/python")
    assert 'GROUP="ublk", MODE="0660"' in text
    assert 'MODE="0666"' not in text


@pytest.mark.parametrize("path", ["", "/it's/python", '/a"b', "/a\\b", "/a\nb"])
def test_a_path_that_rules_cannot_name(path: str) -> None:
    with pytest.raises(UblkError, match="cannot name the interpreter"):
        udev.rules(path)


def test_each_line_of_the_rules_is_sound() -> None:
    """What jumps has somewhere to go."""
    text = udev.rules("/python")
    for name in ("ublkpy_owner", "ublkpy_end"):
        assert f'GOTO="{name}"' in text
        assert f'\nLABEL="{name}"\n' in text


# -- set up or not -------------------------------------------------------------------------


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """udev's folders; it runs."""
    (tmp_path / "rules.d").mkdir()
    (tmp_path / "control").touch()
    monkeypatch.setattr(udev, "_FOLDERS", [tmp_path, tmp_path / "none"])
    monkeypatch.setattr(udev, "_SOCKET", tmp_path / "control")
    monkeypatch.setattr(udev, "RULES", tmp_path / "rules.d/59-ublkpy.rules")
    monkeypatch.setattr(udev, "_has_group", lambda: True)
    return tmp_path


def test_no_rules(etc: Path) -> None:
    (etc / "rules.d/10-other.rules").write_text('KERNEL=="sda"')
    with pytest.raises(DriverError) as caught:
        udev.check_set_up()
    assert caught.value.hint == "have root run: ublk udev install"


def test_rules_of_another_server_do(etc: Path) -> None:
    (etc / "rules.d/80-ublk.rules").write_text('KERNEL=="ublkc*", RUN+="/usr/sbin/ublk_chown.sh"')
    udev.check_set_up()


def test_udev_does_not_run(etc: Path) -> None:
    (etc / "rules.d/59-ublkpy.rules").write_text(udev.rules("/python"))
    udev.check_set_up()
    (etc / "control").unlink()
    with pytest.raises(DriverError, match="udev does not run"):
        udev.check_set_up()


@pytest.mark.skipif(os.geteuid() != 0, reason="root sets udev up")
def test_install_where_udev_does_not_run_and_remove(etc: Path) -> None:
    (etc / "control").unlink()
    for _ in range(2):
        said = udev.install()
        assert said[0] == f"wrote {udev.RULES}"
        assert "udev does not run: the rules apply when it does" in said
        assert "usermod -aG ublk NAME" in said[-1]
        assert udev.RULES.read_text() == udev.rules(sys.executable)
        assert udev.RULES.stat().st_mode & 0o777 == 0o644
        assert [file.name for file in (etc / "rules.d").iterdir()] == ["59-ublkpy.rules"]
    assert udev.remove()[0] == f"removed {udev.RULES}"
    assert udev.remove() == [f"there is no {udev.RULES}"]


@pytest.mark.skipif(os.geteuid() != 0, reason="root sets udev up")
def test_an_installation_of_somebody_else_is_told(etc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (etc / "control").unlink()
    python = tmp_path / "venv/python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    python.parent.chmod(0o777)
    monkeypatch.setattr(sys, "executable", str(python))
    assert any(f"warning: {python.parent} is not root's alone" in line for line in udev.install())


def test_a_tool_that_is_missing_or_fails() -> None:
    with pytest.raises(UblkError, match="cannot run no-such-tool: No such file"):
        udev._run("no-such-tool")
    with pytest.raises(UblkError, match="ls /nonexistent failed: "):
        udev._run("ls", "/nonexistent")


def test_why_a_node_is_closed() -> None:
    assert "newgrp" in udev.why_closed(errno.EPERM)
    assert "ublk udev install" in udev.why_closed(errno.EACCES)


# -- the owner -----------------------------------------------------------------------------


@pytest.mark.parametrize("node", ["sda", "ublk-control", "ublkb", "ublkb0x", "ublkc1p1p1", ""])
def test_the_owner_of_what_is_no_device(node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["owner", node])
    assert owner.main() == ExitCode.FAILED


def test_the_helper_imports_little() -> None:
    """udev waits for it."""
    code = "import sys, ublkpy.driver.owner; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert not {"click", "yaml", "logging", "asyncio", "subprocess"} & set(done.stdout.split())
