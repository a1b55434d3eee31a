"""The plan of a device in the driver's terms."""

from __future__ import annotations

from pathlib import Path

import pytest

from ublkpy.config import Draft, build
from ublkpy.daemon import cdev
from ublkpy.daemon.plan import _RECOVERY_FLAGS, Plan
from ublkpy.errors import UblkError
from ublkpy.tgt.base import Geometry
from ublkpy.uring.mode import MODES
from ublkpy.uring.uapi import Attr, Feature

CONFIG = build(Draft(target_type="null"))

COPY = MODES["copy"]
ALL = ~Feature(0)


def plan(**geometry: object) -> Plan:
    return Plan(CONFIG, Geometry(1 << 30, **geometry), cookie=1)  # type: ignore[arg-type]


def test_params_of_a_writable_device() -> None:
    params = plan(discard_granularity=4096, max_discard_bytes=1 << 20, max_write_zeroes_bytes=1 << 21).params(
        65536, MODES["copy"]
    )
    assert (params.size, params.max_io_bytes) == (1 << 30, 65536)
    assert params.attrs == Attr.VOLATILE_CACHE | Attr.FUA
    assert (params.discard_granularity, params.max_discard_sectors, params.max_write_zeroes_sectors) == (
        4096,
        2048,
        4096,
    )


def test_params_without_discard_have_no_limits_of_it() -> None:
    params = plan(max_discard_bytes=1 << 20, max_write_zeroes_bytes=1 << 20).params(65536, COPY)
    assert (params.discard_granularity, params.max_discard_sectors, params.max_write_zeroes_sectors) == (0, 0, 0)


@pytest.mark.parametrize(
    ("geometry", "attrs"),
    [
        ({"write_cache": False}, Attr(0)),
        ({"write_cache": False, "read_only": True}, Attr.READ_ONLY),
        ({"write_cache": False, "rotational": True}, Attr.ROTATIONAL),
        ({"rotational": True}, Attr.ROTATIONAL | Attr.VOLATILE_CACHE | Attr.FUA),
    ],
)
def test_attributes(geometry: dict[str, bool], attrs: Attr) -> None:
    assert plan(**geometry).params(65536, COPY).attrs == attrs


def test_params_survive_the_way_into_the_driver_and_back() -> None:
    params = Plan(CONFIG, CONFIG.target.open(), 1).params(524288, COPY)
    assert type(params).from_c(params.to_c()) == params


@pytest.mark.parametrize(("max_sectors", "size"), [(None, 65536), (128, 65536), (8, 4096), (1024, 65536)])
def test_largest_request(max_sectors: int | None, size: int) -> None:
    config = build(Draft({"max_sectors": max_sectors}, "null"))
    assert Plan(config, Geometry(1 << 30), 1).params(65536, COPY).max_io_bytes == size


@pytest.mark.parametrize(("part_scan", "flag"), [(None, 0), (True, 0), (False, Feature.NO_AUTO_PART_SCAN)])
def test_partitions(part_scan: bool | None, flag: Feature) -> None:
    config = build(Draft({"part_scan": part_scan}, "null"))
    _, needed = Plan(config, Geometry(1 << 30), 1).demand(ALL)
    assert needed.get("--no-part-scan", Feature(0)) == flag


def test_recovery_flags_are_ublksrvs() -> None:
    assert {name: int(flags) for name, flags in _RECOVERY_FLAGS.items()} == {
        "none": 0,
        "queue": 1 << 3,
        "reissue": 1 << 3 | 1 << 4,
        "fail": 1 << 3 | 1 << 9,
    }


def test_recovery_that_the_kernel_lacks_is_named() -> None:
    config = build(Draft({"recovery": "fail"}, "null"))
    with pytest.raises(UblkError, match="lacks UBLK_F_USER_RECOVERY_FAIL_IO, which recovery 'fail' needs") as caught:
        Plan(config, Geometry(1 << 30), 1).demand(ALL & ~Feature.USER_RECOVERY_FAIL_IO)
    assert caught.value.hint


def test_character_device_that_does_not_appear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cdev, "DEADLINE", 0.05)
    with pytest.raises(UblkError, match="cannot open /dev/ublkc1048575: No such file") as caught:
        cdev.open_cdev(1048575, print)
    assert "udev" in caught.value.hint
    assert not Path("/dev/ublkc1048575").exists()
