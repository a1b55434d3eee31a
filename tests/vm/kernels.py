"""Kernels to test on: Debian's cloud kernels, which carry the ublk driver, kept in a cache folder.

They come through apt, so that proxies and signatures are apt's business, but with lists and archives of its own:
nothing is installed and this machine's apt is left as it was.
"""

import asyncio
import fcntl
import lzma
import os
import platform
import re
import shutil
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from . import mirror
from .errors import SetupError
from .process import output_of

SERIES = ("6.12", "6.18", "7.3")
# what the guest loads for itself, and what tests of the block layer like to have
MODULES = ("ublk_drv", "overlay", "loop", "nbd", "null_blk", "configfs", "xfs", "libcrc32c")

_SUITES = ("trixie", "trixie-backports")
_FLAVOUR = "+deb13-cloud-amd64"
_FETCH_SECONDS = 900.0
_CURE = f"Is the network up? Another mirror can be named in {mirror.VARIABLE}."


@dataclass(frozen=True)
class Kernel:
    """One fetched kernel; `folder` holds vmlinuz, modules/ and release."""

    series: str
    folder: Path

    @property
    def release(self) -> str:
        return (self.folder / "release").read_text().strip()

    @property
    def vmlinuz(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def modules(self) -> Path:
        return self.folder / "modules"


def cache() -> Path:
    """The folder of everything that is worth keeping between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "ublkpy")


async def provide(wanted: Sequence[str]) -> list[Kernel]:
    """The kernels of the `wanted` series, fetched first where they are not in the cache."""
    if platform.machine() != "x86_64":
        raise SetupError(
            f"only x86-64 machines are supported so far, this is {platform.machine()}",
            "With a ublk driver of its own, this machine can run the tests directly: --on host",
        )
    home = cache() / "kernels"
    home.mkdir(parents=True, exist_ok=True)
    kernels = [Kernel(series, home / series) for series in wanted]
    if not all(k.folder.exists() for k in kernels):
        async with _locked(home):
            missing = [k for k in kernels if not k.folder.exists()]
            if missing:
                await _fetch(home, missing)
    return kernels


@asynccontextmanager
async def _locked(home: Path) -> AsyncIterator[None]:
    """Two runs that both miss a kernel fetch it once."""
    with (home / ".lock").open("w") as lock:
        try:
            async with asyncio.timeout(_FETCH_SECONDS):
                while not _try_lock(lock.fileno()):
                    await asyncio.sleep(0.5)
        except TimeoutError:
            raise SetupError(
                "another run has been fetching kernels for very long", f"fuser {home / '.lock'} names it."
            ) from None
        yield


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


async def _fetch(home: Path, kernels: Iterable[Kernel]) -> None:
    with TemporaryDirectory(prefix=".fetch.", dir=home) as scratch:
        apt = Apt(Path(scratch, "apt"))
        _say(f"reading the package lists of {apt.mirror}")
        await apt.update()
        for kernel in kernels:
            unfinished = Path(scratch, kernel.series)
            await _unpack(apt, kernel.series, unfinished)
            unfinished.rename(kernel.folder)


async def _unpack(apt: "Apt", series: str, folder: Path) -> None:
    pattern = rf"linux-image-{re.escape(series)}\.[0-9]+{re.escape(_FLAVOUR)}"
    images = await apt.packages(pattern)
    if not images:
        raise SetupError(
            f"no Linux {series} kernel on {apt.mirror}",
            f"Name a mirror or a snapshot that still has it in {mirror.VARIABLE}.",
        )
    release = max(images, key=_version).removeprefix("linux-image-")
    # from 7.3 on Debian splits the package in two
    split = [f"linux-binary-{release}", f"linux-modules-{release}"]
    packages = split if await apt.packages(re.escape(split[1])) else [f"linux-image-{release}"]

    _say(f"fetching Linux {release}")
    tree = folder / "tree"
    await apt.unpack(packages, tree)
    shutil.copyfile(next(tree.rglob("vmlinuz*")), folder / "vmlinuz")
    (folder / "modules").mkdir()
    for name in MODULES:
        for path in tree.rglob(f"{name}.ko*"):
            data = path.read_bytes()
            module = lzma.decompress(data) if path.suffix == ".xz" else data
            (folder / "modules" / f"{name}.ko").write_bytes(module)
    shutil.rmtree(tree)
    (folder / "release").write_text(f"{release}\n")


def _version(package: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", package)]


def _say(what: str) -> None:
    print(f"tests.vm: {what}", file=sys.stderr, flush=True)


class Apt:
    """apt with sources and state of its own, in `folder`."""

    def __init__(self, folder: Path) -> None:
        if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
            raise SetupError("kernels come as Debian packages and apt is not here", "Use a Debian or Ubuntu machine.")
        self.mirror = mirror.find()
        self._folder = folder
        for sub in ("lists/partial", "archives/partial"):
            (folder / sub).mkdir(parents=True)
        sources = folder / "sources.list"
        keys = mirror.keyring()
        sources.write_text("".join(f"deb [signed-by={keys}] {self.mirror} {suite} main\n" for suite in _SUITES))
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

    async def _run(self, program: str, *words: str, cwd: Path | None = None) -> str:
        return await output_of(program, *self._options, *words, seconds=_FETCH_SECONDS, cure=_CURE, cwd=cwd)
