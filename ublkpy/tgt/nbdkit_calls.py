"""The methods of a target, made of the functions of a plugin. What stands in them is what a request costs."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from ublkpy.tgt import nbdkit_module as nbdkit
from ublkpy.tgt.nbdkit_script import Ability, Script

Method = Callable[..., None]

_ZEROES = bytes(1 << 20)
"""So many are written at a time where a plugin cannot zero."""


def methods(script: Script, ability: Ability, handle: Any, *, through: bool) -> dict[str, Method]:
    """By the names of ``Target``'s. ``through``: each write is to be durable when it is done, and there are no flushes.

    OSError with the errno of ``nbdkit.set_error``, or else whatever the plugin raises.
    """
    pread, pwrite, flush, trim, zero = _versioned(script)
    made = {"read": _io(pread, handle, 0, ability.maximum)}
    if ability.flush:
        made["flush"] = _plain(flush, handle, 0)
    if ability.write:
        native = nbdkit.FLAG_FUA if ability.fua else 0
        fua = native if through else 0
        write = _io(pwrite, handle, fua, ability.maximum)
        zeroes = {"write_zeroes": fua, "punch_hole": fua | nbdkit.FLAG_MAY_TRIM} if ability.zero else {}
        made |= {name: _zero(_range(zero, handle, flags), write) for name, flags in zeroes.items()}
        made |= {"discard": _range(trim, handle, 0)} if ability.trim else {}
        made["write"] = write
        if native and not through:
            made["write_fua"] = _io(pwrite, handle, native, ability.maximum)
        if through and not native and ability.flush:
            for name in {"write", *zeroes}:
                made[name] = _then(made[name], made["flush"])
    if through or not ability.write:
        made.pop("flush", None)
    return made


def one_at_a_time(calls: dict[str, Method]) -> dict[str, Method]:
    """The same for several threads, behind one lock."""
    lock = threading.Lock()

    def locked(method: Method) -> Method:
        def call(*args: Any) -> None:
            with lock:
                method(*args)

        return call

    return {name: locked(method) for name, method in calls.items()}


def fail(error: BaseException) -> NoReturn:
    """Raise what a plugin's exception is answered with."""
    err = nbdkit._take_error()
    if err:
        raise OSError(err, f"{os.strerror(err)}: {error}") from error
    if not isinstance(error, Exception):  # sys.exit(), for example, must not end a queue
        raise RuntimeError(f"the plugin raised {type(error).__name__}") from error
    raise error


def _versioned(script: Script) -> list[Callable[..., Any]]:
    """pread, pwrite, flush, trim and zero, as version 2 of the API has them."""
    found: list[Callable[..., Any]]
    found = [script.function(name) or _missing for name in ("pread", "pwrite", "flush", "trim", "zero")]
    if script.version > 1:
        return found
    pread, pwrite, flush, trim, zero = found

    def read(handle: Any, buf: memoryview, offset: int, flags: int) -> None:
        data = memoryview(pread(handle, len(buf), offset)).cast("B")
        if len(data) < len(buf):
            raise ValueError(f"pread returned {len(data)} bytes of {len(buf)}")
        buf[:] = data[: len(buf)]

    return [
        read,
        lambda handle, buf, offset, flags: pwrite(handle, buf, offset),
        lambda handle, flags: flush(handle),
        lambda handle, count, offset, flags: trim(handle, count, offset),
        lambda handle, count, offset, flags: zero(handle, count, offset, bool(flags & nbdkit.FLAG_MAY_TRIM)),
    ]


def _missing(*args: Any) -> None:
    raise OSError(errno.EOPNOTSUPP, "the plugin has no such function")


def _io(function: Callable[..., Any], handle: Any, flags: int, maximum: int) -> Method:
    errors = nbdkit._errors

    def call(offset: int, buf: memoryview) -> None:
        try:
            function(handle, buf, offset, flags)
        except BaseException as e:
            fail(e)
        if errors:  # of one that it got over
            nbdkit._take_error()

    def in_pieces(offset: int, buf: memoryview) -> None:
        for start in range(0, len(buf), maximum):
            with buf[start : start + maximum] as piece:
                call(offset + start, piece)

    return in_pieces if maximum else call


def _range(function: Callable[..., Any], handle: Any, flags: int) -> Method:
    def call(offset: int, length: int) -> None:
        try:
            function(handle, length, offset, flags)
        except BaseException as e:
            fail(e)
        nbdkit._take_error()

    return call


def _plain(function: Callable[..., Any], handle: Any, flags: int) -> Method:
    def call() -> None:
        try:
            function(handle, flags)
        except BaseException as e:
            fail(e)
        nbdkit._take_error()

    return call


def _zero(zero: Method, write: Method) -> Method:
    """``zero``, or ``write`` where the plugin says that it does not know a better way."""

    def call(offset: int, length: int) -> None:
        try:
            zero(offset, length)
        except OSError as e:
            if e.errno not in (errno.EOPNOTSUPP, errno.ENOTSUP):
                raise
            for start in range(0, length, len(_ZEROES)):
                write(offset + start, memoryview(_ZEROES)[: length - start])

    return call


def _then(method: Method, flush: Method) -> Method:
    def call(offset: int, what: Any) -> None:
        method(offset, what)
        flush()

    return call
