"""What the kernel lets this process do."""

from __future__ import annotations

import re
import resource
from pathlib import Path

# include/uapi/linux/capability.h
_CAP_IPC_LOCK = 14
_CAP_SYS_ADMIN = 21
# include/uapi/linux/nsfs.h, USER_NS_INIT_INO: root of a container has capabilities, but not for the driver.
_INITIAL_USER_NAMESPACE = 0xEFFFFFFD


def may_administer() -> bool:
    """CAP_SYS_ADMIN, which the driver asks for all but unprivileged devices."""
    return _has(_CAP_SYS_ADMIN) and Path("/proc/self/ns/user").stat().st_ino == _INITIAL_USER_NAMESPACE


def memory_limit() -> int | None:
    """How many bytes of memory we may lock; None for any number."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY or _has(_CAP_IPC_LOCK) else limit


def _has(capability: int) -> bool:
    """Whether it is effective (proc(5), capabilities(7))."""
    effective = re.search(r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return bool(effective and int(effective[1], 16) >> capability & 1)
