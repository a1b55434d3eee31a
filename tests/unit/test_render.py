"""Output: tables, ublksrv's layout and JSON."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ublkpy import __version__, render
from ublkpy.driver.disk import Disk
from ublkpy.driver.inspect import DeviceStatus
from ublkpy.driver.state import DeviceState, QueueState, process_start_time
from ublkpy.uring.ffi import ffi
from ublkpy.uring.uapi import Attr, DevInfo, Feature, Params, State, param_groups

COLUMNS = ["ID", "NODE", "TARGET", "SIZE", "STATE", "QUEUES", "MODE", "PID", "BACKING"]
NO_PROCESS = 1 << 22  # the largest pid there can be is one less
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def ours() -> DeviceStatus:
    """A device of a daemon that runs: this process."""
    pid = os.getpid()
    return DeviceStatus(
        DevInfo(
            dev_id=0,
            nr_hw_queues=1,
            queue_depth=128,
            max_io_buf_bytes=524288,
            flags=Feature(0x42),
            ublksrv_flags=99,
            state=State.LIVE,
            ublksrv_pid=pid,
        ),
        "237:0",
        Disk("259:1", 250 << 30, 512, 4096, Attr.VOLATILE_CACHE | Attr.FUA),
        DeviceState(
            dev_id=0,
            cookie=99,
            pid=pid,
            start_time=process_start_time(pid) or 0,
            mode="copy",
            queues=[QueueState(0, NO_PROCESS, [3])],
            config={"device": {}, "target": {"type": "loop", "file": "/1.img"}},
            target={
                "name": "loop",
                "type": 0,
                "dev_size": 1 << 30,
                "backing_file": "1.img",
                "direct_io": 1,
                "offset": 0,
            },
            backing="/1.img",
        ),
    )


@pytest.fixture
def foreign(ours: DeviceStatus) -> DeviceStatus:
    """A device of another server, which is dead."""
    info = replace(ours.info, dev_id=12, nr_hw_queues=4, ublksrv_pid=NO_PROCESS)
    return DeviceStatus(info, "237:12", Disk("259:9", (1 << 20) + (1 << 19), 512, 4096, Attr(0)), None)


# -- ublksrv's layout ----------------------------------------------------------------------


def test_ublksrv_dump(ours: DeviceStatus) -> None:
    assert render.ublksrv_dump(ours) == (
        "dev id 0: nr_hw_queues 1 queue_depth 128 block size 512 dev_capacity 524288000\n"
        f"\tmax rq size 524288 daemon pid {os.getpid()} state LIVE\n"
        "\tflags 0x42 [ URING_CMD_COMP_IN_TASK CMD_IOCTL_ENCODE ]\n"
        "\tublkc: 237:0 ublkb: 259:1 owner: 0:0\n"
        "\tqueue 0: tid 4194304 affinity(3 )\n"
        '\ttarget {"backing_file":"1.img","dev_size":1073741824,"direct_io":1,"name":"loop","offset":0,"type":0}'
    )


def test_ublksrv_dump_of_a_foreign_device_without_a_daemon(foreign: DeviceStatus) -> None:
    assert render.ublksrv_dump(foreign) == (
        "dev id 12: nr_hw_queues 4 queue_depth 128 block size 512 dev_capacity 3072\n"
        "\tmax rq size 524288 daemon pid -1 state LIVE\n"
        "\tflags 0x42 [ URING_CMD_COMP_IN_TASK CMD_IOCTL_ENCODE ]\n"
        "\tublkc: 237:12 ublkb: 259:9 owner: 0:0"
    )


def test_ublksrv_dump_names_all_flags_in_ublksrvs_order(foreign: DeviceStatus) -> None:
    shown = render.ublksrv_dump(replace(foreign, info=replace(foreign.info, flags=Feature((1 << 20) - 1))))
    assert shown.splitlines()[2] == (
        "\tflags 0xfffff [ SUPPORT_ZERO_COPY AUTO_ZC URING_CMD_COMP_IN_TASK NEED_GET_DATA UNPRIVILEGED_DEV RECOVERY"
        " RECOVERY_REISSUE CMD_IOCTL_ENCODE USER_COPY ZONED RECOVERY_FAIL_IO UPDATE_SIZE QUIESCE PER_IO_DAEMON"
        " BUF_REG_OFF_DAEMON BATCH_IO INTEGRITY SAFE_STOP_DEV NO_AUTO_PART_SCAN SHMEM_ZC ]"
    )


def test_ublksrv_dump_shows_flags_it_has_no_name_for(foreign: DeviceStatus) -> None:
    shown = render.ublksrv_dump(replace(foreign, info=replace(foreign.info, flags=Feature(1 << 40))))
    assert shown.splitlines()[2] == "\tflags 0x10000000000 [ ]"


def test_affinity_is_that_of_the_thread_now(ours: DeviceStatus) -> None:
    assert ours.known
    queues = [QueueState(0, os.getpid(), [4095])]
    cpus = "".join(f"{cpu} " for cpu in sorted(os.sched_getaffinity(0)))
    shown = render.ublksrv_dump(replace(ours, known=replace(ours.known, queues=queues)))
    assert f"\tqueue 0: tid {os.getpid()} affinity({cpus})\n" in shown


def test_a_queue_with_several_threads_has_one_line(ours: DeviceStatus) -> None:
    assert ours.known
    queues = [QueueState(q_id, NO_PROCESS + tid, [q_id]) for q_id, tid in ((0, 0), (0, 2), (1, 1), (1, 3))]
    several = replace(ours, known=replace(ours.known, queues=queues))
    assert [line for line in render.ublksrv_dump(several).splitlines() if line.startswith("\tqueue")] == [
        f"\tqueue 0: tid {NO_PROCESS} affinity(0 )",
        f"\tqueue 1: tid {NO_PROCESS + 1} affinity(1 )",
    ]
    assert [thread["tid"] - NO_PROCESS for thread in several.to_dict()["queue_threads"]] == [0, 2, 1, 3]


def test_target_line_keeps_names_as_they_are(ours: DeviceStatus) -> None:
    assert ours.known
    known = replace(ours.known, target={"name": "loop", "backing_file": '/Bücher/"x"'})
    assert render.ublksrv_dump(replace(ours, known=known)).endswith(
        '\ttarget {"backing_file":"/Bücher/\\"x\\"","name":"loop"}'
    )


# -- tables --------------------------------------------------------------------------------


def test_table(ours: DeviceStatus, foreign: DeviceStatus) -> None:
    pid = str(os.getpid())
    width = max(len(pid), 3)
    assert render.devices([ours, foreign], {}).splitlines() == [
        f"ID  NODE          TARGET   SIZE  STATE  QUEUES  MODE  {'PID'.ljust(width)}  BACKING",
        f"0   /dev/ublkb0   loop     250G  LIVE   1x128   copy  {pid.ljust(width)}  /1.img",
        f"12  /dev/ublkb12  foreign  1.5M  LIVE   4x128   -     {'-'.ljust(width)}  -"
        "  (no daemon; run: ublk del -n 12)",
    ]


def test_columns_are_aligned_and_nothing_is_cut(ours: DeviceStatus, foreign: DeviceStatus) -> None:
    assert ours.known
    long_name = "/very/long/" + "x" * 300
    lines = render.devices([replace(ours, known=replace(ours.known, backing=long_name)), foreign], {}).splitlines()
    assert long_name in lines[1]
    places = [lines[0].index(head) for head in COLUMNS[1:]]
    for line in lines:
        assert line == line.rstrip()
        for place in places:
            assert line[place - 2 : place] == "  "
            assert line[place] != " "


def test_table_of_nothing_is_its_head() -> None:
    assert render.devices([], {}).split() == COLUMNS


@pytest.mark.parametrize("state", [State.QUIESCED, State.FAIL_IO, State.LIVE])
def test_dead_daemon_of_ours_can_be_recovered(ours: DeviceStatus, state: State) -> None:
    assert ours.known
    dead = DeviceStatus(
        replace(ours.info, state=state, flags=Feature.USER_RECOVERY),
        ours.char_devno,
        ours.disk,
        replace(ours.known, pid=NO_PROCESS),
    )
    assert dead.advice == "ublk recover -n 0"
    assert render.devices([dead], {}).endswith("/1.img  (no daemon; run: ublk recover -n 0)")


def test_trouble_with_a_daemon_that_runs(ours: DeviceStatus, foreign: DeviceStatus) -> None:
    assert render.devices([ours, foreign], {0: "does not answer"}).splitlines()[1].endswith("/1.img  (does not answer)")


# -- JSON ----------------------------------------------------------------------------------


def test_json_of_devices(ours: DeviceStatus, foreign: DeviceStatus) -> None:
    shown = json.loads(render.devices_json([ours, foreign], {0: "stuck"}))
    assert shown == {
        "version": 1,
        "devices": [ours.to_dict() | {"trouble": "stuck"}, foreign.to_dict() | {"trouble": None}],
    }
    assert json.loads(render.devices_json([], {})) == {"version": 1, "devices": []}


def test_json_of_our_device(ours: DeviceStatus) -> None:
    assert ours.to_dict() == {
        "id": 0,
        "name": None,
        "node": "/dev/ublkb0",
        "char_node": "/dev/ublkc0",
        "server": "ublkpy",
        "target": {"type": "loop", "file": "/1.img"},
        "backing": "/1.img",
        "state": "LIVE",
        "advice": None,
        "size": 268435456000,
        "logical_block_size": 512,
        "physical_block_size": 4096,
        "attrs": ["VOLATILE_CACHE", "FUA"],
        "queues": 1,
        "queue_depth": 128,
        "max_io_buf_bytes": 524288,
        "io_desc_size": 24,
        "mode": "copy",
        "flags": ["URING_CMD_COMP_IN_TASK", "CMD_IOCTL_ENCODE"],
        "pid": os.getpid(),
        "release": __version__,
        "queue_threads": [{"q_id": 0, "tid": NO_PROCESS, "affinity": [3]}],
        "owner": {"uid": 0, "gid": 0},
    }


def test_json_of_a_foreign_device(foreign: DeviceStatus) -> None:
    shown = foreign.to_dict()
    assert (shown["server"], shown["advice"]) == ("foreign", "ublk del -n 12")
    assert [key for key, value in shown.items() if value is None] == [
        "name",
        "target",
        "backing",
        "mode",
        "pid",
        "release",
    ]
    assert shown["queue_threads"] == []


def test_json_starts_with_its_version_and_keeps_letters() -> None:
    shown = render.to_json({"a": "ü"})
    assert shown.splitlines()[1].strip() == '"version": 1,'
    assert '"ü"' in shown


def test_json_of_features() -> None:
    shown = json.loads(render.features_json(Feature.USER_COPY | Feature.ZONED | Feature(1 << 50)))
    assert shown["version"] == 1
    assert shown["features"] == (1 << 7) | (1 << 8) | (1 << 50)
    assert set(shown["flags"]) == {flag.name for flag in Feature}
    assert [name for name, flag in shown["flags"].items() if flag["supported"]] == ["USER_COPY", "ZONED"]
    assert all(flag["gives"] for flag in shown["flags"].values())


def test_features_for_people() -> None:
    lines = render.features(Feature.USER_COPY | Feature(1 << 50), every=True).splitlines()
    assert lines[0] == "ublk_drv features: 0x4000000000080"
    assert len(lines) == 1 + len(Feature)
    assert [line.split()[0] for line in lines[1:] if line.split()[1] == "yes"] == ["USER_COPY"]


def test_features_for_scripts_are_those_that_there_are() -> None:
    lines = render.features(Feature.USER_COPY | Feature.AUTO_BUF_REG, every=False).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["USER_COPY", "AUTO_BUF_REG"]


# -- JSON as documented --------------------------------------------------------------------


def documented(section: str) -> set[str]:
    """The keys in the table of a section of docs/json.md."""
    text = (DOCS / "json.md").read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    return {line.split("`")[1] for line in text.splitlines() if line.startswith("| `")}


def keys(data: dict[str, Any], prefix: str = "") -> set[str]:
    """The keys of an object as the documentation writes them."""
    found = set()
    for key, value in data.items():
        found.add(prefix + key)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            found |= keys(value[0], f"{prefix}{key}[].")
        elif isinstance(value, dict) and key != "target":
            found |= keys(value, f"{prefix}{key}.")
    return found


def test_every_key_of_a_device_is_documented_and_no_other(ours: DeviceStatus) -> None:
    assert documented("A device") == keys(render.device_dict(ours, {}))


def test_every_key_of_features_is_documented_and_no_other() -> None:
    shown = json.loads(render.features_json(Feature(0)))
    del shown["version"]
    shown["flags"] = {"NAME": shown["flags"]["ZONED"]}
    assert documented("Features") == keys(shown) - {"flags.NAME"}


# -- parameters ----------------------------------------------------------------------------


def test_parameters_as_a_table() -> None:
    struct = Params(1 << 30, 65536, Attr.VOLATILE_CACHE | Attr.FUA, io_opt=1 << 20, discard_granularity=4096).to_c()
    shown = [line.split(maxsplit=2) for line in render.params(param_groups(struct)).splitlines()]
    assert shown == [
        ["PARAMETER", "VALUE", "MEANING"],
        ["basic.attrs", "12", "VOLATILE_CACHE FUA"],
        ["basic.logical_bs_shift", "9", "512B"],
        ["basic.physical_bs_shift", "9", "512B"],
        ["basic.io_opt_shift", "20", "1M"],
        ["basic.io_min_shift", "9", "512B"],
        ["basic.max_sectors", "128", "64K"],
        ["basic.chunk_sectors", "0", "0B"],
        ["basic.dev_sectors", "2097152", "1G"],
        ["basic.virt_boundary_mask", "0"],
        ["discard.discard_alignment", "0", "0B"],
        ["discard.discard_granularity", "4096", "4K"],
        ["discard.max_discard_sectors", "0", "0B"],
        ["discard.max_write_zeroes_sectors", "0", "0B"],
        ["discard.max_discard_segments", "1"],
    ]


@pytest.mark.parametrize(("csum", "meaning"), [(0, "none"), (2, "t10dif"), (4, "nvme"), (99, "")])
def test_checksum_that_a_parameter_stands_for(csum: int, meaning: str) -> None:
    lines = render.params({"integrity": {"csum_type": csum, "interval_exp": 12}}).splitlines()
    assert [line.split()[1:] for line in lines[1:]] == [[str(csum), *meaning.split()], ["12", "4K"]]


def test_parameters_are_documented() -> None:
    struct = ffi.new("struct ublk_params *")
    struct.types = 0xFFFF
    groups = param_groups(struct)
    assert documented("Parameters") == {f"{group}.{name}" for group, members in groups.items() for name in members}
