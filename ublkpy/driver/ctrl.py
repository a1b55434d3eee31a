"""The commands of /dev/ublk-control, as methods with deadlines.

Every method raises an ``UblkError`` that names cause and cure. A command that
misses its deadline goes on in the kernel, where no signal reaches it, and its
process cannot end before it does. STOP_DEV and DEL_DEV wait for the daemon
and its clients, and all that takes the mutex of the device waits for them:
SET_PARAMS, GET_PARAMS, START_DEV, START_USER_RECOVERY, END_USER_RECOVERY
(ublk_drv.c). On a device that others may be stopping, send those through
``spawn.isolated``.

A device of an ordinary user (UBLK_F_UNPRIVILEGED_DEV) is open to those who may
open its character device, whose path goes in front of what each command
carries. The driver takes the path of other devices, too, but not in front of data.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ublkpy import folders
from ublkpy.errors import DriverError, InterruptedByUser, UblkError, command_error, no_device
from ublkpy.system import privilege
from ublkpy.uring.command import CommandRing
from ublkpy.uring.ffi import ffi, lib
from ublkpy.uring.uapi import SECTOR, DevInfo, Feature, ParamGroups, Params, param_groups

CONTROL = Path("/dev/ublk-control")
AUTO_ID = 0xFFFFFFFF
_NO_QUEUE = 0xFFFF
_OF_NO_DEVICE = ("GET_FEATURES", "ADD_DEV")
_CPU_MASK_BYTES = 1024  # 8192 CPUs, the most that x86-64 kernels are built for

QUICK = 15.0
"""Seconds that a command may take which waits for nobody."""

START_DEADLINE = 60.0
"""Seconds for START_DEV and END_USER_RECOVERY, which wait for every queue's FETCHes and, on Linux 6.12,
for the partition scan."""


def require_driver() -> None:
    """DriverError unless /dev/ublk-control can be opened."""
    try:
        os.close(os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        raise _open_error(e) from e


def require_right_to_add(*, unprivileged: bool) -> None:
    """DriverError unless the driver lets this process add such a device."""
    require_driver()
    administrator = privilege.may_administer()
    if unprivileged and administrator:
        raise DriverError(
            "unprivileged devices are for those who lack CAP_SYS_ADMIN: the driver makes an ordinary one of root's",
            "leave --unprivileged out, or run it as the user whose device it is to be",
        )
    if not unprivileged and not administrator:
        raise DriverError(
            "no privilege to add a device: this process lacks CAP_SYS_ADMIN",
            "run it as root, for example with sudo; or add a device of your own with --unprivileged",
        )


def char_path(dev_id: int) -> str:
    """The character device, for the daemon."""
    return f"/dev/ublkc{dev_id}"


def reachable(dev_id: int) -> bool:
    """Whether this user may send commands to the device."""
    return privilege.may_administer() or os.access(char_path(dev_id), os.R_OK | os.W_OK)


def owner(dev_id: int) -> str:
    """The name of the user whose device it is, for those who may not ask the driver."""
    try:
        return folders.user_name(os.stat(char_path(dev_id)).st_uid)  # noqa: PTH116
    except OSError:
        return "another user"


class Control:
    """An open /dev/ublk-control. Belongs to the thread that made it."""

    def __init__(self) -> None:
        try:
            self._ring = CommandRing(str(CONTROL))
        except OSError as e:
            raise _open_error(e) from e
        self._administrator = privilege.may_administer()

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *exc: object) -> None:
        self._ring.close()

    def features(self) -> Feature:
        """GET_FEATURES: what this kernel's driver can do."""
        mask = ffi.new("uint64_t *")
        self._call("GET_FEATURES", AUTO_ID, buf=mask)
        return Feature(mask[0])

    def add(self, wanted: DevInfo) -> DevInfo:
        """ADD_DEV: create the device; what comes back is what the driver made of it."""
        info = wanted.to_c()
        self._call("ADD_DEV", wanted.dev_id, buf=info)
        return DevInfo.from_c(info)

    def set_params(self, dev_id: int, params: Params) -> Params:
        """SET_PARAMS, then GET_PARAMS: the driver drops silently what it does not know."""
        self._call("SET_PARAMS", dev_id, buf=params.to_c())
        got = self.params(dev_id)
        if got != params:
            raise UblkError(f"the driver did not take the parameters of device {dev_id}: {params} became {got}")
        return got

    def params(self, dev_id: int) -> Params:
        """GET_PARAMS, as far as we set them."""
        return Params.from_c(self._get_params(dev_id))

    def param_groups(self, dev_id: int) -> ParamGroups:
        """GET_PARAMS, all of them."""
        return param_groups(self._get_params(dev_id))

    def _get_params(self, dev_id: int) -> Any:
        params = ffi.new("struct ublk_params *")
        params.len = ffi.sizeof("struct ublk_params")
        self._call("GET_PARAMS", dev_id, buf=params)
        return params

    def info(self, dev_id: int) -> DevInfo:
        """GET_DEV_INFO, or GET_DEV_INFO2 for the devices of ordinary users."""
        info = ffi.new("struct ublksrv_ctrl_dev_info *")
        refused = errno.EINVAL  # where root must name the character device
        if not self._administrator or self._call("GET_DEV_INFO", dev_id, buf=info, accept=[refused]) == -refused:
            self._call("GET_DEV_INFO2", dev_id, buf=info)
        return DevInfo.from_c(info)

    def affinity(self, dev_id: int, q_id: int) -> set[int]:
        """GET_QUEUE_AFFINITY: the CPUs that send requests to this queue."""
        mask = ffi.new(f"uint8_t[{_CPU_MASK_BYTES}]")
        self._call("GET_QUEUE_AFFINITY", dev_id, buf=mask, data=q_id)
        bits = int.from_bytes(bytes(mask), "little")
        return {cpu for cpu in range(bits.bit_length()) if bits >> cpu & 1}

    def start(self, dev_id: int, abort_fd: int) -> None:
        """START_DEV: waits for all FETCHes, then the block device appears. ``abort_fd`` readable: give up."""
        self._call("START_DEV", dev_id, data=os.getpid(), timeout=START_DEADLINE, abort_fd=abort_fd)

    def start_recovery(self, dev_id: int) -> None:
        """START_USER_RECOVERY: the old daemon is gone, a new one may open the device. Drivers before Linux 6.16 want it
        to have fetched all queues, see ``halfway``.
        """
        self._call("START_USER_RECOVERY", dev_id)

    def end_recovery(self, dev_id: int, abort_fd: int) -> None:
        """END_USER_RECOVERY: waits for all FETCHes of the new daemon, then requests flow again."""
        self._call("END_USER_RECOVERY", dev_id, data=os.getpid(), timeout=START_DEADLINE, abort_fd=abort_fd)

    def stop(self, dev_id: int, timeout: float) -> None:
        """STOP_DEV: remove the block device, when its caches are written and its requests answered."""
        self._call("STOP_DEV", dev_id, timeout=timeout)

    def delete(self, dev_id: int, timeout: float) -> None:
        """DEL_DEV: stop, remove, and wait until the id is free."""
        self._call("DEL_DEV", dev_id, timeout=timeout)

    def delete_async(self, dev_id: int, timeout: float) -> None:
        """DEL_DEV_ASYNC: the same without the last wait. DEL_DEV before Linux 6.9, which has no such command
        (EOPNOTSUPP), and for the devices of ordinary users, which cannot have it (EINVAL)."""
        if self._call("DEL_DEV_ASYNC", dev_id, timeout=timeout, accept=[errno.EOPNOTSUPP, errno.EINVAL]) < 0:
            self.delete(dev_id, timeout)

    def try_stop(self, dev_id: int, timeout: float) -> None:
        """TRY_STOP_DEV: STOP_DEV, but BusyError if anybody has the block device open."""
        self._call("TRY_STOP_DEV", dev_id, timeout=timeout)

    def update_size(self, dev_id: int, size: int) -> None:
        """UPDATE_SIZE: the device has so many bytes now. Only for one that is LIVE: Linux 6.18 does not look."""
        self._call("UPDATE_SIZE", dev_id, data=size // SECTOR)

    def quiesce(self, dev_id: int, timeout: float) -> None:
        """QUIESCE_DEV: hold new requests up, and take all tags back that the daemon waits on.

        With every tag busy it returns at once and takes none: to be repeated.
        """
        self._call("QUIESCE_DEV", dev_id, data=int(timeout * 1000), timeout=timeout + QUICK)

    def register_buffer(self, dev_id: int, address: int, length: int, *, read_only: bool, timeout: float) -> int:
        """REG_BUF: have the driver know this memory of ours, in whole pages, when requests are in it; its index.

        Waits until no request is in flight, and holds new ones up. The pages stay pinned until UNREG_BUF.
        """
        buf = ffi.new("struct ublk_shmem_buf_reg *")
        buf.addr, buf.len, buf.flags = address, length, lib.UBLK_SHMEM_BUF_READ_ONLY if read_only else 0
        return self._call("REG_BUF", dev_id, buf=buf, timeout=timeout)

    def unregister_buffer(self, dev_id: int, index: int, timeout: float) -> None:
        """UNREG_BUF: have the driver let go of it, after the same wait. One that it does not know is no error."""
        self._call("UNREG_BUF", dev_id, data=index, timeout=timeout, accept=[errno.ENOENT])

    def _call(
        self,
        command: str,
        dev_id: int,
        *,
        buf: Any = None,
        data: int = 0,
        timeout: float = QUICK,
        abort_fd: int = -1,
        accept: Sequence[int] = (),
    ) -> int:
        """Send a command and wait for its result; that is -errno if it failed with one of those in ``accept``."""
        cmd = ffi.new("struct ublksrv_ctrl_cmd *")
        cmd.dev_id = dev_id
        cmd.queue_id = _NO_QUEUE
        cmd.data[0] = data
        # A copy, to have the path in front of it.
        data_size = 0 if buf is None else _size(buf)
        path = self._path(command, dev_id, data_size)
        carried = ffi.new("uint8_t[]", len(path) + data_size)
        ffi.memmove(carried, path, len(path))
        if buf is not None:
            ffi.memmove(carried + len(path), buf, data_size)
        if len(carried):
            cmd.addr, cmd.len, cmd.dev_path_len = int(ffi.cast("uintptr_t", carried)), len(carried), len(path)
        code = getattr(lib, f"UBLK_U_CMD_{command}")
        try:
            result = self._ring.call(code, cmd, timeout, keep=(carried,), abort_fd=abort_fd)
            if buf is not None:
                ffi.memmove(buf, carried + len(path), data_size)
            return result
        except TimeoutError as e:
            raise UblkError(
                f"{command} of device {dev_id} is not done after {timeout:g} s",
                "the kernel log (dmesg) may say why",
            ) from e
        except InterruptedError as e:
            raise InterruptedByUser(f"{command} of device {dev_id} was interrupted") from e
        except OSError as e:
            number = e.errno or errno.EIO
            if number in accept:
                return -number
            if path and number == errno.ENOENT:
                raise no_device(dev_id) from e
            if path and number in (errno.EPERM, errno.EACCES):
                raise DriverError(
                    f"device {dev_id} belongs to {owner(dev_id)}", "only that user and root may have it: try sudo"
                ) from e
            raise command_error(command, number, dev_id) from e

    def _path(self, command: str, dev_id: int, data_size: int) -> bytes:
        """The path of the character device with its NUL, or nothing.

        Of all commands with data, root needs GET_DEV_INFO2 alone for the devices of others.
        """
        named = command == "GET_DEV_INFO2" or not (self._administrator and data_size)
        return b"" if command in _OF_NO_DEVICE or not named else char_path(dev_id).encode() + b"\0"


def _size(buf: Any) -> int:
    """An array's own size in bytes, or that of what a pointer points to."""
    kind = ffi.typeof(buf)
    return int(ffi.sizeof(buf) if kind.kind == "array" else ffi.sizeof(kind.item))


def _open_error(e: OSError) -> UblkError:
    if e.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        return DriverError(
            f"{CONTROL} does not exist: the ublk driver is not loaded",
            "load it with: modprobe ublk_drv (Linux 6.5 or newer, built with CONFIG_BLK_DEV_UBLK; on"
            " Debian's and Ubuntu's kernels it may be in a package of extra modules)",
        )
    if e.errno in (errno.EACCES, errno.EPERM) and not os.access(CONTROL, os.R_OK | os.W_OK):
        return DriverError(
            f"no permission to open {CONTROL}",
            "run it as root, for example with sudo; or, for devices of your own, have root run ublk udev install",
        )
    if e.errno in (errno.ENOSYS, errno.EPERM):
        return DriverError(
            "io_uring is not available to this process",
            "set sysctl kernel.io_uring_disabled=0, and allow io_uring in the container's seccomp profile",
        )
    if e.errno == errno.ENOMEM:
        return DriverError(
            f"cannot use {CONTROL}: {os.strerror(errno.ENOMEM)}",
            "a user who is not root may need a higher limit of locked memory (ulimit -l)",
        )
    return DriverError(f"cannot use {CONTROL}: {os.strerror(e.errno or errno.EIO)}", f"python is {sys.executable}")
