"""The command line, as far as it goes without a machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def vm(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.vm", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=cwd,
        timeout=30,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(autouse=True)
def nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel in the cache and no mirror to fetch one from: what gets past the checks fails, soon."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("UBLKPY_DEBIAN_MIRROR", "file:/nonexistent")
    monkeypatch.delenv("UBLKPY_TEST_ON", raising=False)


def test_help_names_every_exit_status() -> None:
    result = vm("--help")
    assert result.returncode == 0
    for status in ("2 ", "3 ", "124 ", "125 "):
        assert status in result.stdout


def test_unknown_series_lists_the_known() -> None:
    result = vm("-k", "7.3,5.4", "--", "true")
    assert result.returncode == 2
    assert "'5.4'" in result.stderr
    assert "6.12, 6.18, 7.3" in result.stderr


@pytest.mark.parametrize("words", [(), ("--",), ("-k", "7.3"), ("--fetch", "--pytest", "x"), ("-t", "0", "--", "true")])
def test_wrong_usage(words: tuple[str, ...]) -> None:
    result = vm(*words)
    assert result.returncode == 2
    assert result.stderr.startswith("usage:")


@pytest.mark.parametrize("words", [("-w",), ("--on", "host")])
def test_systemd_is_for_a_machine_of_its_own(words: tuple[str, ...]) -> None:
    result = vm(*words, "--systemd", "true", "--", "true")
    assert result.returncode == 2
    assert f"Leave {' '.join(words)} out." in result.stderr


def test_a_pattern_that_is_none() -> None:
    result = vm("--allow-warning", "(", "--", "true")
    assert result.returncode == 2
    assert "not a regular expression" in result.stderr


def test_pytest_needs_the_environment_first(tmp_path: Path) -> None:
    result = vm("--pytest", "tests/device", "-x", cwd=tmp_path)
    assert result.returncode == 2
    assert "scripts/setup build" in result.stderr


def test_folders_that_the_guest_cannot_see() -> None:
    result = vm("--out", "/dev/shm", "--", "true")
    assert result.returncode == 2
    assert "/dev/shm" in result.stderr


def test_a_mirror_without_kernels_says_what_to_change() -> None:
    result = vm("--", "true")
    assert result.returncode == 2
    assert "UBLKPY_DEBIAN_MIRROR" in result.stderr or "debian-archive-keyring" in result.stderr


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--", "true", "--and", "-k", "5.4", "--", "true"), "'5.4'"),
        (("--", "true", "--and", "-w", "--systemd", "true", "--", "true"), "Leave -w out."),
        (("--", "true", "--and", "--fetch"), "usage:"),
        (("--", "true", "--and"), "usage:"),
    ],
)
def test_each_of_several_commands_is_checked(words: tuple[str, ...], complaint: str) -> None:
    result = vm(*words)
    assert result.returncode == 2
    assert complaint in result.stderr


def test_the_choice_of_machine_is_checked() -> None:
    result = vm("--", "true", UBLKPY_TEST_ON="moon")
    assert result.returncode == 2
    assert "vm or host" in result.stderr
