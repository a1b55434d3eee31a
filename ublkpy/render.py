"""Results as text: tables for people, JSON for programs, ublksrv's layout for its scripts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from ublkpy.driver.inspect import DeviceStatus, thread_affinity
from ublkpy.folders import user_name
from ublkpy.tgt.options import SECTOR, format_size
from ublkpy.uring.integrity import Csum
from ublkpy.uring.uapi import Attr, Feature, ParamGroups

JSON_VERSION = 1

# ublksrv's names, in its order.
_FLAG_NAMES = {
    Feature.SUPPORT_ZERO_COPY: "SUPPORT_ZERO_COPY",
    Feature.AUTO_BUF_REG: "AUTO_ZC",
    Feature.URING_CMD_COMP_IN_TASK: "URING_CMD_COMP_IN_TASK",
    Feature.NEED_GET_DATA: "NEED_GET_DATA",
    Feature.UNPRIVILEGED_DEV: "UNPRIVILEGED_DEV",
    Feature.USER_RECOVERY: "RECOVERY",
    Feature.USER_RECOVERY_REISSUE: "RECOVERY_REISSUE",
    Feature.CMD_IOCTL_ENCODE: "CMD_IOCTL_ENCODE",
    Feature.USER_COPY: "USER_COPY",
    Feature.ZONED: "ZONED",
    Feature.USER_RECOVERY_FAIL_IO: "RECOVERY_FAIL_IO",
    Feature.UPDATE_SIZE: "UPDATE_SIZE",
    Feature.QUIESCE: "QUIESCE",
    Feature.PER_IO_DAEMON: "PER_IO_DAEMON",
    Feature.BUF_REG_OFF_DAEMON: "BUF_REG_OFF_DAEMON",
    Feature.BATCH_IO: "BATCH_IO",
    Feature.INTEGRITY: "INTEGRITY",
    Feature.SAFE_STOP_DEV: "SAFE_STOP_DEV",
    Feature.NO_AUTO_PART_SCAN: "NO_AUTO_PART_SCAN",
    Feature.SHMEM_ZC: "SHMEM_ZC",
}

_FEATURE_GIVES = {
    Feature.SUPPORT_ZERO_COPY: "requests' pages registered as io_uring buffers: no copy",
    Feature.URING_CMD_COMP_IN_TASK: "completions run in the daemon's task; always on",
    Feature.NEED_GET_DATA: "the daemon chooses the buffer of a write after it has seen the request",
    Feature.USER_RECOVERY: "the device survives its daemon; new requests wait (-r 1, --recovery queue)",
    Feature.USER_RECOVERY_REISSUE: "requests in flight are sent again to the next daemon (-i 1)",
    Feature.UNPRIVILEGED_DEV: "devices of ordinary users",
    Feature.CMD_IOCTL_ENCODE: "ioctl-encoded commands; always on",
    Feature.USER_COPY: "the daemon copies data itself with pread and pwrite",
    Feature.ZONED: "zoned devices",
    Feature.USER_RECOVERY_FAIL_IO: "without a daemon, requests fail at once (-e 1)",
    Feature.UPDATE_SIZE: "a live device can be resized",
    Feature.AUTO_BUF_REG: "zero copy without commands of its own; ublksrv's AUTO_ZC",
    Feature.QUIESCE: "a daemon can be replaced on purpose",
    Feature.PER_IO_DAEMON: "several threads can serve one queue (-T)",
    Feature.BUF_REG_OFF_DAEMON: "buffers can be registered by any thread",
    Feature.BATCH_IO: "many requests per command",
    Feature.INTEGRITY: "metadata with each block (--metadata_size)",
    Feature.SAFE_STOP_DEV: "stop only if nothing has the device open",
    Feature.NO_AUTO_PART_SCAN: "partitions are not looked for at start",
    Feature.SHMEM_ZC: "zero copy through memory shared with the client",
    Feature.IO_DESC_SIZE: "larger request descriptors (--io_desc_size)",
}


def devices(found: Sequence[DeviceStatus], troubles: Mapping[int, str]) -> str:
    """One line a device. Columns never change their order; an unknown value is a dash."""
    head = ["ID", "NODE", "TARGET", "SIZE", "STATE", "QUEUES", "MODE", "PID", "BACKING"]
    return table([head, *([*map(str, _row(device, troubles.get(device.info.dev_id)))] for device in found)])


def _row(device: DeviceStatus, trouble: str | None) -> list[object]:
    info, known = device.info, device.known
    backing = known.backing if known else ""
    note = f"no daemon; run: {device.advice}" if device.advice else trouble or ""
    if Feature.UNPRIVILEGED_DEV in info.flags and not known:
        note = "; ".join(filter(None, (f"of {user_name(info.owner_uid)}", note)))
    if device.name:
        note = "; ".join(filter(None, (f"named {device.name}", note)))
    return [
        info.dev_id,
        device.node,
        known.target["name"] if known else "foreign",
        "-" if device.size is None else format_size(device.size),
        info.state.name,
        f"{info.nr_hw_queues}x{info.queue_depth}",
        known.mode + "+shmem" * (Feature.SHMEM_ZC in info.flags) if known else "-",
        device.pid or "-",
        "  ".join(filter(None, (backing or "-", note and f"({note})"))),
    ]


def ublksrv_dump(device: DeviceStatus) -> str:
    """The details of a device in the layout of ublksrv's ``list -n``, which scripts parse; 0 for what is unknown."""
    info, disk, known = device.info, device.disk, device.known
    lines = [
        f"dev id {info.dev_id}: nr_hw_queues {info.nr_hw_queues} queue_depth {info.queue_depth}"
        f" block size {disk.logical_block if disk else 0} dev_capacity {(device.size or 0) // SECTOR}",
        f"\tmax rq size {info.max_io_buf_bytes} daemon pid {device.pid or -1} state {info.state.name}",
        f"\tflags {int(info.flags):#x} [{''.join(f' {n}' for f, n in _FLAG_NAMES.items() if f in info.flags)} ]",
        f"\tublkc: {device.char_devno} ublkb: {disk.devno if disk else '0:0'} owner: {info.owner_uid}:{info.owner_gid}",
    ]
    if known:
        # A line a queue: of several threads the first one, for all of them have the same CPUs.
        for q_id, (first, *_) in groupby(known.queues, key=lambda thread: thread.q_id):
            cpus = "".join(f"{cpu} " for cpu in thread_affinity(first))
            lines.append(f"\tqueue {q_id}: tid {first.tid} affinity({cpus})")
        target = json.dumps(known.target, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        lines.append(f"\ttarget {target}")
    return "\n".join(lines)


def features(found: Feature, *, every: bool) -> str:
    """A line a feature: whether the kernel has it, and what it gives; unless ``every``, only those that it has.

    The latter for scripts, such as ublksrv's, that look whether there is a line.
    """
    shown = {flag: gives for flag, gives in _FEATURE_GIVES.items() if every or flag in found}
    rows = [[flag.name or "", "yes" if flag in found else "no", gives] for flag, gives in shown.items()]
    return f"ublk_drv features: {int(found):#x}\n{table(rows, indent='  ')}"


def features_json(found: Feature) -> str:
    return to_json(
        {
            "features": int(found),
            "flags": {
                flag.name or "": {"supported": flag in found, "gives": gives} for flag, gives in _FEATURE_GIVES.items()
            },
        }
    )


def params(found: ParamGroups) -> str:
    """A line a parameter: its name and value in the kernel, and what that stands for."""
    values = {f"{group}.{name}": value for group, members in found.items() for name, value in members.items()}
    rows = [[name, str(value), _meaning(name, value)] for name, value in values.items()]
    return table([["PARAMETER", "VALUE", "MEANING"], *rows])


def _meaning(name: str, value: int) -> str:
    """The value in words, or a size; empty for a mere number."""
    if name == "basic.attrs":
        return " ".join(attr.name or "" for attr in Attr(value))
    if name == "integrity.csum_type":
        return next((csum.name for csum in Csum if csum == value), "")
    if name.endswith("_shift") or name == "integrity.interval_exp":
        return format_size(1 << value)
    if name.endswith("_sectors"):
        return format_size(value * SECTOR)
    if name.endswith(("_granularity", "_alignment", "_size")):
        return format_size(value)
    return ""


def devices_json(found: Iterable[DeviceStatus], troubles: Mapping[int, str]) -> str:
    return to_json({"devices": [device_dict(device, troubles) for device in found]})


def device_dict(device: DeviceStatus, troubles: Mapping[int, str]) -> dict[str, Any]:
    """A device with what is wrong with it."""
    return {**device.to_dict(), "trouble": troubles.get(device.info.dev_id)}


def to_json(data: dict[str, Any]) -> str:
    """A versioned object; docs/json.md describes each."""
    return json.dumps({"version": JSON_VERSION, **data}, indent=2, ensure_ascii=False)


def table(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Columns as wide as they need to be: nothing is cut, so that a pipe gets all of it."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
