"""The loop target, opened over real files and devices."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from ublkpy.config import DeviceConfig, DeviceOptions
from ublkpy.errors import BusyError, ExitCode, UblkError
from ublkpy.tgt import backing, handlers
from ublkpy.tgt.base import Geometry
from ublkpy.tgt.disk import DiskOptions
from ublkpy.tgt.loop import LoopTarget
from ublkpy.tgt.options import exact_size
from ublkpy.uring.map import File, Routing

MIB = 1 << 20

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts and block devices need root")

OpenFds = Callable[[], set[str]]
Make = Callable[[Path, int], Path]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for those who hold a file: here they hold it until they are told."""
    monkeypatch.setattr(backing, "_RELEASE", 0.0)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A file of 1 MiB without holes."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * MIB)
    return path


def direct_block(path: Path) -> int:
    """The smallest block that O_DIRECT reads from a file, 0 if there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return 0
    try:
        with mmap.mmap(-1, 4096) as buf, memoryview(buf) as view:
            for block in (512, 1024, 2048, 4096):
                try:
                    os.preadv(fd, [view[:block]], 0)
                    return block
                except OSError:
                    continue
    finally:
        os.close(fd)
    return 0


def open_files() -> set[str]:
    return {link.name for link in Path("/proc/self/fd").iterdir()}


def refused(**values: object) -> UblkError:
    """The error that opening ends in: of this machine, not of what was said. No file stays open."""
    before = open_files()
    with pytest.raises(UblkError) as caught, served(**values):
        pass
    assert open_files() == before
    assert not caught.value.message.endswith(".")
    assert caught.value.exit_code == (ExitCode.BUSY if isinstance(caught.value, BusyError) else ExitCode.FAILED)
    return caught.value


@dataclass(frozen=True)
class Mapped:
    """Where the map says that the bytes are."""

    fd: int
    offset: int
    is_block_device: bool


def mapped(target: LoopTarget, geometry: Geometry) -> Mapped:
    target_map = handlers.make_map(target, geometry.size)
    (extent,) = target_map.extents()
    assert (extent.start, extent.length, extent.routing) == (0, geometry.size, Routing.all(File(0)))
    target_map.close()
    backing = target._part.backing
    return Mapped(backing.fd, extent.offset, backing.is_block_device)


@contextmanager
def served(**values: object) -> Iterator[tuple[LoopTarget, Geometry]]:
    """An open target and what it says of itself."""
    disk = {name: value for name, value in values.items() if name in DiskOptions.options}
    target = LoopTarget({name: value for name, value in values.items() if name not in disk})
    geometry = DeviceConfig(DeviceOptions(disk), target).open()
    try:
        yield target, geometry
    finally:
        target.close()


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as f:
        f.truncate(size)
    return path


def dense(path: Path, size: int) -> Path:
    path.write_bytes(b"x" * size)
    return path


# -- what cannot be a backing --------------------------------------------------------------


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "no.img"
    error = refused(file=path)
    assert error.message == f"backing file {path} does not exist"
    assert error.hint == f"make one with: truncate -s 1G {path}"


def test_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    assert "does not exist" in refused(file=tmp_path / "link").message


def test_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("link")
    assert os.strerror(errno.ELOOP) in refused(file=tmp_path / "link").message


def test_directory(tmp_path: Path) -> None:
    error = refused(file=tmp_path)
    assert error.message == f"backing file {tmp_path} is a directory"
    assert error.hint


def test_file_under_a_file(disk: Path) -> None:
    assert os.strerror(errno.ENOTDIR) in refused(file=disk / "x").message


def test_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refused(file=tmp_path / "pipe").message.endswith("is neither a regular file nor a block device")


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero"])
def test_character_device(path: str) -> None:
    assert refused(file=Path(path)).message == f"backing file {path} is neither a regular file nor a block device"


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.img"
    path.touch()
    error = refused(file=path)
    assert error.message == f"backing file {path} is empty"
    assert error.hint == f"give it a size with: truncate -s 1G {path}"


# -- sizes and offsets ---------------------------------------------------------------------


def test_whole_file(disk: Path) -> None:
    with served(file=disk) as (target, geometry):
        assert geometry.size == MIB
        assert target.backing() == str(disk)


@pytest.mark.parametrize(
    ("values", "size"),
    [
        ({"offset": 4096}, MIB - 4096),
        ({"size": 8192}, 8192),
        ({"offset": 4096, "size": 8192}, 8192),
        ({"offset": MIB - 4096}, 4096),
        ({"offset": MIB - 8192, "size": 8192}, 8192),
    ],
)
def test_part_of_a_file(disk: Path, values: dict[str, int], size: int) -> None:
    with served(file=disk, **values) as (target, geometry):
        assert geometry.size == size
        linear = mapped(target, geometry)
        assert linear.offset == values.get("offset", 0)
        assert target.status()["offset"] == linear.offset // 512


@pytest.mark.parametrize("offset", [MIB, MIB + 512, 1 << 40])
def test_offset_behind_the_end(disk: Path, offset: int) -> None:
    error = refused(file=disk, offset=offset)
    assert error.message == f"offset {exact_size(offset)} is not inside {disk}, which has 1M"


@pytest.mark.parametrize("raw", ["100B", "513b", "0.5s"])
def test_offset_is_whole_sectors_whatever_the_file(raw: str) -> None:
    with pytest.raises(ValueError, match=f"{raw} is not a multiple of 512"):
        LoopTarget.options["offset"].parse(raw)


def test_size_that_lacks_a_sector_is_told_exactly(disk: Path) -> None:
    os.truncate(disk, MIB - 512)
    assert refused(file=disk, size=MIB).message == (f"{disk} has 1023.5K: too short for 1M at offset 0B")
    assert "too short for 1.00M (1049088 bytes)" in refused(file=disk, size=MIB + 512).message


@pytest.mark.parametrize(("offset", "size"), [(0, 2 * MIB), (512, MIB), (MIB - 512, 1024)])
def test_size_that_the_file_does_not_have(disk: Path, offset: int, size: int) -> None:
    error = refused(file=disk, offset=offset, size=size)
    assert error.message.startswith(f"{disk} has 1M: too short for ")
    assert error.hint == f"grow it with: truncate -s {offset + size} {disk}"


def test_file_that_is_no_multiple_of_a_sector(tmp_path: Path) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(bytes(1000))
    error = refused(file=path)
    assert error.message == f"size 1000 of {path} is not a multiple of the block size 512"
    assert error.hint == f"grow the file with: truncate -s 1024 {path}"


@pytest.mark.parametrize("values", [{"size": 1000}, {"offset": 100}, {"offset": 100, "size": 512}, {"size": 513}])
def test_hint_never_cuts_the_file(disk: Path, values: dict[str, int]) -> None:
    error = refused(file=disk, **values)
    assert "is not a multiple of the block size 512" in error.message
    assert "truncate" not in error.hint


def test_hint_for_an_odd_file_with_an_offset_grows_it(tmp_path: Path) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(bytes(2000))
    assert refused(file=path, offset=512).hint == f"grow the file with: truncate -s 2048 {path}"


# -- O_DIRECT ------------------------------------------------------------------------------


def test_buffered(disk: Path) -> None:
    with served(file=disk, direct=False) as (target, geometry):
        linear = mapped(target, geometry)
        assert not fcntl.fcntl(linear.fd, fcntl.F_GETFL) & os.O_DIRECT
        assert target.status() == {"backing_file": str(disk), "direct_io": 0, "offset": 0}
        assert geometry.logical_block == 512
        assert geometry.physical_block == geometry.io_min == geometry.io_opt == disk.stat().st_blksize


@pytest.mark.parametrize("direct", [True, None])
def test_direct(disk: Path, direct: bool | None) -> None:
    block = direct_block(disk)
    if not block:
        pytest.skip(f"no O_DIRECT in {disk.parent}")
    with served(file=disk, direct=direct) as (target, geometry):
        linear = mapped(target, geometry)
        assert fcntl.fcntl(linear.fd, fcntl.F_GETFL) & os.O_DIRECT
        assert target.status() == {"backing_file": str(disk), "direct_io": 1, "offset": 0}
        assert geometry.logical_block == block
        assert geometry.physical_block >= block


def test_odd_size_with_direct_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(bytes(1000))
    if not direct_block(path):
        pytest.skip(f"no O_DIRECT in {tmp_path}")
    error = refused(file=path, direct=True)
    assert error.message.startswith(
        f"backing file {path} cannot be used with O_DIRECT: size or offset is not a multiple"
    )
    assert error.hint == "use it buffered, with --buffered_io"


# -- what the geometry says of writing -----------------------------------------------------


def test_writable_file_has_a_cache_and_discards(disk: Path) -> None:
    with served(file=disk) as (_, geometry):
        pass
    assert (geometry.read_only, geometry.rotational, geometry.write_cache) == (False, False, True)
    assert geometry.discard_granularity == disk.stat().st_blksize
    assert geometry.max_discard_bytes == geometry.max_write_zeroes_bytes == 2**32 - 512


@pytest.fixture
def preallocated(disk: Path) -> Path:
    """The disk, with blocks behind its end, and last changed long ago."""
    subprocess.run(["fallocate", "--keep-size", "--offset", str(MIB), "--length", str(MIB), disk], check=True)
    os.utime(disk, ns=(1, 1))
    return disk


@pytest.mark.parametrize("values", [{}, {"direct": False}, {"read_only": True}, {"offset": 512}], ids=str)
def test_opening_changes_nothing(preallocated: Path, values: dict[str, object]) -> None:
    before = preallocated.stat()
    assert before.st_blocks * 512 >= 2 * MIB
    with served(file=preallocated, **values):
        pass
    after = preallocated.stat()
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
    assert (after.st_size, after.st_blocks) == (before.st_size, before.st_blocks)


def punches(path: Path) -> bool:
    """Whether holes can be punched in a file, by trying."""
    done = subprocess.run(
        ["fallocate", "--punch-hole", "--offset", "0", "--length", "4096", path], capture_output=True, check=False
    )
    return done.returncode == 0


def offers_discard(path: Path) -> bool:
    with served(file=path) as (_, geometry):
        return geometry.discard_granularity != 0


def test_discard_is_offered_only_where_holes_can_be_punched(disk: Path) -> None:
    assert punches(disk) or not offers_discard(disk)


@as_root
@pytest.mark.parametrize(("kind", "offered"), [("tmpfs", True), ("ramfs", False)])
def test_discard_depends_on_the_file_system(tmp_path: Path, kind: str, offered: bool) -> None:
    folder = tmp_path / kind
    folder.mkdir()
    subprocess.run(["mount", "-t", kind, "none", folder], check=True)
    try:
        path = dense(folder / "disk.img", MIB)
        assert offers_discard(path) == punches(path) == offered
    finally:
        subprocess.run(["umount", folder], check=True)


def test_read_only_file_has_neither(disk: Path) -> None:
    with served(file=disk, read_only=True) as (target, geometry):
        linear = mapped(target, geometry)
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            os.pwrite(linear.fd, b"y", 0)
    assert (geometry.read_only, geometry.write_cache, geometry.discard_granularity) == (True, False, 0)


# -- sharing -------------------------------------------------------------------------------


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("first", "second"), [(False, False), (False, True), (True, False)])
def test_file_in_use(disk: Path, first: bool, second: bool) -> None:
    with served(file=disk, read_only=first):
        error = refused(file=disk, read_only=second)
    assert isinstance(error, BusyError)
    assert error.message == f"backing file {disk} is in use by another device or program"
    assert "ublk list" in error.hint
    with served(file=disk, read_only=second):
        pass


@pytest.mark.usefixtures("impatient")
def test_file_in_use_by_another_name(disk: Path) -> None:
    link = disk.with_name("link.img")
    link.hardlink_to(disk)
    with served(file=disk):
        assert isinstance(refused(file=link), BusyError)


def test_read_only_devices_share_a_file(disk: Path) -> None:
    with served(file=disk, read_only=True), served(file=disk, read_only=True) as (_, geometry):
        assert geometry.read_only


@pytest.mark.usefixtures("impatient")
def test_lock_outlives_the_fork_of_the_daemon(disk: Path) -> None:
    """The command closes its copy of the file; the daemon's keeps the lock."""
    holder = LoopTarget({"file": disk})
    holder.open()
    read_end, write_end = os.pipe()
    daemon = os.fork()
    if daemon == 0:
        os.close(write_end)
        os.read(read_end, 1)
        os._exit(0)
    os.close(read_end)
    holder.close()
    assert isinstance(refused(file=disk), BusyError)
    os.close(write_end)
    os.waitpid(daemon, 0)
    with served(file=disk):
        pass


