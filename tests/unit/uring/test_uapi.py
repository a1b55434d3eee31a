"""The driver's ABI: numbers, sizes and offsets, and the way of values into structs and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ublkpy.uring.ffi import ffi, lib
from ublkpy.uring.integrity import Csum, Integrity
from ublkpy.uring.uapi import MAX_QUEUE_DEPTH, SECTOR, Attr, DevInfo, Feature, Op, Params, State, param_groups

# Bit numbers of UBLK_F_* in include/uapi/linux/ublk_cmd.h.
BITS = {
    "SUPPORT_ZERO_COPY": 0,
    "URING_CMD_COMP_IN_TASK": 1,
    "NEED_GET_DATA": 2,
    "USER_RECOVERY": 3,
    "USER_RECOVERY_REISSUE": 4,
    "UNPRIVILEGED_DEV": 5,
    "CMD_IOCTL_ENCODE": 6,
    "USER_COPY": 7,
    "ZONED": 8,
    "USER_RECOVERY_FAIL_IO": 9,
    "UPDATE_SIZE": 10,
    "AUTO_BUF_REG": 11,
    "QUIESCE": 12,
    "PER_IO_DAEMON": 13,
    "BUF_REG_OFF_DAEMON": 14,
    "BATCH_IO": 15,
    "INTEGRITY": 16,
    "SAFE_STOP_DEV": 17,
    "NO_AUTO_PART_SCAN": 18,
    "SHMEM_ZC": 19,
    "IO_DESC_SIZE": 20,
}

U16 = st.integers(0, 2**16 - 1)
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)


# -- numbers -------------------------------------------------------------------------------


def test_feature_bits() -> None:
    assert {flag.name: int(flag) for flag in Feature} == {name: 1 << bit for name, bit in BITS.items()}


def test_states() -> None:
    assert [(state.name, int(state)) for state in State] == [("DEAD", 0), ("LIVE", 1), ("QUIESCED", 2), ("FAIL_IO", 3)]


def test_operations() -> None:
    assert {op.name: int(op) for op in Op} == {
        **{"READ": 0, "WRITE": 1, "FLUSH": 2, "DISCARD": 3, "WRITE_ZEROES": 5, "ZONE_OPEN": 10, "ZONE_CLOSE": 11},
        **{"ZONE_FINISH": 12, "ZONE_APPEND": 13, "ZONE_RESET_ALL": 14, "ZONE_RESET": 15, "REPORT_ZONES": 18},
    }


def test_attributes() -> None:
    assert {attr.name: int(attr) for attr in Attr} == {"READ_ONLY": 1, "ROTATIONAL": 2, "VOLATILE_CACHE": 4, "FUA": 8}


def test_limits() -> None:
    assert (MAX_QUEUE_DEPTH, SECTOR) == (4096, 512)


@pytest.mark.parametrize(
    ("command", "number", "reads_only"),
    [
        ("GET_QUEUE_AFFINITY", 0x01, True),
        ("GET_DEV_INFO", 0x02, True),
        ("ADD_DEV", 0x04, False),
        ("DEL_DEV", 0x05, False),
        ("START_DEV", 0x06, False),
        ("STOP_DEV", 0x07, False),
        ("SET_PARAMS", 0x08, False),
        ("GET_PARAMS", 0x09, True),
        ("START_USER_RECOVERY", 0x10, False),
        ("END_USER_RECOVERY", 0x11, False),
        ("GET_FEATURES", 0x13, True),
        ("DEL_DEV_ASYNC", 0x14, True),
    ],
)
def test_command_numbers(command: str, number: int, reads_only: bool) -> None:
    """_IOR('u', nr, struct ublksrv_ctrl_cmd) or _IOWR: direction, 32 bytes, type, number."""
    direction = 2 if reads_only else 3
    assert getattr(lib, f"UBLK_U_CMD_{command}") == direction << 30 | 32 << 16 | ord("u") << 8 | number


# -- structs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("struct", "size"),
    [
        ("ublksrv_ctrl_cmd", 32),
        ("ublksrv_ctrl_dev_info", 64),
        ("ublk_param_basic", 32),
        ("ublk_param_discard", 20),
        ("ublk_param_devt", 16),
        ("ublk_param_zoned", 32),
        ("ublk_param_dma_align", 8),
        ("ublk_param_segment", 16),
        ("ublk_param_integrity", 16),
        ("ublk_params", 152),
    ],
)
def test_sizes(struct: str, size: int) -> None:
    assert ffi.sizeof(f"struct {struct}") == size


@pytest.mark.parametrize(
    ("struct", "field", "offset"),
    [
        ("ublksrv_ctrl_cmd", "queue_id", 4),
        ("ublksrv_ctrl_cmd", "len", 6),
        ("ublksrv_ctrl_cmd", "addr", 8),
        ("ublksrv_ctrl_cmd", "data", 16),
        ("ublksrv_ctrl_dev_info", "queue_depth", 2),
        ("ublksrv_ctrl_dev_info", "state", 4),
        ("ublksrv_ctrl_dev_info", "io_desc_size", 6),
        ("ublksrv_ctrl_dev_info", "max_io_buf_bytes", 8),
        ("ublksrv_ctrl_dev_info", "dev_id", 12),
        ("ublksrv_ctrl_dev_info", "ublksrv_pid", 16),
        ("ublksrv_ctrl_dev_info", "flags", 24),
        ("ublksrv_ctrl_dev_info", "ublksrv_flags", 32),
        ("ublksrv_ctrl_dev_info", "owner_uid", 40),
        ("ublksrv_ctrl_dev_info", "owner_gid", 44),
        ("ublk_param_basic", "logical_bs_shift", 4),
        ("ublk_param_basic", "physical_bs_shift", 5),
        ("ublk_param_basic", "io_opt_shift", 6),
        ("ublk_param_basic", "io_min_shift", 7),
        ("ublk_param_basic", "max_sectors", 8),
        ("ublk_param_basic", "chunk_sectors", 12),
        ("ublk_param_basic", "dev_sectors", 16),
        ("ublk_param_basic", "virt_boundary_mask", 24),
        ("ublk_param_discard", "discard_alignment", 0),
        ("ublk_param_discard", "discard_granularity", 4),
        ("ublk_param_discard", "max_discard_sectors", 8),
        ("ublk_param_discard", "max_write_zeroes_sectors", 12),
        ("ublk_param_discard", "max_discard_segments", 16),
        ("ublk_params", "types", 4),
        ("ublk_params", "basic", 8),
        ("ublk_params", "discard", 40),
        ("ublk_params", "devt", 60),
        ("ublk_params", "zoned", 76),
        ("ublk_params", "dma", 108),
        ("ublk_params", "seg", 120),
        ("ublk_param_zoned", "max_active_zones", 4),
        ("ublk_param_zoned", "max_zone_append_sectors", 8),
        ("ublk_param_segment", "max_segment_size", 8),
        ("ublk_param_segment", "max_segments", 12),
        ("ublk_param_integrity", "max_integrity_segments", 4),
        ("ublk_param_integrity", "interval_exp", 6),
        ("ublk_param_integrity", "metadata_size", 7),
        ("ublk_param_integrity", "pi_offset", 8),
        ("ublk_param_integrity", "csum_type", 9),
        ("ublk_param_integrity", "tag_size", 10),
        ("ublk_params", "integrity", 136),
    ],
)
def test_offsets(struct: str, field: str, offset: int) -> None:
    assert ffi.offsetof(f"struct {struct}", field) == offset


# -- values --------------------------------------------------------------------------------

INFOS = st.builds(
    DevInfo,
    dev_id=U32,
    nr_hw_queues=U16,
    queue_depth=U16,
    max_io_buf_bytes=U32,
    flags=U64.map(Feature),
    ublksrv_flags=U64,
)


@given(INFOS)
def test_dev_info_round_trip(info: DevInfo) -> None:
    struct = info.to_c()
    assert struct.ublksrv_pid == struct.state == struct.owner_uid == struct.owner_gid == 0, "for the driver to fill"
    struct.ublksrv_pid = -1
    assert DevInfo.from_c(struct) == info


def test_dev_info_from_the_driver() -> None:
    struct = ffi.new("struct ublksrv_ctrl_dev_info *")
    struct.state, struct.ublksrv_pid, struct.owner_uid, struct.owner_gid = 2, 4711, 1000, 1001
    info = DevInfo.from_c(struct)
    assert (info.state, info.ublksrv_pid, info.owner_uid, info.owner_gid) == (State.QUIESCED, 4711, 1000, 1001)


@pytest.mark.parametrize(("flag", "size"), [(Feature.IO_DESC_SIZE, 64), (Feature(0), 24)])
def test_size_of_descriptors_counts_only_with_its_flag(flag: Feature, size: int) -> None:
    struct = DevInfo(0, 1, 1, 4096, flag, io_desc_size=64).to_c()
    assert struct.io_desc_size == (64 if flag else 0)
    struct.io_desc_size = 64  # an old driver's echo
    assert DevInfo.from_c(struct).io_desc_size == size


POWERS = st.integers(9, 28).map(lambda shift: 1 << shift)
PARAMS = st.builds(
    Params,
    size=st.integers(0, 2**55 - 1).map(lambda sectors: sectors * 512),
    max_io_bytes=st.integers(8, 65536).map(lambda sectors: sectors * 512),
    attrs=st.integers(0, 15).map(Attr),
    logical_block=st.sampled_from([512, 1024, 2048, 4096]),
    physical_block=POWERS,
    io_min=POWERS,
    io_opt=POWERS,
    discard_granularity=st.sampled_from([512, 4096, 1 << 20]),
    max_discard_sectors=U32,
    max_write_zeroes_sectors=U32,
)


@given(PARAMS)
def test_params_round_trip(params: Params) -> None:
    assert Params.from_c(params.to_c()) == params


@given(PARAMS)
def test_params_in_the_kernels_terms(params: Params) -> None:
    struct = params.to_c()
    assert struct.len == 152
    assert struct.types == lib.UBLK_PARAM_TYPE_BASIC | lib.UBLK_PARAM_TYPE_DISCARD == 3
    assert struct.basic.dev_sectors * 512 == params.size
    assert 1 << struct.basic.logical_bs_shift == params.logical_block
    assert struct.discard.max_discard_segments == 1


def test_params_without_discard_do_not_mention_it() -> None:
    struct = Params(1 << 20, 65536, Attr(0), max_discard_sectors=8).to_c()
    assert struct.types == lib.UBLK_PARAM_TYPE_BASIC
    assert bytes(ffi.buffer(ffi.addressof(struct, "discard"))) == bytes(20)


def test_discard_of_the_driver_counts_only_if_it_says_so() -> None:
    struct = Params(1 << 20, 65536, Attr(0)).to_c()
    struct.discard.discard_granularity = 4096
    assert Params.from_c(struct).discard_granularity == 0


U8 = st.integers(0, 255)
INTEGRITY = st.builds(
    Integrity,
    interval=st.sampled_from([512, 1024, 2048, 4096]),
    metadata_size=U8,
    pi_offset=U8,
    csum_type=st.sampled_from(Csum),
    tag_size=U8,
    capable=st.booleans(),
    reftag=st.booleans(),
)


@given(INTEGRITY)
def test_integrity_round_trip(integrity: Integrity) -> None:
    params = Params(1 << 20, 65536, Attr(0), integrity=integrity)
    struct = params.to_c()
    assert struct.types == lib.UBLK_PARAM_TYPE_BASIC | 0x40
    assert struct.integrity.flags == integrity.capable | integrity.reftag << 1
    assert Params.from_c(struct) == params


def test_params_use_the_largest_device() -> None:
    assert Params(2**64 - 512, 65536, Attr(0)).to_c().basic.dev_sectors == 2**55 - 1


GROUPS = ["basic", "discard", "devt", "zoned", "dma", "seg", "integrity"]


def test_groups_that_count_are_those_whose_bit_is_set() -> None:
    struct = ffi.new("struct ublk_params *")
    assert param_groups(struct) == {}
    for bit, group in enumerate(GROUPS):
        struct.types = 1 << bit
        assert list(param_groups(struct)) == [group]
    struct.types = 0xFFFF
    assert list(param_groups(struct)) == GROUPS


def test_groups_have_the_kernels_names_and_units() -> None:
    groups = param_groups(Params(1 << 20, 65536, Attr(9), logical_block=4096, dma_alignment=512).to_c())
    assert groups == {
        "basic": {
            "attrs": 9,
            "logical_bs_shift": 12,
            "physical_bs_shift": 9,
            "io_opt_shift": 9,
            "io_min_shift": 9,
            "max_sectors": 128,
            "chunk_sectors": 0,
            "dev_sectors": 2048,
            "virt_boundary_mask": 0,
        },
        "dma": {"alignment": 511},
    }
