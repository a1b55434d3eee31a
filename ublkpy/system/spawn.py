"""The only forks: a daemon that reports when it is ready, and a command that may never come back.

Both fork before the process has a thread or a ring of its own.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from ublkpy.errors import UblkError, from_dict
from ublkpy.system import process
from ublkpy.system.wait import readable

log = logging.getLogger(__name__)

_INTERRUPTIONS = {signal.SIGINT, signal.SIGTERM}
_ORDERLY_END = 30.0
_LOOK = 0.1

# pidfd_open(2) of an id that is no process: never was (ESRCH), a thread's (EINVAL, ENOENT since Linux 6.16),
# or just being released (EINVAL, seen in Linux 6.12: the id is still known, but belongs to no task any more).
_NO_PROCESS = (errno.ESRCH, errno.EINVAL, errno.ENOENT)


class Ready:
    """The child's end of the pipe: what it has to say meanwhile, then one last word, that it serves or why not."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def log(self, record: logging.LogRecord) -> None:
        """Have the command log this; nobody may be there to do it."""
        with contextlib.suppress(BrokenPipeError):
            self._write({"log": [record.levelno, record.getMessage()]})

    def done(self, data: dict[str, Any]) -> bool:
        """False: the command that waited has gone, and nobody knows of what we serve."""
        return self._send({"done": data})

    def failed(self, error: UblkError) -> bool:
        return self._send({"error": error.to_dict()})

    def _send(self, message: dict[str, Any]) -> bool:
        try:
            self._write(message)
        except BrokenPipeError:
            return False
        finally:
            os.close(self._fd)
        return True

    def _write(self, message: dict[str, Any]) -> None:
        os.write(self._fd, json.dumps(message).encode() + b"\n")


class Word:
    """The other end, ``fd``: what the process says."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = b""

    def wait(self, timeout: float) -> dict[str, Any]:
        """What it sent with ``done``; what it logs meanwhile is logged here. Raises what it sent with ``failed``,
        EOFError when it died without a word, TimeoutError."""
        deadline = time.monotonic() + timeout
        while "log" in (message := self._receive(deadline)):
            log.log(*message["log"])
        if "error" in message:
            raise from_dict(message["error"])
        done: dict[str, Any] = message["done"]
        return done

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not readable([self._fd], left):
                raise TimeoutError
            chunk = os.read(self._fd, 65536)
            if not chunk:
                raise EOFError
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message


class Child(Word):
    """The command's end: the process id of the daemon, and its word."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._mask: set[int | signal.Signals] | None = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTIONS)
        self.pid = 0

    @property
    def mask(self) -> set[int | signal.Signals]:
        """The signals that were held back before."""
        return self._mask or set()

    def meet(self) -> None:
        """Learn the daemon's process id, the first thing that it sends."""
        with contextlib.suppress(EOFError, TimeoutError):  # then wait() tells
            self.pid = self._receive(time.monotonic() + _ORDERLY_END)["pid"]

    def attend(self) -> None:
        """From now on the caller sees to its end: signals come through again. Raises what was held back."""
        if (mask := self._mask) is not None:
            self._mask = None
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _INTERRUPTIONS - mask)

    def end(self, *, kill: bool = False) -> None:
        """End the daemon: in good order if it can and not ``kill``, else at once."""
        if not self.pid:
            return
        with uninterrupted():
            if not kill:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGTERM)
            if kill or not wait_end(self.pid, _ORDERLY_END):
                wait_end(self.pid, _ORDERLY_END, kill=True)

    def close(self) -> None:
        os.close(self._fd)
        self.attend()


def daemon(body: Callable[[Ready], int]) -> Child:
    """Run ``body`` in a process detached from this one; its return value is the exit status.

    Forks twice, so that the process belongs to init from the start and leaves no zombie to a caller that
    lives on. Signals wait until the caller attends to it: no Ctrl-C may leave a daemon that nobody can end.
    """
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    child = Child(read_end)

    def detached() -> int:
        os.close(read_end)
        os.setsid()
        if os.fork():
            return 0
        os.write(write_end, json.dumps({"pid": os.getpid()}).encode() + b"\n")
        return body(Ready(write_end))

    try:
        try:
            middle = os.fork()
            if middle == 0:
                _run(detached, child.mask)
        finally:
            os.close(write_end)
        os.waitpid(middle, 0)
        child.meet()
    except BaseException:
        child.end()
        child.close()
        raise
    return child


