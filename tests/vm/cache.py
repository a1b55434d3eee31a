"""What is worth keeping between runs, and who may change it."""

import asyncio
import fcntl
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from .errors import SetupError

FETCH_SECONDS = 900.0


def cache() -> Path:
    """The folder of everything that is worth keeping between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "ublkpy")


@asynccontextmanager
async def locked(home: Path) -> AsyncIterator[None]:
    """Two runs that both miss something fetch it once."""
    with (home / ".lock").open("w") as lock:
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                while not _try_lock(lock.fileno()):
                    await asyncio.sleep(0.5)
        except TimeoutError:
            raise SetupError(
                "another run has been fetching for very long", f"fuser {home / '.lock'} names it."
            ) from None
        yield


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def say(what: str) -> None:
    """Progress."""
    print(f"tests.vm: {what}", file=sys.stderr, flush=True)
