"""The module ``nbdkit`` that plugins for nbdkit import: its constants, and its functions as far as they make sense.

``install`` puts it where ``import nbdkit`` finds it. Names without an underscore are the plugins'.
"""

from __future__ import annotations

import errno
import getpass
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NoReturn

from ublkpy.tgt.options import parse_size as _parse_size

_log = logging.getLogger("ublkpy.nbdkit")

THREAD_MODEL_SERIALIZE_CONNECTIONS = 0
THREAD_MODEL_SERIALIZE_ALL_REQUESTS = 1
THREAD_MODEL_SERIALIZE_REQUESTS = 2
THREAD_MODEL_PARALLEL = 3

FLAG_MAY_TRIM = 1
FLAG_FUA = 2
FLAG_REQ_ONE = 4
FLAG_FAST_ZERO = 8

FUA_NONE = 0
FUA_EMULATE = 1
FUA_NATIVE = 2

CACHE_NONE = 0
CACHE_EMULATE = 1
CACHE_NATIVE = 2

EXTENT_HOLE = 1
EXTENT_ZERO = 2

_MAX_ERRNO = 4095
_DELAY_UNITS = {"": 10**9, "s": 10**9, "ms": 10**6, "us": 10**3, "μs": 10**3, "ns": 1}

_errors: dict[int, int] = {}
_served: list[Callable[[], None]] = []


def _install() -> None:
    sys.modules["nbdkit"] = sys.modules[__name__]


def _begin(shutdown: Callable[[], None]) -> None:
    """From now on, there is a device that could be shut down."""
    _served.append(shutdown)


def _end(shutdown: Callable[[], None]) -> None:
    """It is gone."""
    _served.remove(shutdown)


def _take_error() -> int:
    """What this thread said with ``set_error`` last, once; 0 for nothing."""
    return _errors.pop(threading.get_ident(), 0)


# -- what plugins call ---------------------------------------------------------------------


def set_error(err: int) -> None:
    """The errno of the exception that this thread is about to raise."""
    _errors[threading.get_ident()] = err if 0 < err <= _MAX_ERRNO else errno.EIO


def debug(msg: str) -> None:
    """Into the log, where that has messages of this kind."""
    _log.debug("%s", msg)


def parse_size(text: str) -> int:
    """Bytes from "100M" and the like. ValueError with the reason."""
    return _parse_size(text)


def parse_probability(what: str, text: str) -> float:
    """From "0.1", "10%", "1:10" or "1/10". ValueError with the reason."""
    number = r"\s*((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*"
    match = re.fullmatch(f"{number}(?:(%)|[:/]{number})?", text, re.IGNORECASE)
    divisor = float(match[3] or (100 if match[2] else 1)) if match else 0
    if not match or not divisor:
        raise ValueError(f"{what}: {text!r} is not a probability such as 0.1, 10% or 1:10")
    return float(match[1]) / divisor


def parse_delay(what: str, text: str) -> tuple[int, int]:
    """Seconds and nanoseconds from "1.2", "1.2s", "120ms", "5us" or "1ns". ValueError with the reason."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)(s|ms|us|μs|ns|)", text.strip())
    if not match:
        raise ValueError(f"{what}: {text!r} is not a time such as 1.2s or 120ms")
    return divmod(int(Fraction(match[1]) * _DELAY_UNITS[match[2]]), 10**9)


def nanosleep(sec: int, nsec: int) -> None:
    """Sleep."""
    time.sleep(sec + nsec / 1e9)


def read_password(value: str) -> bytes:
    """What ``value`` is, or where it says that the password is: "+FILE", "-FD", or "-" for asking."""
    if value == "-":
        return os.fsencode(getpass.getpass("password: "))
    if value.startswith("+"):
        return Path(value[1:]).read_bytes().partition(b"\n")[0]
    if value.startswith("-"):
        with os.fdopen(int(value[1:]), "rb") as file:
            return file.readline().removesuffix(b"\n")
    return os.fsencode(value)


def stdio_safe() -> bool:
    """Whether a plugin may talk on stdin and stdout."""
    return False


def shutdown() -> None:
    """Have the device deleted: not if it is mounted or held."""
    if len(_served) != 1:  # a daemon has one
        there = "this program serves several devices of plugins" if _served else "there is no device yet"
        raise RuntimeError(f"nbdkit.shutdown: {there}")
    _served[0]()


def disconnect(force: bool) -> None:
    """There is nobody to be disconnected."""
    _log.warning("nbdkit.disconnect does nothing: the client is the kernel")


def export_name() -> str:
    """That of the default export: nobody asks for another."""
    return ""


def is_tls() -> bool:
    """Whether the client uses TLS."""
    return False


def peer_tls_dn() -> str:
    """Who it is then."""
    return ""


peer_tls_issuer_dn = peer_tls_dn


def _no_peer() -> NoReturn:
    set_error(errno.ENOTCONN)
    raise OSError(errno.ENOTCONN, "nbdkit.peer_*: the client is the kernel, which has no address and no process")


peer_name = peer_pid = peer_uid = peer_gid = peer_security_context = _no_peer
