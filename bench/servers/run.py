"""Programs and modules that servers are made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen, TimeoutExpired
from tempfile import TemporaryFile

from . import Place

# Of the machine: 10^9 instructions, or nothing at all. While it waits for a file of the host, with all CPUs idle,
# the clock jumps from timer to timer, and half a minute is over in a third of a second.
_SECONDS = 3600
_KILL_SECONDS = 60


class ServerError(Exception):
    """A program that serves or sets up a device failed."""


def run(*argv: str | Path, seconds: float = _SECONDS) -> str:
    """What `argv` prints; raises ServerError with the end of it if it fails or takes longer."""
    words = [str(word) for word in argv]
    # not a pipe: a daemon that it leaves behind may keep its output open
    with TemporaryFile() as output:
        try:
            running = Popen(words, stdin=DEVNULL, stdout=output, stderr=STDOUT)
            status = running.wait(seconds)
        except OSError as error:
            raise ServerError(str(error)) from None
        except TimeoutExpired:
            # nor waited for, much: a program with requests that nobody answers ends only when the device goes
            running.kill()
            with suppress(TimeoutExpired):
                running.wait(_KILL_SECONDS)
            raise ServerError(f"{' '.join(words)}: did not end within {seconds:g} s") from None
        output.seek(0)
        said = output.read().decode(errors="replace")
    if status:
        raise ServerError(f"{' '.join(words)}: exit status {status}: {said.strip()[-500:]}")
    return said


@contextmanager
def module(place: Place, name: str, *parameters: str) -> Iterator[None]:
    """The kernel module `name`, loaded for as long as the block lasts."""
    run("insmod", place.modules / f"{name}.ko", *parameters)
    try:
        yield
    finally:
        run("rmmod", name)


@contextmanager
def process(place: Place, *argv: str | Path) -> Iterator[Popen[bytes]]:
    """A program that runs for as long as the block lasts; what it says is part of the error if there is one."""
    log = place.folder / "server.log"
    with log.open("wb") as output:
        running = Popen([str(word) for word in argv], stdin=DEVNULL, stdout=output, stderr=STDOUT)
    try:
        yield running
    except ServerError as error:
        raise ServerError(f"{error}; {argv[0]} said: {log.read_text(errors='replace').strip()[-500:]}") from None
    finally:
        running.terminate()
        try:
            running.wait(_SECONDS)
        except TimeoutExpired:
            running.kill()
        log.unlink()


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for `condition`; ServerError when it does not come."""
    deadline = time.monotonic() + _SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise ServerError(f"waited {_SECONDS} s in vain for {what}")
        time.sleep(0.01)
