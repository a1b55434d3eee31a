"""Debian's archive, through apt: proxies and signatures are apt's business. With lists and archives of its own:
nothing is installed, and this machine's apt is left as it was."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from . import mirror
from .cache import FETCH_SECONDS
from .errors import SetupError
from .process import output_of

_CURE = f"Is the network up? Another mirror can be named in {mirror.VARIABLE}."


class Apt:
    """apt with sources and state of its own, in `folder`; `kind` is deb, or deb-src for sources."""

    def __init__(self, folder: Path, suites: Iterable[str], kind: str = "deb") -> None:
        if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
            raise SetupError("kernels come as Debian packages and apt is not here", "Use a Debian or Ubuntu machine.")
        self.mirror = mirror.find()
        self._folder = folder
        for sub in ("lists/partial", "archives/partial"):
            (folder / sub).mkdir(parents=True)
        sources = folder / "sources.list"
        keys = mirror.keyring()
        sources.write_text("".join(f"{kind} [signed-by={keys}] {self.mirror} {suite} main\n" for suite in suites))
        settings = {
            "Dir::Etc::sourcelist": sources,
            "Dir::Etc::sourceparts": "-",
            "Dir::State::lists": folder / "lists",
            "Dir::Cache": folder,
            "Acquire::Languages": "none",
            "Acquire::Retries": 3,
            "APT::Update::Error-Mode": "any",
            "APT::Architecture": "amd64",
            "APT::Sandbox::User": "root",
        }
        self._options = [
            "-qq",
            *(word for key, value in settings.items() for word in ("-o", f"{key}={value}")),
        ]

    async def update(self) -> None:
        await self._run("apt-get", "update")

    async def packages(self, pattern: str) -> list[str]:
        """The names of the packages whose whole name matches `pattern`."""
        found = await self._run("apt-cache", "search", "--names-only", f"^{pattern}$")
        return [line.split()[0] for line in found.splitlines()]

    async def unpack(self, packages: Iterable[str], tree: Path) -> None:
        """Download `packages` and unpack their files below `tree`."""
        tree.mkdir(parents=True)
        await self._run("apt-get", "download", *packages, cwd=self._folder)
        for deb in self._folder.glob("*.deb"):
            await output_of("dpkg-deb", "-x", deb, tree, seconds=120, cure="Is the disk full?")
            deb.unlink()

    async def source(self, package: str) -> Path:
        """The newest source archive of a package, as its authors published it."""
        await self._run("apt-get", "source", "--download-only", package, cwd=self._folder)
        return max(self._folder.glob(f"{package}_*.orig.tar.*"))

    async def _run(self, program: str, *words: str, cwd: Path | None = None) -> str:
        return await output_of(program, *self._options, *words, seconds=FETCH_SECONDS, cure=_CURE, cwd=cwd)
