"""Targets that are parts of others: how they are written, opened and kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.device.targets import Ram
from ublkpy.config import DeviceConfig, build, from_dump, read_yaml
from ublkpy.errors import ConfigError, UblkError
from ublkpy.tgt import handlers
from ublkpy.tgt.base import Geometry, Target
from ublkpy.tgt.concat import ConcatTarget
from ublkpy.tgt.disk import DiskOptions
from ublkpy.tgt.fault import FaultTarget
from ublkpy.tgt.loop import LoopTarget
from ublkpy.tgt.mirror import MirrorTarget
from ublkpy.tgt.mirror_label import ROOM
from ublkpy.tgt.null import NullTarget
from ublkpy.tgt.stripe import StripeTarget
from ublkpy.tgt.zero import ZeroTarget
from ublkpy.tgt.zoned import ZonedTarget
from ublkpy.uring.map import Extent, Routing, Space, Spaces

MIB = 1 << 20

RAID10 = """\
target:
  type: stripe
  chunk: 128k
  files:
    - type: mirror
      files: [a0, a1]
    - {type: mirror, files: [b0, b1], create: true}
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "disk.yaml"
        path.write_text(text)
        return path

    return write


def images(folder: Path, *names: str, size: int = 4 * MIB) -> tuple[Path, ...]:
    files = tuple(folder / name for name in names)
    for file in files:
        with file.open("wb") as f:
            f.truncate(size)
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


# -- in a file -----------------------------------------------------------------------------


def test_a_file_says_targets(write: Callable[[str], Path], tmp_path: Path) -> None:
    config = build(read_yaml(write(RAID10)))
    target = config.target
    assert isinstance(target, StripeTarget)
    first, second = target.files
    assert isinstance(first, MirrorTarget)
    assert isinstance(second, MirrorTarget)
    assert (first.files, second.files) == (
        (tmp_path / "a0", tmp_path / "a1"),
        (tmp_path / "b0", tmp_path / "b1"),
    )
    assert (first.create, second.create, target.chunk) == (False, True, 128 << 10)
    assert target.paths() == [tmp_path / name for name in ("a0", "a1", "b0", "b1")]


