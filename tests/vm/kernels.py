"""Kernels to test on: Debian's cloud kernels, which carry the ublk driver, kept in a cache folder."""

import lzma
import platform
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from . import mirror
from .apt import Apt
from .cache import cache, locked, say
from .errors import SetupError

SERIES = ("6.12", "6.18", "7.3")
# what the guest loads for itself, and what tests of the block layer like to have
MODULES = (
    *("ublk_drv", "overlay", "loop", "nbd", "null_blk", "configfs", "xfs", "libcrc32c"),
    *("btrfs", "xor", "raid6_pq", "libblake2b", "crc32c-cryptoapi"),
)

_SUITES = ("trixie", "trixie-backports")
_FLAVOUR = "+deb13-cloud-amd64"


@dataclass(frozen=True)
class Kernel:
    """One fetched kernel; `folder` holds vmlinuz, modules/, release, and what modules were looked for."""

    series: str
    folder: Path

    @property
    def release(self) -> str:
        return (self.folder / "release").read_text().strip()

    @property
    def is_complete(self) -> bool:
        """Whether it was fetched, and with all modules that are wanted today."""
        looked_for = self.folder / "looked-for"
        return looked_for.exists() and looked_for.read_text().split() == list(MODULES)

    @property
    def vmlinuz(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def modules(self) -> Path:
        return self.folder / "modules"


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
    if not all(kernel.is_complete for kernel in kernels):
        async with locked(home):
            missing = [kernel for kernel in kernels if not kernel.is_complete]
            if missing:
                await _fetch(home, missing)
    return kernels


async def _fetch(home: Path, kernels: Iterable[Kernel]) -> None:
    with TemporaryDirectory(prefix=".fetch.", dir=home) as scratch:
        apt = Apt(Path(scratch, "apt"), _SUITES)
        say(f"reading the package lists of {apt.mirror}")
        await apt.update()
        for kernel in kernels:
            unfinished = Path(scratch, kernel.series)
            await _unpack(apt, kernel.series, unfinished)
            if kernel.folder.exists():
                kernel.folder.rename(Path(scratch, f"{kernel.series}.before"))
            unfinished.rename(kernel.folder)


async def _unpack(apt: Apt, series: str, folder: Path) -> None:
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

    say(f"fetching Linux {release}")
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
    (folder / "looked-for").write_text("\n".join(MODULES))


def _version(package: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", package)]
