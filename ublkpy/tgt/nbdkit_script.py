"""A plugin's file: loaded, configured, and asked what its disk can do. What it raises there becomes an UblkError."""

from __future__ import annotations

import contextlib
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ublkpy.errors import UblkError
from ublkpy.tgt import nbdkit_module as nbdkit
from ublkpy.tgt.options import SECTOR

_PAGE = "docs/targets/nbdkit-python.md"
_REQUIRED = ("open", "get_size", "pread")
_MAX_MINIMUM = 4096  # ublkpy's largest logical block
_MAX_REQUEST = 32 << 20  # ublkpy's largest buffer


@dataclass(frozen=True)
class Ability:
    """What a plugin says of its disk. Sizes in bytes; ``maximum``, of a request, is 0 where that does not matter."""

    size: int
    minimum: int = SECTOR
    preferred: int = 0
    maximum: int = 0
    write: bool = False
    flush: bool = False
    trim: bool = False
    zero: bool = False
    fua: bool = False
    rotational: bool = False


class Script:
    """The functions of a plugin. UblkError with the line in its file for all that they raise here."""

    def __init__(self, path: Path) -> None:
        """Run the file. Its ``import nbdkit`` finds our module."""
        self.path = path
        nbdkit._install()
        # The name that it has with nbdkit, but not the place: other modules of that name are in use.
        self._module = ModuleType("__main__")
        self._module.__file__ = str(path)
        try:
            source = path.read_bytes()
        except OSError as e:
            raise UblkError(f"cannot read {path}: {e.strerror}", "script is the file of an nbdkit plugin") from e
        self._told("loading", lambda: exec(compile(source, str(path), "exec", dont_inherit=True), vars(self._module)))
        for name in _REQUIRED:
            if self.function(name) is None:
                raise UblkError(
                    f"{path} has no function {name}",
                    f"a plugin for nbdkit needs these: {', '.join(_REQUIRED)}; {_PAGE} says more",
                )
        self.version = getattr(self._module, "API_VERSION", 1)
        if self.version not in (1, 2):
            raise UblkError(f"{path} is for version {self.version!r} of nbdkit's API", "1 and 2 are known here")

    def function(self, name: str) -> Callable[..., Any] | None:
        """The plugin's own, if it has one of that name."""
        found = getattr(self._module, name, None)
        return found if callable(found) else None

    def call(self, name: str, *args: Any, default: Any = None) -> Any:
        """What it returns; ``default`` where there is none."""
        function = self.function(name)
        return default if function is None else self._told(name, lambda: function(*args))

    def configure(self, arguments: Sequence[str]) -> None:
        """From the arguments, ``key=value`` each, to where it is ready to be opened."""
        if arguments and self.function("config") is None:
            raise UblkError(f"{self.path} takes no arguments such as {arguments[0]}", "it has no function config")
        for argument in arguments:
            key, _, value = argument.partition("=")
            self.call("config", key, value)
        self.call("config_complete")

    def thread_model(self) -> int:
        """One of nbdkit's THREAD_MODEL_*."""
        found = self.call("thread_model", default=nbdkit.THREAD_MODEL_SERIALIZE_ALL_REQUESTS)
        if found not in range(nbdkit.THREAD_MODEL_PARALLEL + 1):
            raise UblkError(f"{self.path}: thread_model returned {found!r}", "it is one of nbdkit.THREAD_MODEL_*")
        return int(found)

    def open(self, readonly: bool) -> Any:
        """A handle."""
        self.call("preconnect", readonly)
        return self.call("open", readonly)

    def ability(self, handle: Any) -> Ability:
        """What the disk behind a handle can do."""
        minimum, preferred, maximum = self._block_size(handle)
        can_flush = self._can("can_flush", "flush", handle)
        fua = self.call("can_fua", handle, default=nbdkit.FUA_EMULATE)
        return Ability(
            self._size(handle, minimum),
            minimum,
            preferred,
            maximum,
            write=self._can("can_write", "pwrite", handle),
            flush=can_flush,
            trim=self._can("can_trim", "trim", handle),
            zero=self._can("can_zero", "zero", handle),
            fua=fua == nbdkit.FUA_NATIVE and self.version > 1,  # before, no function had flags
            rotational=bool(self.call("is_rotational", handle, default=False)),
        )

    def _can(self, question: str, function: str, handle: Any) -> bool:
        return self.function(function) is not None and bool(self.call(question, handle, default=True))

    def _size(self, handle: Any, minimum: int) -> int:
        size = self.call("get_size", handle)
        if not isinstance(size, int) or size <= 0:
            raise UblkError(f"{self.path}: get_size returned {size!r}", "it is a number of bytes, 512 or more")
        if size % minimum:
            raise UblkError(
                f"{self.path}: get_size returned {size}, which is not a multiple of {minimum}",
                f"a block device consists of whole blocks: {size - size % minimum} and"
                f" {size - size % minimum + minimum} are sizes that it can have",
            )
        return size

    def _block_size(self, handle: Any) -> tuple[int, int, int]:
        found = self.call("block_size", handle, default=(0, 0, 0))
        try:
            minimum, preferred, maximum = map(int, found)
        except (TypeError, ValueError) as e:
            raise UblkError(
                f"{self.path}: block_size returned {found!r}", "it is three numbers: minimum, preferred, maximum"
            ) from e
        minimum, preferred = max(minimum, SECTOR), max(preferred, 0)
        if minimum > _MAX_MINIMUM or any(size & (size - 1) for size in (minimum, preferred)):
            raise UblkError(
                f"{self.path}: block_size returned {found!r}",
                f"minimum and preferred must be powers of two here, the minimum at most {_MAX_MINIMUM}",
            )
        if maximum >= _MAX_REQUEST or maximum <= 0:
            maximum = 0
        elif maximum % minimum:
            raise UblkError(
                f"{self.path}: block_size returned {found!r}", "the maximum must be a multiple of the minimum"
            )
        return minimum, preferred, maximum

    def _told(self, what: str, action: Callable[[], Any]) -> Any:
        # What a command prints is the node, and nothing else. A command has one thread yet; from others, that would
        # be the stdout of all, and the first to come back would not be the first to put it back.
        alone = threading.current_thread() is threading.main_thread()
        try:
            with contextlib.redirect_stdout(sys.stderr) if alone else contextlib.nullcontext():
                return action()
        except KeyboardInterrupt:
            raise
        except BaseException as e:
            nbdkit._take_error()
            found = traceback.TracebackException.from_exception(e)
            found.stack[:] = [frame for frame in found.stack if frame.filename != __file__]
            lines = [frame.lineno for frame in found.stack if frame.filename == str(self.path)]
            line = lines[-1] if lines else found.lineno if isinstance(e, SyntaxError) else None
            place = f"{self.path}:{line}" if line else str(self.path)
            said = "".join(found.format_exception_only()).strip().splitlines()[-1]
            raise UblkError(f"{place}: {what} failed: {said}", "".join(found.format()).rstrip()) from e