def test_the_next_daemon_gets_the_same(write: Callable[[str], Path]) -> None:
    config = build(read_yaml(write(RAID10)))
    dumped = json.loads(json.dumps(config.dump()))
    assert set(dumped["target"]["files"][1]) == {"type", "files"}, "what was said once is not said again"
    again = from_dump(dumped)
    assert again.dump() == config.dump()
    assert isinstance(again, DeviceConfig)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            "{type: miror, files: [a]}",
            "disk.yaml:3: target.files[1].type: there is no target 'miror'; did you mean mirror",
        ),
        ("{files: [a]}", "disk.yaml:3: target.files[1]: type is missing: one of concat"),
        ("{type: loop}", "disk.yaml:3: target.files[1]: no file given: target loop needs it"),
        ("{type: loop, file: a, fil: b}", "disk.yaml:3: target.files[1].fil: unknown key; did you mean file?"),
        ("{type: loop, file: a, size: much}", "disk.yaml:3: target.files[1].size: 'much' is not a size"),
        ("{type: mirror, files: [{type: loop, file: b}, a]}", "target.files[1].files: expected a single value here"),
        ("[a, b]", "disk.yaml:3: target.files[1]: expected a single value here"),
        ("{type: stripe, files: [a]}", "target.files[1].files: files are 1, and have to be 2 to 255"),
        ("{type: loop, file: a, depth: 3}", "target.files[1].depth: unknown key"),
    ],
)
def test_mistakes_in_a_part(write: Callable[[str], Path], part: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(read_yaml(write(f"target:\n  type: concat\n  files: [x, {part}]\n")))
    assert message in caught.value.message


# -- opened --------------------------------------------------------------------------------


def test_a_stripe_of_mirrors(tmp_path: Path) -> None:
    first = MirrorTarget({"files": images(tmp_path, "a0", "a1")})
    second = MirrorTarget({"files": images(tmp_path, "b0", "b1")})
    target = StripeTarget({"files": (first, second), "chunk": 65536})
    with opened(target, logical_block_size=4096) as found:
        handlers.start(target, lambda: None, lambda: None)
        assert found.size == 2 * (4 * MIB - ROOM)
        made = handlers.make_map(target, found.size)
        assert list(made.extents()) == [Extent(0, found.size, Routing.all(Spaces((1, 2), 65536)))]
        assert made.stats().nr_files == 4
        assert made.answer(1) == first.upcall
        assert made.answer(2) == second.upcall
        names = [str(tmp_path / name) for name in ("a0", "a1", "b0", "b1")]
        assert target.backing() == f"mirror({names[0]}, {names[1]}), mirror({names[2]}, {names[3]})"
        handlers.stop(target, was_cut=False)
        made.close()


def test_a_file_beside_a_target(tmp_path: Path) -> None:
    """It is a loop target then."""
    (file,) = images(tmp_path, "a")
    target = ConcatTarget({"files": (file, ZeroTarget({"size": MIB})), "direct": False})
    with opened(target) as found:
        assert found.size == 5 * MIB
        made = handlers.make_map(target, found.size)
        assert list(made.extents()) == [
            Extent(0, 4 * MIB, Routing.all(Space(1))),
            Extent(4 * MIB, MIB, Routing.all(Space(2))),
        ]
        assert made.stats().nr_files == 1
        assert target.backing() == f"loop({file}), zero"
        assert target.status() == {
            "parts": [
                {"name": "loop", "backing_file": str(file), "direct_io": 0, "offset": 0},
                {"name": "zero"},
            ]
        }
        made.close()


def test_parts_in_parts(tmp_path: Path) -> None:
    files = images(tmp_path, "a", "b", "c")
    inner = ConcatTarget({"files": (files[0], NullTarget({"size": MIB}))})
    target = StripeTarget({"files": (inner, LoopTarget({"file": files[1], "size": 4 * MIB}), files[2])})
    error = refused(target)
    assert error.message == (
        f"loop({files[1]}) has room for 4M in whole chunks, and another one for 5M: those of a stripe are of one size"
    )
    assert error.hint == f"give target loop {5 * MIB} bytes"
    inner = ConcatTarget({"files": (LoopTarget({"file": files[0], "size": 3 * MIB}), NullTarget({"size": MIB}))})
    with opened(StripeTarget({"files": (inner, *files[1:])})) as found:
        assert found.size == 12 * MIB


def test_a_part_that_cannot_be(tmp_path: Path) -> None:
    (file,) = images(tmp_path, "a")
    error = refused(ConcatTarget({"files": (file, Ram({"size": MIB}))}))
    assert error.message == (
        "target ram answers requests by its methods, and a part of another target has to have a map"
    )
    error = refused(ConcatTarget({"files": (file, ZonedTarget({"size": 64 * MIB, "zone_size": 16 * MIB}))}))
    assert "target zoned" in error.message
    error = refused(ConcatTarget({"files": (file, NullTarget({"metadata_size": 8}))}))
    assert error.message == "target null has metadata, and a part of another target cannot"


def test_the_same_file_in_two_parts(tmp_path: Path) -> None:
    files = images(tmp_path, "a", "b")
    (tmp_path / "link").symlink_to(files[0])
    parts = (FaultTarget({"file": files[0]}), FaultTarget({"file": tmp_path / "link"}))
    with pytest.raises(ConfigError, match="are the same"):
        StripeTarget({"files": parts}).open()


def test_what_fails_in_a_part_is_told_and_nothing_stays_open(tmp_path: Path) -> None:
    files = images(tmp_path, "a", "b")
    target = ConcatTarget({"files": (LoopTarget({"file": files[0]}), LoopTarget({"file": tmp_path / "none"}))})
    assert str(tmp_path / "none") in refused(target).message


def test_each_part_flushes_for_itself(tmp_path: Path) -> None:
    files = images(tmp_path, "a", "b")
    target = StripeTarget({"files": tuple(LoopTarget({"file": file}) for file in files)})
    with opened(target) as found:
        assert found.max_discard_bytes == found.max_write_zeroes_bytes == 256 * MIB
        made = handlers.make_map(target, found.size)
        (extent,) = made.extents()
        assert isinstance(extent.routing.read, Spaces)
        assert made.stats().nr_spaces == 3
        made.close()
    with pytest.raises(UblkError, match="has no legs to bring back"):
        target.resync(force=False)
    assert target.progress() is None
