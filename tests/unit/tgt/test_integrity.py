"""The options of metadata, and the file that keeps it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ublkpy.errors import BusyError, ConfigError, UblkError
from ublkpy.tgt import backing, handlers
from ublkpy.tgt.disk import DiskOptions
from ublkpy.tgt.loop import LoopTarget
from ublkpy.tgt.null import NullTarget
from ublkpy.uring.integrity import Csum, Integrity, Metadata
from ublkpy.uring.map import Sync
from ublkpy.uring.routing import flush_to_c

MIB = 1 << 20
NEEDED = MIB // 512 * 8


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * MIB)
    return path


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    path = tmp_path / "disk.metadata"
    path.write_bytes(b"\xff" * NEEDED)
    return path


def loop(file: Path, metadata: Path | None, **options: Any) -> LoopTarget:
    said = {name: options.pop(name) for name in DiskOptions.options if name in options}
    values = {"file": file, "metadata_size": 8, "csum_type": "t10dif", "direct": False} | options
    target = LoopTarget(values | ({"metadata": metadata} if metadata else {}))
    target.disk = DiskOptions(said)
    return target


def refused(target: LoopTarget | NullTarget) -> UblkError:
    with pytest.raises(UblkError) as caught:
        target.open()
    return caught.value


# -- the options ---------------------------------------------------------------------------


def test_without_options_there_is_none() -> None:
    assert NullTarget().open().integrity is None
    assert NullTarget({"integrity_reftag": False, "pi_offset": 0}).open().integrity is None
    assert not any(name in NullTarget().dump() for name in ("metadata_size", "csum_type", "integrity_reftag"))


def test_all_options() -> None:
    target = NullTarget(
        {
            "metadata_size": 64,
            "csum_type": "nvme",
            "pi_offset": 48,
            "tag_size": 2,
            "integrity_capable": True,
            "integrity_reftag": True,
        }
    )
    assert target.open().integrity == Integrity(512, 64, 48, Csum.nvme, 2, capable=True, reftag=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"csum_type": "ip"}, "csum_type: there is nothing without metadata"),
        ({"pi_offset": 1, "tag_size": 2}, "pi_offset, tag_size: there is nothing without metadata"),
        ({"integrity_capable": True}, "integrity_capable: there is nothing without metadata"),
        ({"metadata_size": 8, "integrity_reftag": True}, "integrity_reftag: tags come with a checksum only"),
        (
            {"metadata_size": 7, "csum_type": "ip"},
            "the 8 bytes of checksum and tags at pi_offset 0 do not fit into metadata_size 7",
        ),
        (
            {"metadata_size": 16, "csum_type": "t10dif", "pi_offset": 9},
            "the 8 bytes of checksum and tags at pi_offset 9 do not fit into metadata_size 16",
        ),
        (
            {"metadata_size": 15, "csum_type": "nvme"},
            "the 16 bytes of checksum and tags at pi_offset 0 do not fit into metadata_size 15",
        ),
        (
            {"metadata_size": 8, "pi_offset": 9},
            "the 0 bytes of checksum and tags at pi_offset 9 do not fit into metadata_size 8",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_options_that_break_a_rule(options: dict[str, Any], message: str) -> None:
    error = refused(NullTarget(options))
    assert isinstance(error, ConfigError)
    assert error.message == message
    assert error.hint


@pytest.mark.parametrize(
    ("name", "raw"),
    [("metadata_size", 0), ("metadata_size", 256), ("pi_offset", 256), ("tag_size", 256), ("csum_type", "crc32")],
)
def test_values_that_the_driver_has_no_bits_for(name: str, raw: object) -> None:
    with pytest.raises(ValueError, match=r"is out of range|is not one of: ip, t10dif, nvme"):
        NullTarget.options[name].parse(raw)


def test_own_options_come_before_those_of_the_base() -> None:
    assert list(LoopTarget.options)[:2] == ["file", "offset"]
    assert list(LoopTarget.options)[-1] == "integrity_reftag"


# -- the file ------------------------------------------------------------------------------


def test_map_names_both_files(disk: Path, metadata: Path) -> None:
    target = loop(disk, metadata, tag_size=2)
    geometry = target.open()
    assert geometry.integrity == Integrity(512, 8, 0, Csum.t10dif, 2)
    assert geometry.discard_granularity == 0
    made = handlers.make_map(target, geometry.size)
    assert made.metadata == Metadata(geometry.integrity, 1)
    assert flush_to_c(Sync((0, 1)), made.stats()).nr == 2
    assert target.status()["metadata_file"] == str(metadata)
    made.close()
    target.close()


def test_null_has_no_file() -> None:
    target = NullTarget({"metadata_size": 8})
    made = handlers.make_map(target, target.open().size)
    assert made.metadata == Metadata(Integrity(512, 8))
    made.close()


def test_file_and_size_belong_together(disk: Path, metadata: Path) -> None:
    error = refused(loop(disk, None))
    assert (type(error), error.message) == (ConfigError, "metadata_size: no file to keep the metadata in")
    error = refused(LoopTarget({"file": disk, "metadata": metadata}))
    assert (type(error), error.message) == (ConfigError, f"metadata {metadata}: no size of the metadata given")


def test_file_that_is_not_there_is_made_as_the_hint_says(disk: Path, tmp_path: Path) -> None:
    path = tmp_path / "new"
    error = refused(loop(disk, path))
    assert error.message == f"metadata file {path} does not exist"
    assert os.system(error.hint.removeprefix("make one with: ")) == 0
    assert path.read_bytes() == b"\xff" * NEEDED
    target = loop(disk, path)
    assert target.open().size == MIB
    target.close()


def test_file_that_is_too_short(disk: Path, metadata: Path) -> None:
    os.truncate(metadata, NEEDED - 1)
    error = refused(loop(disk, metadata))
    assert error.message == (
        f"metadata file {metadata} is too short: {NEEDED - 1} of {NEEDED} bytes, 8 for each block of 512"
    )
    target = loop(disk, metadata, size=MIB - 512)
    assert target.open().size == MIB - 512
    target.close()


def test_file_of_zeroes(disk: Path, metadata: Path) -> None:
    metadata.write_bytes(b"")
    os.truncate(metadata, NEEDED)
    assert "has only holes, no checksums" in refused(loop(disk, metadata)).message
    target = loop(disk, metadata, csum_type=None)
    assert target.open().integrity == Integrity(512, 8)
    target.close()


def test_larger_blocks_have_less_metadata(disk: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"\xff" * (MIB // 4096 * 8))
    assert "is too short" in refused(loop(disk, small)).message
    target = loop(disk, small, logical_block_size=4096)
    found = target.open().integrity
    assert found
    assert found.interval == 4096
    target.close()


@pytest.mark.parametrize("read_only", [False, True])
def test_file_that_is_the_data(disk: Path, tmp_path: Path, read_only: bool) -> None:
    link = tmp_path / "link"
    link.symlink_to(disk)
    error = refused(loop(disk, link, read_only=read_only))
    assert (type(error), error.message) == (ConfigError, f"{link} cannot be the file and its own metadata")


def test_file_that_is_in_use(disk: Path, metadata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backing, "_RELEASE", 0.0)
    other = tmp_path / "other.img"
    other.write_bytes(bytes(MIB))
    target = loop(disk, metadata)
    target.open()
    assert isinstance(refused(loop(other, metadata)), BusyError)
    target.close()
    readers = [loop(disk, metadata, read_only=True) for _ in range(2)]
    for reader in readers:
        reader.open()
    for reader in readers:
        reader.close()


def test_refusals_leave_nothing_open(disk: Path, metadata: Path, open_fds: Callable[[], set[str]]) -> None:
    before = open_fds()
    refused(loop(disk, metadata, metadata_size=9))
    refused(loop(disk, metadata, pi_offset=1))
    assert open_fds() == before
    target = loop(disk, metadata)
    target.open()
    target.close()
    assert open_fds() == before
