"""Child processes that never outlive us.

Each gets its own session, so that Ctrl-C reaches the harness alone, which then ends its children in order; and each
is killed by the kernel when the harness itself is killed (setpriv's --pdeathsig), so that nothing is left behind then.
"""

import asyncio
import os
import signal
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO

from .errors import SetupError


@asynccontextmanager
async def spawn(
    argv: Sequence[str | Path],
    *,
    stdout: int | IO[bytes] | None = DEVNULL,
    stderr: int | IO[bytes] | None = STDOUT,
    pass_fds: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> AsyncIterator[Process]:
    """Run `argv`, without input, for as long as the block lasts."""
    process = await asyncio.create_subprocess_exec(
        "setpriv",
        "--pdeathsig=KILL",
        *argv,
        stdin=DEVNULL,
        stdout=stdout,
        stderr=stderr,
        pass_fds=pass_fds,
        env=env,
        cwd=cwd,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        # the whole group, also when its leader has ended: it may have left children
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def output_of(*argv: str | Path, seconds: float, cure: str, cwd: Path | None = None) -> str:
    """What `argv` prints; a `SetupError` with the end of it when it fails or takes longer than `seconds`."""
    name = " ".join(str(word) for word in argv[:1])
    try:
        async with asyncio.timeout(seconds), spawn(argv, stdout=PIPE, cwd=cwd) as process:
            printed, _ = await process.communicate()
    except TimeoutError:
        raise SetupError(f"{name} did not finish within {seconds:.0f} s", cure) from None
    text = printed.decode(errors="replace")
    if process.returncode:
        last = "\n  ".join(text.splitlines()[-10:])
        raise SetupError(f"{name} failed (exit status {process.returncode}):\n  {last}", cure)
    return text
