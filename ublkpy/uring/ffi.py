"""The only import of the compiled module."""

from __future__ import annotations

import os
from typing import Any

from ublkpy.uring._ffi import ffi, lib

__all__ = ["check", "ffi", "lib"]


def check(res: int, what: str) -> int:
    """``res`` if it is not negative, else OSError(-res, what): the one door from -errno to exceptions."""
    if res < 0:
        raise OSError(-res, f"{what}: {os.strerror(-res)}")
    return res


def check_libc(res: int, what: str) -> Any:
    """The same for libc functions, which return -1 and leave the reason in errno."""
    return check(-ffi.errno if res < 0 else res, what)
