"""Memory that clients share with a device: who brings it, who holds it, when it goes.

::

    client                  daemon                           another process (regbuf.py)
    memfd ──SCM_RIGHTS──▶ check, map ───────────────────────▶ REG_BUF
    int32 ◀── index ───── queues may find it, state file ◀── index
    ends ───(pidfd)─────▶ ───────────────────────────────────▶ UNREG_BUF
                          unmap ◀────────────────────────────

A buffer lives as long as the process that brought it, not as long as its connection: clients of ublksrv close that
at once. When it is gone, requests in that memory are copied as any other, so nothing depends on it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO

from ublkpy import folders
from ublkpy.daemon import regbuf
from ublkpy.daemon.memory import HugeFile, Refused, length_of, owner_of
from ublkpy.errors import UblkError, from_dict
from ublkpy.shmem import WHY, peer_uid, socket_path
from ublkpy.system.wait import readable
from ublkpy.uring.shmem import MAX_BUFFERS, Mapping, SharedBuffers

_log = logging.getLogger(__name__)

DEADLINE = 60.0
"""Seconds for a registration, which waits for requests in flight, and for a Python that starts."""

_MAX_CLIENTS = 64  # with two files for each buffer, below 1024, the limit that most processes have


class _Closed(Exception):
    """The device goes; nobody waits for anything any more."""


class Sharing:
    """The shared memory of one device.

    Made, begun and closed by the main thread; between these, a thread of its own has all of it but ``buffers``,
    which is for the queues. ``save`` is called, in either, with the indices that the driver has, for the state file.
    """

    def __init__(self, dev_id: int, cookie: int, *, read_only: bool, save: Callable[[list[int]], None]) -> None:
        self.buffers = SharedBuffers()
        self._dev_id = dev_id
        self._cookie = cookie
        self._read_only = read_only
        self._save = save
        self._stale: list[int] = []
        self._clients = 0
        self._path = socket_path(dev_id)
        self._thread = threading.Thread(target=self._serve, name="shmem", daemon=True)
        self._listener: socket.socket | None = None
        self._wake_r, self._wake_w = socket.socketpair()

    def begin(self, htlb: HugeFile | None, stale: Sequence[int] = ()) -> None:
        """Take back what a daemon before us had registered, share ``htlb``, and serve clients. The queues run.

        Raises UblkError if the file cannot be shared, or clients cannot be served.
        """
        self._stale = list(stale)
        if stale:
            try:
                self._command("remove", *stale, late=_give_up)
                self._stale = []
                self._tell_state()
            except UblkError as e:
                _log.error("shared memory of the daemon before: %s", e.message)
        try:
            if htlb:
                index = self._register(htlb.fd, htlb.length, late=_give_up)
                _log.info("sharing %s as buffer %d", htlb.path, index)
        except Refused as e:
            hint = "are there enough free huge pages?" if e.errno == errno.ENOMEM else WHY.get(e.errno, "")
            raise UblkError(f"cannot share {htlb.path if htlb else ''}: {e}", hint) from e
        finally:
            self._listen()

    def close(self) -> None:
        """Serve no more clients. The driver keeps what it knows until the device goes."""
        self._wake_w.send(b"\0")
        if self._listener:
            self._path.unlink(missing_ok=True)
            self._thread.join()
            self._stop_listening()
        self._wake_r.close()
        self._wake_w.close()

    # -- clients ---------------------------------------------------------------------------

    def _listen(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            folders.listen(self._listener, self._path)
        except OSError as e:
            self._stop_listening()
            raise UblkError(f"cannot make the socket {self._path}: {e.strerror or e}") from e
        except UblkError as e:
            self._stop_listening()
            raise UblkError(f"cannot make the socket {self._path}: {e.message}", e.hint) from e
        try:
            self._thread.start()
        except RuntimeError as e:
            self._stop_listening()
            self._path.unlink(missing_ok=True)
            raise UblkError(
                f"cannot start a thread for {self._path}: the system allows no more",
                "raise the limit (ulimit -u, pids.max of the cgroup)",
            ) from e

    def _stop_listening(self) -> None:
        assert self._listener
        self._listener.close()
        self._listener = None

    def _serve(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        assert self._listener
        with contextlib.suppress(_Closed), selectors.DefaultSelector() as selector:
            self._selector = selector
            selector.register(self._wake_r, selectors.EVENT_READ, self._end)
            selector.register(self._listener, selectors.EVENT_READ, self._accept)
            while True:
                for key, _ in selector.select():
                    try:
                        key.data()
                    except _Closed:
                        raise
                    except Exception:  # one client's trouble is not that of the others
                        _log.exception("shared memory")

    def _end(self) -> None:
        raise _Closed

    def _accept(self) -> None:
        assert self._listener
        try:
            client = self._listener.accept()[0]
        except OSError as e:
            _log.warning("shared memory: a client was lost: %s", e.strerror)
            time.sleep(1)  # it may still be there
            return
        if self._clients == _MAX_CLIENTS:
            _log.warning("shared memory refused: %d clients are connected already", _MAX_CLIENTS)
            client.close()
            return
        uid = peer_uid(client)
        if uid not in (0, os.geteuid()):  # the socket's mode says so, too
            _log.warning("shared memory refused: the client is of user %d", uid)
            client.close()
            return
        self._clients += 1
        client.setblocking(False)
        self._selector.register(client, selectors.EVENT_READ, lambda: self._hear(client))

    def _hear(self, client: socket.socket) -> None:
        """One message: a file descriptor. What it says besides does not matter."""
        try:
            said, fds, _, _ = socket.recv_fds(client, 4096, 2, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            said, fds = b"", []
        if not said or not self._answer(client, fds):
            self._selector.unregister(client)
            client.close()
            self._clients -= 1
        for fd in fds:
            os.close(fd)

    def _answer(self, client: socket.socket, fds: list[int]) -> bool:
        """Whether the client may go on."""
        told = False

        def tell(result: int) -> None:
            nonlocal told
            if not told:
                told = True
                client.send(struct.pack("=i", result))

        def late() -> None:
            _log.warning("shared memory: the driver has not registered it within %g s; waiting on", DEADLINE)
            with contextlib.suppress(OSError):
                tell(-errno.ETIMEDOUT)

        result = -errno.EINVAL
        try:
            if len(fds) != 1:
                raise Refused(errno.EINVAL, f"{len(fds)} file descriptors came instead of one")
            length = length_of(fds[0])
            owner = owner_of(client)
            try:
                result = self._register(fds[0], length, late)
            except BaseException:
                os.close(owner)
                raise
            index = result
            self._selector.register(owner, selectors.EVENT_READ, lambda: self._owner_ended(owner, index))
            _log.info("sharing %d bytes as buffer %d", length, result)
            if told:  # too late: the client does not count on it
                self._owner_ended(owner, index)
        except Refused as e:
            _log.warning("shared memory refused: %s", e)
            result = -e.errno
        except UblkError as e:
            _log.error("shared memory: %s", e.message)
            result = -errno.EIO
        try:
            tell(result)
        except OSError:  # its end will be seen
            return False
        return result >= 0

    def _owner_ended(self, owner: int, index: int) -> None:
        self._selector.unregister(owner)
        os.close(owner)
        try:
            self._command(
                "remove", index, late=lambda: _log.warning("the driver still holds buffer %d; waiting on", index)
            )
        except UblkError as e:
            _log.error("buffer %d stays: %s", index, e.message)
            return
        self.buffers.remove(index)
        self._tell_state()
        _log.info("buffer %d is shared no more", index)

    # -- the driver ------------------------------------------------------------------------

    def _register(self, fd: int, length: int, late: Callable[[], None]) -> int:
        """Have our queues and the driver know it; its index. Raises Refused, and what ``late`` raises."""
        if len(self.buffers.indices()) == MAX_BUFFERS:
            raise Refused(errno.ENOSPC, f"{MAX_BUFFERS} buffers are shared already")
        try:
            mapping = Mapping(fd, length, read_only=self._read_only)
        except OSError as e:
            raise Refused(e.errno or errno.EIO, f"it cannot be mapped: {e.strerror}") from e
        self.buffers.registering(True)
        try:
            index = self._command("add", fd, length, int(self._read_only), late=late, fds=(fd,))
            if index >= MAX_BUFFERS:  # there are some that are not ours
                self._command("remove", index, late=late)
                raise Refused(errno.ENOSPC, f"the driver has {index} buffers already")
            self.buffers.put(index, mapping)
        except BaseException:
            mapping.close()
            raise
        finally:
            self.buffers.registering(False)
        self._tell_state()
        return index

    def _tell_state(self) -> None:
        try:
            self._save(sorted({*self._stale, *self.buffers.indices()}))
        except UblkError as e:
            _log.error("%s", e.message)

    def _command(self, *words: object, late: Callable[[], None], fds: Sequence[int] = ()) -> int:
        """Have regbuf.py do it; ``late`` is called when the deadline has passed, and may raise.

        Raises UblkError, Refused for memory that the driver refuses, _Closed.
        """
        argv = [sys.executable, "-P", "-m", regbuf.__name__, self._dev_id, self._cookie, *words]
        try:
            child = subprocess.Popen(
                [*map(str, argv)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                pass_fds=fds,
                start_new_session=True,
            )
        except OSError as e:
            raise UblkError(f"cannot start a process: {e.strerror}") from e
        assert child.stdout
        with child.stdout as answer:
            if not self._answered(answer, DEADLINE):
                late()
                self._answered(answer, None)
            text = answer.read()
        child.wait()
        try:
            result = json.loads(text)
        except ValueError as e:
            raise UblkError("a helper process died before it was done", "the daemon's log may say why") from e
        if "index" in result:
            return int(result["index"])
        error = from_dict(result["error"])
        if words[0] == "add":
            raise Refused(result["errno"], error.message) from error
        raise error

    def _answered(self, answer: IO[bytes], timeout: float | None) -> bool:
        ready = readable([answer.fileno(), self._wake_r.fileno()], timeout)
        if self._wake_r.fileno() in ready:
            raise _Closed
        return bool(ready)


def _give_up() -> None:
    raise UblkError(
        f"the driver has not registered or released shared memory within {DEADLINE:g} s",
        "it waits for requests in flight: does the target answer them?",
    )
