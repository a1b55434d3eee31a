"""Which Debian mirror to fetch kernels from: the one that this machine's administrator already chose."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import SetupError

VARIABLE = "UBLKPY_DEBIAN_MIRROR"
_SOURCES = Path("/etc/apt")
_DEBOOTSTRAP = (Path("/usr/share/debootstrap/scripts/sid"), Path("/usr/sbin/debootstrap"))
_KEYRINGS = ("debian-archive-keyring.gpg", "debian-archive-keyring.pgp")


def find() -> str:
    """The mirror's address: from the environment, from apt's own sources, or debootstrap's default."""
    if mirror := os.environ.get(VARIABLE):
        return mirror
    for path in [_SOURCES / "sources.list", *sorted((_SOURCES / "sources.list.d").glob("*"))]:
        if path.suffix in (".list", ".sources") and path.is_file():
            text = path.read_text(errors="replace")
            if mirror := main_archive(deb822(text) if path.suffix == ".sources" else one_line(text)):
                return mirror
    for path in _DEBOOTSTRAP:
        if path.is_file() and (mirror := debootstrap_default(path.read_text())):
            return mirror
    raise SetupError(
        "no Debian mirror is known here to fetch kernels from",
        f"Set {VARIABLE} to the address of one, or install debootstrap, which names one: apt-get install debootstrap",
    )


def keyring() -> Path:
    """The public keys that the mirror's packages are checked against."""
    for name in _KEYRINGS:
        if (path := Path("/usr/share/keyrings") / name).is_file():
            return path
    raise SetupError("Debian's signing keys are not installed", "apt-get install debian-archive-keyring")


def main_archive(addresses: Iterable[str]) -> str | None:
    """The first address that holds Debian itself, not its security updates or somebody else's packages."""
    return next((a for a in addresses if re.match(r"\w+:/.*/debian/?$", a)), None)


def deb822(text: str) -> Iterator[str]:
    """The URIs of a .sources file: stanzas of `Field: value`, continued on indented lines."""
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    for stanza in re.split(r"\n\s*\n", text):
        fields = {
            key.lower(): value.split()
            for key, value in re.findall(r"^([\w-]+):(.*(?:\n[ \t].*)*)", stanza, flags=re.MULTILINE)
        }
        if "no" not in fields.get("enabled", []) and "deb" in fields.get("types", []):
            yield from fields.get("uris", [])


def one_line(text: str) -> list[str]:
    """The URIs of a .list file: `deb [options] URI suite component...`"""
    return re.findall(r"^\s*deb\s+(?:\[[^]]*\]\s*)?(\S+)", text, flags=re.MULTILINE)


def debootstrap_default(script: str) -> str | None:
    """The mirror that debootstrap would use, as its shell scripts spell it: a function's argument or a variable."""
    return main_archive(re.findall(r'^\s*(?:default_mirror\s+|DEF_MIRROR=)"?([^\s"]+)', script, flags=re.MULTILINE))
