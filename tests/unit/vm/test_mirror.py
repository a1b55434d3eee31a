"""Where kernels come from: the sources files that are found on Debian and Ubuntu machines."""

from pathlib import Path

import pytest

from tests.vm import mirror
from tests.vm.errors import SetupError

DEB822 = """\
# the main archive
Types: deb-src
URIs: http://sources.example/debian
Suites: trixie
Components: main

Types: deb
Enabled: no
URIs: http://off.example/debian
Suites: trixie
Components: main

Types: deb deb-src
# a comment in between
URIs: http://security.example/debian-security
 http://mirror.example/debian/
Suites: trixie trixie-updates
Components: main
"""

ONE_LINE = """\
# deb http://commented.example/debian trixie main
deb-src http://sources.example/debian trixie main
deb http://security.example/debian-security trixie-security main
deb [arch=amd64 signed-by=/usr/share/keyrings/x.gpg] https://mirror.example/debian trixie main
"""

UBUNTU = """\
Types: deb
URIs: http://archive.example/ubuntu/
Suites: noble
Components: main
"""


@pytest.fixture
def etc_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty /etc/apt, and nothing else that could name a mirror."""
    monkeypatch.delenv(mirror.VARIABLE, raising=False)
    monkeypatch.setattr(mirror, "_SOURCES", tmp_path)
    monkeypatch.setattr(mirror, "_DEBOOTSTRAP", (tmp_path / "sid",))
    (tmp_path / "sources.list.d").mkdir()
    return tmp_path


def test_deb822_stanzas(etc_apt: Path) -> None:
    (etc_apt / "sources.list.d" / "debian.sources").write_text(DEB822)
    assert mirror.find() == "http://mirror.example/debian/"


def test_one_line_entries(etc_apt: Path) -> None:
    (etc_apt / "sources.list").write_text(ONE_LINE)
    assert mirror.find() == "https://mirror.example/debian"


def test_files_that_apt_ignores_are_ignored(etc_apt: Path) -> None:
    (etc_apt / "sources.list.d" / "debian.sources.disabled").write_text(DEB822)
    with pytest.raises(SetupError):
        mirror.find()


def test_ubuntu_has_debootstrap_name_one(etc_apt: Path) -> None:
    (etc_apt / "sources.list.d" / "ubuntu.sources").write_text(UBUNTU)
    (etc_apt / "sid").write_text("case $ARCH in\n*)\n\tdefault_mirror http://mirror.example/debian\n;;esac\n")
    assert mirror.find() == "http://mirror.example/debian"


def test_debootstrap_may_name_it_in_a_variable() -> None:
    assert mirror.debootstrap_default('DEF_MIRROR="http://mirror.example/debian"\n') == "http://mirror.example/debian"


def test_debootstrap_of_another_distribution_is_no_help() -> None:
    assert mirror.debootstrap_default("default_mirror http://archive.example/ubuntu\n") is None


def test_the_environment_goes_first(etc_apt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (etc_apt / "sources.list").write_text(ONE_LINE)
    monkeypatch.setenv(mirror.VARIABLE, "http://mine.example/snapshot")
    assert mirror.find() == "http://mine.example/snapshot"


def test_none_names_the_cure(etc_apt: Path) -> None:
    with pytest.raises(SetupError, match=mirror.VARIABLE):
        mirror.find()
