"""Metadata with each block (UBLK_F_INTEGRITY), checked from end to end by the kernel."""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ublkpy.driver import inspect
from ublkpy.driver.ctrl import Control
from ublkpy.errors import BusyError, ConfigError, ExitCode, UblkError
from ublkpy.life.add import add
from ublkpy.life.recover import recover
from ublkpy.uring.mode import MODES
from ublkpy.uring.uapi import Feature

from . import disk, kernel, load, program
from .devices import MIB, Device, Devices, configure, held_open, until

SIZE = 4 * MIB
MIXED = ["--ioengine=libaio", "--iodepth=32", "--rw=randrw", "--bsrange=512-256k", "--size=4m"]


@dataclass(frozen=True)
class Kind:
    """A kind of metadata, and what the block layer calls it."""

    csum_type: str
    metadata_size: int
    format: str
    pi_offset: int = 0
    integrity_reftag: bool = True
    tag_size: int = 0

    @property
    def options(self) -> dict[str, Any]:
        names = ("csum_type", "metadata_size", "pi_offset", "integrity_reftag", "tag_size")
        return {"integrity_capable": True} | {name: getattr(self, name) for name in names}


KINDS = [
    Kind("ip", 8, "T10-DIF-TYPE1-IP"),
    Kind("t10dif", 8, "T10-DIF-TYPE1-CRC", tag_size=2),
    Kind("nvme", 16, "EXT-DIF-TYPE1-CRC64"),
    Kind("t10dif", 64, "T10-DIF-TYPE1-CRC", pi_offset=56),
    Kind("nvme", 40, "EXT-DIF-TYPE3-CRC64", pi_offset=8, integrity_reftag=False),
    Kind("ip", 255, "T10-DIF-TYPE3-IP", pi_offset=3, integrity_reftag=False),
]
T10DIF = KINDS[1]


def name(kind: Kind) -> str:
    return f"{kind.csum_type}-{kind.metadata_size}"


@pytest.fixture
def has_metadata() -> None:
    """Only where the driver hands it out."""
    if Feature.INTEGRITY not in inspect.features():
        pytest.skip("this driver has no metadata")