def isolated(
    what: str,
    action: Callable[[], object],
    timeout: float,
    progress: Callable[[], object] = lambda: None,
    enough: Callable[[], bool] = lambda: False,
) -> Any:
    """Run ``action`` in another process and wait for its end, at most ``timeout`` seconds after ``progress``
    last had another value; not longer than until ``enough`` is true, the process then goes on alone.

    Returns what it returned, plain values that JSON can carry; None if that was not waited for.
    Says on the log that it waits for ``what`` when that takes over a second. For driver commands that no
    signal can end: a process that issued one cannot exit before it is done, so it must not be ours. Raises
    the UblkError of ``action``, or TimeoutError and leaves the process to finish. What ``action`` logs is
    logged here; nothing of ours (a pipe that another program reads to its end) stays open in the process.
    """
    child = daemon(lambda ready: report(action, ready))
    try:
        child.attend()
        try:
            return _wait_until(child, min(timeout, 1.0), enough)
        except TimeoutError:
            log.info("waiting for %s, up to %.0f s", what, timeout)
            return _wait_while(child, max(timeout - 1.0, 0.0), progress, enough)
    except EOFError as e:
        raise UblkError("a helper process died before it was done", "try again") from e
    finally:
        child.close()


def _wait_until(child: Child, timeout: float, enough: Callable[[], bool]) -> Any:
    deadline = time.monotonic() + timeout
    while True:
        try:
            return child.wait(min(_LOOK, max(deadline - time.monotonic(), 0.0)))["result"]
        except TimeoutError:
            if enough():
                return None
            if time.monotonic() >= deadline:
                raise


def _wait_while(child: Child, timeout: float, progress: Callable[[], object], enough: Callable[[], bool]) -> Any:
    while True:
        before = progress()
        try:
            return _wait_until(child, timeout, enough)
        except TimeoutError:
            if progress() == before:
                raise


def report(action: Callable[[], object], ready: Ready) -> int:
    """The rest of a process that runs ``action`` for another one: says what it returned, raised and logged; its exit
    status. Closes all other files."""
    process.redirect_streams()
    process.close_files(ready.fileno())
    logging.getLogger().handlers[:] = [_Forward(ready)]
    try:
        result = action()
    except UblkError as e:
        ready.failed(e)
    except Exception:
        log.critical("a bug in ublkpy\n%s", traceback.format_exc())
        return 1
    else:
        ready.done({"result": result})
    return 0


class _Forward(logging.Handler):
    """Hands what is logged here to the process that waits."""

    def __init__(self, ready: Ready) -> None:
        super().__init__()
        self._ready = ready

    def emit(self, record: logging.LogRecord) -> None:
        self._ready.log(record)


def _run(body: Callable[[], int], mask: set[int | signal.Signals]) -> NoReturn:
    """The rest of a child's life; never returns into the code of the parent."""
    status = 1
    try:
        # Ctrl-C is for the command in the foreground; SIGTERM has no meaning of ours yet.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        status = body()
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    finally:
        with contextlib.suppress(Exception):
            logging.shutdown()
        os._exit(status)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM have no effect on what is done in here: it cleans up, with deadlines of its own."""
    before = {}
    try:
        for number in _INTERRUPTIONS:
            before[number] = signal.signal(number, signal.SIG_IGN)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_end(pid: int, timeout: float, *, kill: bool = False) -> bool:
    """Wait for the end of any process, after SIGKILL if ``kill``; False when it is still there after
    ``timeout`` seconds."""
    try:
        fd = os.pidfd_open(pid)
    except OSError as e:
        if e.errno in _NO_PROCESS:
            return True
        raise
    try:
        if kill:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        return bool(readable([fd], timeout))
    finally:
        os.close(fd)
