"""The targets over several files: what they find there, and what they refuse."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ublkpy.errors import BusyError, ConfigError, UblkError
from ublkpy.tgt import backing, handlers
from ublkpy.tgt.base import Geometry, Target
from ublkpy.tgt.concat import ConcatTarget
from ublkpy.tgt.disk import DiskOptions
from ublkpy.tgt.stripe import StripeTarget
from ublkpy.uring.map import Extent, File, Routing, Stripe

MIB = 1 << 20
KIB = 1 << 10


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for those who hold a file: here they hold it until they are told."""
    monkeypatch.setattr(backing, "_RELEASE", 0.0)


def images(folder: Path, *sizes: int) -> tuple[Path, ...]:
    files = tuple(folder / f"image{n}" for n in range(len(sizes)))
    for file, size in zip(files, sizes, strict=True):
        file.touch()
        os.truncate(file, size)
    return files


@contextmanager
def opened(target: Target, **said: object) -> Iterator[Geometry]:
    target.disk = DiskOptions(said)
    found = target.open()
    try:
        yield found
    finally:
        target.close()


def refused(target: Target, **said: object) -> UblkError:
    """Why it does not open; no file stays open."""
    before = set(Path("/proc/self/fd").iterdir())
    with pytest.raises(UblkError) as caught, opened(target, **said):
        pass
    assert set(Path("/proc/self/fd").iterdir()) == before
    return caught.value


# -- stripe --------------------------------------------------------------------------------


def test_a_stripe_has_whole_chunks_of_all(tmp_path: Path) -> None:
    files = images(tmp_path, MIB + 5 * KIB, MIB + 63 * KIB, MIB)
    target = StripeTarget({"files": files})
    with opened(target) as found:
        assert found.size == 3 * MIB
        assert (found.io_min, found.io_opt) == (64 * KIB, 64 * KIB)
        made = handlers.make_map(target, found.size)
        assert list(made.extents()) == [Extent(0, 3 * MIB, Routing.all(Stripe((0, 1, 2), 64 * KIB)))]
        made.close()
        assert target.backing() == ", ".join(map(str, files))
        assert target.status()["files"] == [str(file) for file in files]
        assert target.status()["chunk"] == 64 * KIB


def test_the_best_size_of_requests_is_a_whole_stripe(tmp_path: Path) -> None:
    with opened(StripeTarget({"files": images(tmp_path, *[MIB] * 4), "chunk": 16384})) as found:
        assert (found.io_min, found.io_opt) == (16384, 65536)


@pytest.mark.parametrize("raw", ["3k", "96k", 2048, "2M", 0, "x"])
def test_a_chunk_that_is_none(raw: object) -> None:
    with pytest.raises(ValueError, match=r"power of two|out of range|is not a size"):
        StripeTarget.options["chunk"].parse(raw)


def test_a_stripe_of_one() -> None:
    with pytest.raises(ValueError, match="files are 1, and have to be 2 to 255"):
        StripeTarget.options["files"].parse(["a"])


def test_files_of_a_stripe_that_differ(tmp_path: Path) -> None:
    files = images(tmp_path, MIB, 2 * MIB)
    error = refused(StripeTarget({"files": files}))
    assert error.message == (
        f"{files[0]} has room for 1M in whole chunks, and another one for 2M: those of a stripe are of one size"
    )
    assert error.hint == f"truncate -s {2 * MIB} {files[0]}", "which cuts off nothing"


def test_more_files_than_a_map_can_have_side_by_side(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="files are 256, and have to be 2 to 255"):
        StripeTarget.options["files"].check(tuple(tmp_path / str(n) for n in range(256)), "")


def test_files_smaller_than_a_chunk(tmp_path: Path) -> None:
    error = refused(StripeTarget({"files": images(tmp_path, 4096, 4096)}))
    assert error.message == "the files are smaller than a chunk, 64K"


# -- concat --------------------------------------------------------------------------------


def test_files_one_after_the_other(tmp_path: Path) -> None:
    target = ConcatTarget({"files": images(tmp_path, MIB, 8192, 4096)})
    with opened(target) as found:
        assert found.size == MIB + 12288
        made = handlers.make_map(target, found.size)
        assert list(made.extents()) == [
            Extent(0, MIB, Routing.all(File(0))),
            Extent(MIB, 8192, Routing.all(File(1))),
            Extent(MIB + 8192, 4096, Routing.all(File(2))),
        ]
        made.close()


def test_a_block_in_two_files(tmp_path: Path) -> None:
    files = images(tmp_path, MIB, MIB + 512)
    error = refused(ConcatTarget({"files": files}), logical_block_size=4096)
    assert error.message == f"size {MIB + 512} of {files[1]} is not a multiple of the block size 4096"
    assert error.hint == f"grow the file with: truncate -s {MIB + 4096} {files[1]}"


# -- both ----------------------------------------------------------------------------------


@pytest.fixture(params=[StripeTarget, ConcatTarget])
def kind(request: pytest.FixtureRequest) -> type[Target]:
    found: type[Target] = request.param
    return found


def test_the_same_file_twice(kind: type[Target], tmp_path: Path) -> None:
    (file,) = images(tmp_path, MIB)
    link, hard = tmp_path / "link", tmp_path / "hard"
    link.symlink_to(file)
    os.link(file, hard)
    assert refused(kind({"files": (file, file)})).message == f"files: {file} is there twice"
    for other in (link, hard, tmp_path / "." / "image0"):
        error = refused(kind({"files": (file, other)}))
        assert isinstance(error, ConfigError)
        assert error.message in (f"files: {other} and {file} are the same", f"files: {file} is there twice")


def test_one_that_is_missing(kind: type[Target], tmp_path: Path) -> None:
    files = (*images(tmp_path, MIB), tmp_path / "none")
    assert refused(kind({"files": files})).message == f"backing file {tmp_path}/none does not exist"


def test_one_that_is_empty(kind: type[Target], tmp_path: Path) -> None:
    assert refused(kind({"files": images(tmp_path, MIB, 0)})).message == f"backing file {tmp_path}/image1 is empty"


def test_one_that_is_no_file(kind: type[Target], tmp_path: Path) -> None:
    assert "is a directory" in refused(kind({"files": (*images(tmp_path, MIB), tmp_path)})).message


def test_one_that_another_device_has(kind: type[Target], tmp_path: Path) -> None:
    files = images(tmp_path, MIB, MIB)
    with opened(ConcatTarget({"files": files[1:]})):
        assert isinstance(refused(kind({"files": files})), BusyError)
    with opened(ConcatTarget({"files": files}), read_only=True), opened(kind({"files": files}), read_only=True):
        pass


def test_each_write_is_durable_without_a_cache(kind: type[Target], tmp_path: Path) -> None:
    with opened(kind({"files": images(tmp_path, MIB, MIB)}), write_cache=False) as found:
        assert (found.write_cache, found.max_write_zeroes_bytes) == (False, 0)


def test_the_largest_block_is_that_of_the_disk(kind: type[Target], tmp_path: Path) -> None:
    with opened(kind({"files": images(tmp_path, MIB, MIB), "direct": False})) as found:
        assert found.logical_block == 512
        assert found.discard_granularity in (0, 4096)