def test_file_that_is_let_go_soon_is_waited_for(disk: Path) -> None:
    """The files of a daemon that was killed are released a moment after its end."""
    read_end, write_end = os.pipe()
    holder = os.fork()
    if holder == 0:
        with served(file=disk):
            os.write(write_end, b"x")
            time.sleep(0.2)
        os._exit(0)
    os.read(read_end, 1)
    with served(file=disk) as (_, geometry):
        assert geometry.size == MIB
    os.waitpid(holder, 0)
    os.close(read_end)
    os.close(write_end)


def test_many_failures_leave_no_file_open(disk: Path, open_fds: OpenFds) -> None:
    before = open_fds()
    for _ in range(20):
        refused(file=disk, size=2 * MIB)
        refused(file=disk, size=1000)
    assert open_fds() == before


# -- privileges and full disks -------------------------------------------------------------


@pytest.fixture
def read_only_disk(disk: Path) -> Iterator[Path]:
    """The disk, on a read-only mount."""
    subprocess.run(["mount", "--bind", disk, disk], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


@as_root
def test_file_on_a_read_only_mount(read_only_disk: Path) -> None:
    error = refused(file=read_only_disk)
    assert error.message == f"cannot open {read_only_disk}: {os.strerror(errno.EROFS)}"
    assert error.hint == "serve it read-only with --read-only, or make it writable"
    with served(file=read_only_disk, read_only=True) as (_, geometry):
        assert geometry.read_only


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open any file; see the read-only mount instead")
def test_file_without_permission(disk: Path) -> None:
    disk.chmod(0o444)
    assert "--read-only" in refused(file=disk).hint


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


@as_root
def test_sparse_file_that_fits_is_no_matter(small_tmpfs: Path) -> None:
    with served(file=sparse(small_tmpfs / "disk.img", MIB // 2)) as (_, geometry):
        assert geometry.size == MIB // 2


@as_root
def test_sparse_file_that_does_not_fit_is_warned_of(small_tmpfs: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = sparse(small_tmpfs / "disk.img", 4 * MIB)
    with served(file=path) as (_, geometry):
        assert geometry.size == 4 * MIB
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        f"{path} is sparse and may need 4M more, but its disk has only 1M free: writes can fail"
    )


@as_root
def test_sparse_file_read_only_is_not_warned_of(small_tmpfs: Path) -> None:
    with served(file=sparse(small_tmpfs / "disk.img", 4 * MIB), read_only=True) as (_, geometry):
        assert geometry.size == 4 * MIB


@as_root
def test_sparse_file_on_a_full_disk(small_tmpfs: Path) -> None:
    path = sparse(small_tmpfs / "disk.img", 4 * MIB)
    room = os.statvfs(small_tmpfs)
    (small_tmpfs / "fill").write_bytes(bytes(room.f_bavail * room.f_frsize))
    error = refused(file=path)
    assert error.message == f"the disk that holds {path} is full, and the image still needs 4M of it"
    assert "--read-only" in error.hint


# -- block devices -------------------------------------------------------------------------


@pytest.fixture
def block_device(tmp_path: Path) -> Iterator[Path]:
    """A block device of 16 MiB with sectors of 4096 bytes."""
    if not shutil.which("losetup") or os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        pytest.skip("needs losetup, /dev/loop-control and root")
    backing = sparse(tmp_path / "backing", 16 * MIB)
    done = subprocess.run(
        ["losetup", "--find", "--show", "--sector-size", "4096", backing], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"losetup: {done.stderr.strip()}")
    yield Path(done.stdout.strip())
    subprocess.run(["losetup", "--detach", done.stdout.strip()], check=True)


@pytest.mark.parametrize("direct", [None, True, False])
def test_block_device_keeps_its_block_size(block_device: Path, direct: bool | None) -> None:
    with served(file=block_device, direct=direct) as (target, geometry):
        linear = mapped(target, geometry)
        assert linear.is_block_device
        assert target.status()["direct_io"] == (0 if direct is False else 1)
    assert (geometry.size, geometry.logical_block) == (16 * MIB, 4096)
    queue = Path("/sys/block") / block_device.name / "queue"
    assert geometry.physical_block == int((queue / "physical_block_size").read_text())
    assert geometry.discard_granularity == int((queue / "discard_granularity").read_text())


@pytest.mark.parametrize(("release", "offered"), [("6.11.12-arch1", False), ("6.12.0", True), ("7.0.0-rc1", True)])
def test_discard_on_a_block_device_needs_a_kernel_that_has_the_command(
    block_device: Path, monkeypatch: pytest.MonkeyPatch, release: str, offered: bool
) -> None:
    uname = os.uname()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((*uname[:2], release, *uname[3:])))
    with served(file=block_device) as (_, geometry):
        assert (geometry.max_discard_bytes > 0) == offered
        assert geometry.discard_granularity > 0  # of write-zeroes, too
        assert geometry.max_write_zeroes_bytes == 2**32 - 4096


@pytest.mark.parametrize(
    ("values", "hint"),
    [({"offset": 512}, "the next multiple is --offset 4096B"), ({"size": 512}, "the next multiple is --size 4096B")],
)
def test_block_device_wants_multiples_of_its_block(block_device: Path, values: dict[str, int], hint: str) -> None:
    error = refused(file=block_device, direct=False, **values)
    assert "is not a multiple of the block size 4096" in error.message
    assert error.hint == hint


def test_block_device_cannot_be_grown_by_truncate(block_device: Path) -> None:
    error = refused(file=block_device, size=32 * MIB)
    assert "too short" in error.message
    assert "truncate" not in error.hint


@pytest.fixture
def mounted(block_device: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system whose blocks, and whose device's, are 4096 bytes."""
    folder = tmp_path / "mnt"
    folder.mkdir()
    subprocess.run(["mkfs.ext4", "-q", block_device], check=True)
    subprocess.run(["mount", block_device, folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.usefixtures("impatient")
def test_mounted_block_device_is_in_use(block_device: Path, mounted: Path) -> None:
    error = refused(file=block_device)
    assert isinstance(error, BusyError)
    assert error.message == f"block device {block_device} is in use: mounted, or part of another device"
    assert error.hint == f"see what uses it with: lsblk {block_device}"


@pytest.mark.parametrize("make", [sparse, dense])
def test_file_on_large_sectors(mounted: Path, make: Make) -> None:
    with served(file=make(mounted / "disk.img", MIB)) as (target, geometry):
        assert target.status()["direct_io"] == 1
        assert geometry.logical_block == 4096


@pytest.mark.parametrize("make", [sparse, dense])
def test_file_that_does_not_fit_large_sectors_goes_through_the_page_cache(mounted: Path, make: Make) -> None:
    path = make(mounted / "disk.img", 9 * 512)
    with served(file=path) as (target, geometry):
        linear = mapped(target, geometry)
        assert not fcntl.fcntl(linear.fd, fcntl.F_GETFL) & os.O_DIRECT
        assert (geometry.size, geometry.logical_block, target.status()["direct_io"]) == (9 * 512, 512, 0)


@pytest.mark.parametrize("make", [sparse, dense])
def test_direct_where_large_sectors_do_not_fit(mounted: Path, make: Make) -> None:
    path = make(mounted / "disk.img", 9 * 512)
    assert "multiple of its block size 4096" in refused(file=path, direct=True).message


# -- what was said of the disk -------------------------------------------------------------


def test_larger_blocks_than_the_file_asks_for(disk: Path) -> None:
    with served(file=disk, logical_block_size=4096, offset=MIB // 2) as (_, geometry):
        assert (geometry.logical_block, geometry.physical_block) == (4096, 4096)


def test_larger_blocks_limit_the_size_and_not_the_offset(disk: Path) -> None:
    sizes = {"logical_block_size": 2048, "offset": 512, "direct": False}
    with served(file=disk, size=MIB // 2, **sizes) as (_, geometry):
        assert geometry.logical_block == 2048
    error = refused(file=disk, **sizes)
    assert "is not a multiple of the block size 2048" in error.message
    assert error.hint.startswith("grow the file with: truncate -s ")


def test_smaller_blocks_than_the_block_device_has(block_device: Path) -> None:
    error = refused(file=block_device, logical_block_size=512)
    assert error.message == "logical_block_size 512 is less than the 4096 bytes of the blocks behind it"


def test_smaller_blocks_than_o_direct_takes(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page cache takes any."""
    monkeypatch.setattr(backing, "_direct_block", lambda fd: 4096)
    with served(file=disk) as (_, geometry):
        assert geometry.logical_block == 4096
    with served(file=disk, logical_block_size=512) as (target, geometry):
        assert (geometry.logical_block, target.status()["direct_io"]) == (512, 0)
    error = refused(file=disk, logical_block_size=512, direct=True)
    assert error.message.endswith("its block size 4096 is more than logical_block_size 512")
    assert "--buffered_io" in error.hint


@pytest.mark.parametrize("direct", [None, False])
def test_without_a_write_cache_each_write_is_durable(disk: Path, direct: bool | None) -> None:
    with served(file=disk, write_cache=False, direct=direct) as (target, geometry):
        (fd,) = {number for number in map(int, os.listdir("/proc/self/fd")) if same(number, disk)}  # noqa: PTH208
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DSYNC
        assert not geometry.write_cache
        assert geometry.max_write_zeroes_bytes == 0
        assert geometry.max_discard_bytes > 0
        target.close()
        target.open()


def test_with_a_write_cache_the_flush_makes_it_durable(disk: Path) -> None:
    with served(file=disk, write_cache=True) as (_, geometry):
        assert geometry.write_cache


def same(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except OSError:
        return False
