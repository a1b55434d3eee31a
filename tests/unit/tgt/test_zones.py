"""What a zoned disk has to be, before a driver sees it."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from tests.device.zoned import ZonedRam
from ublkpy import Geometry, Zone, ZoneCond, Zones, ZoneType
from ublkpy.config import DeviceConfig, DeviceOptions
from ublkpy.daemon.plan import Plan
from ublkpy.errors import UblkError
from ublkpy.tgt import handlers
from ublkpy.uring import zones
from ublkpy.uring.uapi import Feature, Params

ALL = ~Feature(0)
MIB = 1 << 20
DISK = Geometry(256 * MIB, logical_block=4096, zones=Zones(4 * MIB))


def plan(**options: object) -> Plan:
    return Plan(DeviceConfig(DeviceOptions(options), ZonedRam()), DISK, cookie=1)


def test_it_needs_all_methods() -> None:
    class Half(ZonedRam):
        def methods(self) -> frozenset[str]:
            return super().methods() - {"zone_open", "zone_append"}

    with pytest.raises(UblkError, match="target half has zones, but no zone_append, zone_open"):
        handlers.fit(Half(), DISK)


@pytest.mark.parametrize(
    ("size", "zone_size", "said"),
    [
        (256 * MIB, 3 * MIB, "has zones of 3145728 bytes"),
        (256 * MIB, 0, "has zones of 0 bytes"),
        (256 * MIB, 512, "has zones of 512 bytes"),
        (6 * MIB, 4 * MIB, "has 6291456 bytes, and zones of 4194304"),
        (0, 4 * MIB, "of size 0"),
    ],
)
def test_zones_that_do_not_fit(size: int, zone_size: int, said: str) -> None:
    with pytest.raises(UblkError, match=said):
        handlers.fit(ZonedRam(), replace(DISK, size=size, zones=Zones(zone_size)))


def test_the_mode_is_the_one_that_the_driver_has_for_them() -> None:
    mode, needed = plan().demand(ALL)
    assert mode.name == "user-copy"
    assert needed["a zoned disk"] == Feature.ZONED


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "copy"}, "a zoned disk cannot be served in mode copy"),
        ({"mode": "batch+user-copy"}, "a zoned disk cannot be served in mode batch"),
        ({"unprivileged": True}, "an unprivileged device cannot be zoned"),
    ],
)
def test_options_that_zones_exclude(options: dict[str, object], said: str) -> None:
    with pytest.raises(UblkError, match=said):
        plan(**options).demand(ALL)


def test_a_driver_without_zones() -> None:
    with pytest.raises(UblkError, match="lacks UBLK_F_ZONED, which a zoned disk needs"):
        plan().demand(ALL & ~Feature.ZONED)


@pytest.mark.parametrize(
    ("max_append", "found"), [(0, 524288), (65536, 65536), (8 * MIB, 524288)], ids=["any", "said", "too much"]
)
def test_params(max_append: int, found: int) -> None:
    geometry = replace(DISK, zones=Zones(4 * MIB, max_open=7, max_active=9, max_append=max_append))
    mode, _ = plan().demand(ALL)
    params = replace(plan(), geometry=geometry).params(524288, mode)
    assert params.zones == Zones(4 * MIB, 7, 9, found)
    assert Params.from_c(params.to_c()) == params


def test_a_report() -> None:
    """As ``struct blk_zone`` has it; what there is no room for is left out."""
    place = bytearray(2 * zones.ZONE_BYTES)
    found = [
        Zone(0, 4 * MIB, 0, 4 * MIB, ZoneCond.NOT_WP, ZoneType.CONVENTIONAL),
        Zone(4 * MIB, 4 * MIB, 5 * MIB, 3 * MIB, ZoneCond.IMP_OPEN),
        Zone(8 * MIB, 4 * MIB, 8 * MIB, 3 * MIB),
    ]
    zones.report(found, memoryview(place))
    assert struct.unpack("=QQQBBBB4xQ24x", place[:64]) == (0, 8192, 0, 1, 0, 0, 0, 8192)
    assert struct.unpack("=QQQBBBB4xQ24x", place[64:]) == (8192, 8192, 10240, 2, 2, 0, 0, 6144)
