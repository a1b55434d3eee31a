"""The plugins in Python that nbdkit's source comes with, as examples for those who write one."""

import shutil
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

from .apt import Apt
from .cache import cache, locked, say

_SUITE = "trixie"
_FOLDER = "plugins/python/examples"


def folder() -> Path:
    """Where they are once they were fetched."""
    return cache() / "nbdkit-examples"


async def provide() -> Path:
    """Their folder, fetched first if it is not in the cache."""
    home = cache()
    home.mkdir(parents=True, exist_ok=True)
    if not folder().exists():
        async with locked(home):
            if not folder().exists():
                await _fetch(home)
    return folder()


async def _fetch(home: Path) -> None:
    with TemporaryDirectory(prefix=".fetch.", dir=home) as scratch:
        apt = Apt(Path(scratch, "apt"), [_SUITE], "deb-src")
        say(f"fetching nbdkit's examples from {apt.mirror}")
        await apt.update()
        found = Path(scratch, "examples")
        found.mkdir()
        with tarfile.open(await apt.source("nbdkit")) as archive:
            for member in archive:
                path = Path(member.name)
                if member.isfile() and path.suffix == ".py" and path.parent.match(f"*/{_FOLDER}"):
                    with (found / path.name).open("wb") as copy:
                        shutil.copyfileobj(archive.extractfile(member) or copy, copy)
        found.rename(folder())