def fresh(path: Path, kind: Kind = T10DIF, size: int = SIZE, block: int = 512) -> Path:
    """A file for the metadata of blocks that were never written."""
    path.write_bytes(b"\xff" * (size // block * kind.metadata_size))
    return path


@dataclass(frozen=True)
class Disk:
    """A loop device with metadata, and its two files."""

    device: Device
    file: Path
    metadata: Path

    @property
    def node(self) -> Path:
        return self.device.node

    def profile(self) -> dict[str, str]:
        return {path.name: path.read_text().strip() for path in (self.device.sysfs / "integrity").iterdir()}

    def flip(self, path: Path, offset: int) -> None:
        """Change one bit of a file behind the device's back."""
        with held_open(path, os.O_RDWR) as fd:
            os.pwrite(fd, bytes([os.pread(fd, 1, offset)[0] ^ 1]), offset)


def make(devices: Devices, scratch: Path, kind: Kind = T10DIF, **options: Any) -> Disk:
    file = disk.image(scratch / "image", SIZE)
    metadata = fresh(scratch / "metadata", kind)
    return Disk(devices.loop(file, metadata=metadata, **kind.options | options), file, metadata)


def expect_damage(node: Path, offset: int, length: int = 4096) -> None:
    """A read of what does not fit its checksum fails."""
    with pytest.raises(OSError, match=os.strerror(errno.EILSEQ)) as caught:
        disk.read(node, offset, length)
    assert caught.value.errno == errno.EILSEQ


def t10dif(data: bytes) -> int:
    """CRC16 with the polynomial of T10 DIF."""
    crc = 0
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1 ^ 0x8BB7 if crc & 0x8000 else crc << 1) & 0xFFFF
    return crc


# -- from end to end ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["user-copy", "batch+user-copy"])
@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_damage_is_found(has_metadata: None, devices: Devices, scratch: Path, kind: Kind, mode: str) -> None:
    """Of the data, and of the checksum; and what is whole can be read."""
    made = make(devices, scratch, kind, mode=mode, queues=2)
    profile = made.profile()
    assert profile["format"] == kind.format
    assert profile["protection_interval_bytes"] == "512"
    assert (profile["read_verify"], profile["write_generate"]) == ("1", "1")
    assert (profile["device_is_integrity_capable"], profile["tag_size"]) == ("1", str(kind.tag_size))
    load.verify(made.node, *MIXED)
    data = disk.pattern(MIB)
    disk.write(made.node, MIB, data)
    assert disk.read(made.node, MIB, MIB) == data
    block = (MIB + 64 * 512) // 512
    for path, offset in (
        (made.file, block * 512 + 5),
        (made.metadata, block * kind.metadata_size + kind.pi_offset),
    ):
        made.flip(path, offset)
        expect_damage(made.node, block * 512)
        assert disk.read(made.node, MIB, 64 * 512) == data[: 64 * 512]
        assert disk.read(made.node, (block + 1) * 512, 4096) == data[65 * 512 : 65 * 512 + 4096]
        made.flip(path, offset)
        assert disk.read(made.node, MIB, MIB) == data


def test_a_block_in_a_wrong_place_is_found(has_metadata: None, devices: Devices, scratch: Path) -> None:
    """Two blocks change places, together with their checksums."""
    made = make(devices, scratch)
    disk.write(made.node, 0, disk.pattern(8192))
    for path, length in ((made.file, 512), (made.metadata, 8)):
        with held_open(path, os.O_RDWR) as fd:
            first, second = os.pread(fd, length, 3 * length), os.pread(fd, length, 9 * length)
            os.pwrite(fd, second, 3 * length)
            os.pwrite(fd, first, 9 * length)
    expect_damage(made.node, 3 * 512, 512)
    expect_damage(made.node, 9 * 512, 512)
    assert disk.read(made.node, 4 * 512, 5 * 512) == disk.pattern(8192)[4 * 512 : 9 * 512]


def test_each_block_has_its_own_place_in_the_file(has_metadata: None, devices: Devices, scratch: Path) -> None:
    """The checksum is of the data and of the metadata before it."""
    kind = KINDS[3]
    made = make(devices, scratch, kind)
    data = disk.pattern(8192)
    disk.write(made.node, 100 * 512, data)
    found = made.metadata.read_bytes()
    for nr in range(16):
        begin = (100 + nr) * kind.metadata_size
        at = begin + kind.pi_offset
        guard = t10dif(data[nr * 512 : (nr + 1) * 512] + found[begin:at])
        assert found[at : at + 8] == guard.to_bytes(2) + bytes(2) + (100 + nr).to_bytes(4)
    assert set(found[: 100 * 64]) == set(found[116 * 64 :]) == {0xFF}


def test_blocks_that_were_never_written(has_metadata: None, devices: Devices, scratch: Path) -> None:
    made = make(devices, scratch)
    assert disk.read(made.node, 0, SIZE) == bytes(SIZE)


def test_metadata_without_a_checksum(has_metadata: None, devices: Devices, scratch: Path) -> None:
    """Nobody looks at it; a file of zeroes is good enough."""
    file, metadata = disk.image(scratch / "image", SIZE), disk.image(scratch / "metadata", SIZE // 512 * 8)
    device = devices.loop(file, metadata=metadata, metadata_size=8, pi_offset=5, integrity_capable=True)
    assert Disk(device, file, metadata).profile()["format"] == "nop"
    load.verify(device.node, *MIXED)


def test_requests_that_follow_each_other(has_metadata: None, devices: Devices, scratch: Path) -> None:
    """The block layer merges them, and their metadata."""
    made = make(devices, scratch)
    batch = ["--ioengine=libaio", "--iodepth=32", "--iodepth_batch=16", "--iodepth_batch_complete=16"]
    load.verify(made.node, *batch, "--rw=write", "--bs=4k", "--size=4m")
    assert int((made.device.sysfs / "stat").read_text().split()[5]) > 0, "no write was merged"
    # Not reads among the writes: fio would read blocks that it is writing, whose data and metadata change in turn.
    load.verify(made.node, *batch, "--rw=write", "--bs=512", "--size=2m")


def test_the_largest_requests(has_metadata: None, devices: Devices, scratch: Path) -> None:
    made = make(devices, scratch, KINDS[5], max_io_buf_bytes=4 * MIB)
    (made.device.sysfs / "queue/max_sectors_kb").write_text(made.device.queue("max_hw_sectors_kb"))
    disk.write(made.node, 0, disk.pattern(SIZE))
    assert disk.read(made.node, 0, SIZE) == disk.pattern(SIZE)


def test_blocks_of_4096(has_metadata: None, devices: Devices, scratch: Path) -> None:
    """As many bytes of metadata as for 512, but for each 4096 of data."""
    image, metadata = disk.image(scratch / "image", SIZE), fresh(scratch / "metadata", block=4096)
    with kernel.kernel_loop(image, "--sector-size=4096") as node:
        device = devices.loop(node, metadata=metadata, **T10DIF.options)
        made = Disk(device, image, metadata)
        assert made.profile()["protection_interval_bytes"] == "4096"
        disk.write(node := made.node, 0, disk.pattern(SIZE))
        assert disk.read(node, 0, SIZE) == disk.pattern(SIZE)
        made.flip(metadata, 8 * 7)
        expect_damage(node, 4096 * 7)
        assert disk.read(node, 4096 * 8, MIB) == disk.pattern(SIZE)[4096 * 8 : 4096 * 8 + MIB]
        devices.remove(device)


def test_a_part_of_the_file(has_metadata: None, devices: Devices, scratch: Path) -> None:
    """The metadata counts from the first block of the device."""
    file, metadata = disk.image(scratch / "image", SIZE), fresh(scratch / "metadata", size=MIB)
    device = devices.loop(file, metadata=metadata, offset=MIB, size=MIB, **T10DIF.options)
    disk.write(device.node, 0, disk.pattern(MIB))
    assert file.read_bytes()[MIB : 2 * MIB] == disk.pattern(MIB)
    assert disk.read(device.node, 0, MIB) == disk.pattern(MIB)
    assert metadata.read_bytes()[:2] == t10dif(disk.pattern(MIB)[:512]).to_bytes(2)


def test_two_block_devices(has_metadata: None, devices: Devices, scratch: Path) -> None:
    image, metadata = disk.image(scratch / "image", SIZE), fresh(scratch / "metadata")
    with kernel.kernel_loop(image) as data_node, kernel.kernel_loop(metadata) as metadata_node:
        device = devices.loop(data_node, metadata=metadata_node, **T10DIF.options)
        load.verify(device.node, *MIXED)
        devices.remove(device)


def test_a_file_system(has_metadata: None, devices: Devices, scratch: Path) -> None:
    file, metadata = disk.image(scratch / "image", 64 * MIB), fresh(scratch / "metadata", size=64 * MIB)
    device = devices.loop(file, metadata=metadata, **T10DIF.options)
    kernel.run("mkfs.ext4", "-q", "-F", device.node)
    with kernel.mounted(device.node, scratch / "mnt") as point:
        (point / "large").write_bytes(disk.pattern(4 * MIB))
        os.sync()
    kernel.run("fsck.ext4", "-fn", device.node)
    with kernel.mounted(device.node, scratch / "mnt", "-o", "ro") as point:
        assert (point / "large").read_bytes() == disk.pattern(4 * MIB)


# -- flush, discard, errors -----------------------------------------------------------------


def test_a_flush_reaches_both_files(has_metadata: None, devices: Devices, scratch: Path) -> None:
    """Each on a disk of its own, which counts its flushes."""
    image, metadata = disk.image(scratch / "image", SIZE), fresh(scratch / "metadata")
    with kernel.kernel_loop(image) as data_node, kernel.kernel_loop(metadata) as metadata_node:
        device = devices.loop(data_node, metadata=metadata_node, **T10DIF.options)

        def flushes(node: Path) -> int:
            return int(Path(f"/sys/block/{node.name}/stat").read_text().split()[15])

        before = [flushes(data_node), flushes(metadata_node)]
        disk.write(device.node, 0, disk.pattern(4096))
        disk.flush(device.node)
        assert [flushes(data_node), flushes(metadata_node)] == [count + 1 for count in before]
        assert metadata.read_bytes()[:2] == t10dif(disk.pattern(4096)[:512]).to_bytes(2)
        disk.write(device.node, 8192, disk.pattern(512), os.O_DSYNC)  # FUA
        assert metadata.read_bytes()[128:130] == t10dif(disk.pattern(512)).to_bytes(2)
        devices.remove(device)


def test_no_discard_and_zeroes_that_are_written(has_metadata: None, devices: Devices, scratch: Path) -> None:
    made = make(devices, scratch)
    disk.write(made.node, 0, disk.pattern(MIB))
    assert made.device.queue("discard_max_bytes") == "0"
    with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
        disk.discard(made.node, 0, 4096)
    disk.zero_allocated(made.node, 4096, 65536)
    assert disk.read(made.node, 0, 4096 + 65536) == disk.pattern(MIB)[:4096] + bytes(65536)
    made.flip(made.file, 8192)
    expect_damage(made.node, 8192)


def test_a_data_file_that_shrinks(has_metadata: None, devices: Devices, scratch: Path) -> None:
    """The data fails at once, while the metadata is on its way."""
    made = make(devices, scratch)
    disk.write(made.node, 0, disk.pattern(SIZE))
    os.truncate(made.file, 4096)
    for _ in range(2 * 128):
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            disk.read(made.node, MIB, 4096)
    assert disk.read(made.node, 0, 4096) == disk.pattern(SIZE)[:4096]


def test_a_metadata_file_that_shrinks(has_metadata: None, devices: Devices, scratch: Path) -> None:
    log = scratch / "log"
    made = make(devices, scratch, log=log)
    disk.write(made.node, 0, disk.pattern(SIZE))
    os.truncate(made.metadata, 4096)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        disk.read(made.node, MIB, 4096)
    until(lambda: "READ at sector 2048 failed: Input/output error" in log.read_text(), "the log tells of it")
    assert disk.read(made.node, 0, 4096) == disk.pattern(SIZE)[:4096]


# -- it stays -------------------------------------------------------------------------------


def test_the_next_device_over_these_files_checks_them(has_metadata: None, devices: Devices, scratch: Path) -> None:
    made = make(devices, scratch)
    disk.write(made.node, 0, disk.pattern(SIZE))
    devices.remove(made.device)
    made.flip(made.file, MIB)
    again = devices.loop(made.file, metadata=made.metadata, read_only=True, **T10DIF.options)
    expect_damage(again.node, MIB)
    assert disk.read(again.node, 0, MIB) == disk.pattern(SIZE)[:MIB]


def test_recovery_under_load(has_metadata: None, devices: Devices, scratch: Path) -> None:
    made = make(devices, scratch, recovery="reissue")
    options = ["--ioengine=libaio", "--iodepth=16", "--rw=randwrite", "--bs=4k", "--size=2m", "--verify=crc32c"]
    with load.running(made.device, *options, "--rate_iops=,400") as fio:
        until(lambda: made.device.completed("writes") > 50, "fio writes")
        os.kill(made.device.pid, signal.SIGKILL)
        recover(made.device.id)
        status, output = load.result(fio)
    assert status == 0, output
    assert disk.read(made.node, 0, SIZE) == made.file.read_bytes()
    made.flip(made.metadata, 8 * 3)
    expect_damage(made.node, 3 * 512)


def test_recovery_with_other_blocks(has_metadata: None, devices: Devices, scratch: Path) -> None:
    """The kernel has metadata for blocks of 4096; the new daemon would store one for each 512."""
    image, metadata = disk.image(scratch / "image", SIZE), fresh(scratch / "metadata")
    link = scratch / "link"
    with kernel.kernel_loop(image, "--sector-size=4096") as node:
        link.symlink_to(node)
        device = devices.loop(link, metadata=metadata, recovery="queue", **T10DIF.options)
        device.kill_daemon()
        link.unlink()
        link.symlink_to(image)
        with pytest.raises(
            UblkError, match="has metadata for blocks of 4096 bytes, but those of its backing now have 512"
        ):
            recover(device.id)
        devices.remove(device)


# -- null -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "user-copy"])
@pytest.mark.parametrize("kind", KINDS[::3], ids=name)
def test_null_forgets_it_and_reads_pass(has_metadata: None, devices: Devices, kind: Kind, mode: str) -> None:
    device = devices.null(mode=mode, **kind.options)
    assert (device.sysfs / "integrity/read_verify").read_text() == "1\n"
    disk.write(device.node, MIB, disk.pattern(MIB))
    assert len(disk.read(device.node, 0, 4 * MIB)) == 4 * MIB
    with load.running(device, *MIXED[1:], "--numjobs=2") as fio:
        status, output = load.result(fio)
    assert status == 0, output


# -- which mode, which driver ---------------------------------------------------------------


def test_the_mode_is_one_that_copies(has_metadata: None, devices: Devices, scratch: Path) -> None:
    made = make(devices, scratch)
    known = made.device.status().known
    assert known
    assert (known.mode, Feature.INTEGRITY in made.device.status().info.flags) == ("batch+user-copy", True)
    assert known.target["metadata_file"] == str(made.metadata)
    shown = program.ublk("list", "-n", str(made.device.id)).out
    assert " INTEGRITY " in shown
    assert '"metadata_file"' in shown
    assert "batch+user-copy" in program.ublk("list").out
    devices.remove(made.device)
    known = make(devices, scratch, depth=1).device.status().known
    assert known
    assert known.mode == "user-copy"


@pytest.mark.parametrize("mode", [mode for mode in MODES if not mode.endswith("user-copy")])
def test_a_mode_that_cannot_move_it(has_metadata: None, mode: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot move metadata: the driver has it copied"):
        add(configure("null", mode=mode, metadata_size=8))


def test_not_with_memory_that_clients_share(has_metadata: None) -> None:
    with pytest.raises(ConfigError, match="does not go with metadata"):
        add(configure("null", shmem_zc=True, metadata_size=8))
    assert inspect.device_ids() == []


@pytest.mark.parametrize("mode", ["auto", "user-copy"])
def test_a_driver_without_metadata(mode: str) -> None:
    if Feature.INTEGRITY in inspect.features():
        pytest.skip("this driver has it")
    added = program.ublk("add", "-t", "null", "--mode", mode, "--metadata_size", "8")
    assert (added.status, added.out, inspect.device_ids()) == (ExitCode.FAILED, "", [])
    assert "lacks UBLK_F_INTEGRITY, which metadata_size 8 needs" in added.err


def test_options_of_kublk(has_metadata: None, devices: Devices, scratch: Path) -> None:
    file, metadata = disk.image(scratch / "image", SIZE), fresh(scratch / "metadata", KINDS[3])
    options = "--integrity_capable --integrity_reftag --metadata_size 64 --pi_offset 56 --csum_type t10dif --tag_size 2"
    added = program.ublk("add", "-t", "loop", "-f", str(file), "--metadata", str(metadata), *options.split())
    assert (added.status, added.err) == (0, "")
    made = Disk(devices.adopt(0), file, metadata)
    assert (made.profile()["format"], made.profile()["tag_size"]) == ("T10-DIF-TYPE1-CRC", "2")
    with Control() as control:
        params = control.params(0)
    assert params.integrity
    assert (params.integrity.interval, params.integrity.pi_offset) == (512, 56)


def test_metadata_that_another_device_uses(has_metadata: None, devices: Devices, scratch: Path) -> None:
    made = make(devices, scratch)
    with pytest.raises(BusyError, match="metadata is in use by another device or program"):
        devices.loop(disk.image(scratch / "other", SIZE), metadata=made.metadata, **T10DIF.options)
