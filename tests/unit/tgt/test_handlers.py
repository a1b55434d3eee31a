"""What a target says of its disk, and what is said of it if that cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.device.targets import Ram
from ublkpy.config import DeviceConfig, DeviceOptions
from ublkpy.errors import UblkError
from ublkpy.tgt import handlers
from ublkpy.tgt.base import MAX_DISCARD_BYTES, Geometry, Target
from ublkpy.tgt.null import NullTarget

GOOD = Geometry(1 << 20)


class Number:
    """As those of numpy: an index, and no int."""

    def __index__(self) -> int:
        return 1 << 20


@pytest.mark.parametrize("target", [Ram, NullTarget], ids=["methods", "map"])
@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("size", 1e9, "it is a whole number of bytes, an int"),
        ("size", None, "it is a whole number of bytes, an int"),
        ("size", 0, "it is more than 0 bytes, and less than 8 EiB"),
        ("size", -512, "it is more than 0 bytes, and less than 8 EiB"),
        ("size", 1 << 63, "it is more than 0 bytes, and less than 8 EiB"),
        ("size", 1000, "it is a multiple of logical_block, 512, such as 512 or 1024"),
        ("size", 100, "it is a multiple of logical_block, 512, such as 512"),
        ("logical_block", 0, "it is 512, 1024, 2048 or 4096 bytes"),
        ("logical_block", 8192, "it is 512, 1024, 2048 or 4096 bytes"),
        ("logical_block", 520, "it is 512, 1024, 2048 or 4096 bytes"),
        ("physical_block", 3000, "it is a power of two, 512 or more"),
        ("io_min", 0, "it is a power of two, 512 or more"),
        ("io_opt", 96 << 10, "it is a power of two, 512 or more"),
        ("io_opt", "64k", "it is a whole number of bytes, an int"),
        ("discard_granularity", -1, f"it is 0 to {MAX_DISCARD_BYTES} bytes"),
        ("max_discard_bytes", 1 << 32, f"it is 0 to {MAX_DISCARD_BYTES} bytes"),
        ("max_write_zeroes_bytes", 1 << 40, f"it is 0 to {MAX_DISCARD_BYTES} bytes"),
    ],
)
def test_no_disk_is_like_that(target: type[Target], name: str, value: object, rule: str) -> None:
    made = target()
    with pytest.raises(UblkError) as caught:
        handlers.fit(made, replace(GOOD, **{name: value}))  # type: ignore[arg-type]
    assert caught.value.message == f"target {made.name} opened with a Geometry of {name} {value!r}"
    assert caught.value.hint == rule


def test_numbers_of_others() -> None:
    found = handlers.fit(Ram(), replace(GOOD, size=Number()))  # type: ignore[arg-type]
    assert json.dumps(found.size) == "1048576"


def test_what_is_no_geometry_is_closed_again() -> None:
    class Wrong(Ram):
        closed = 0

        def open(self) -> Geometry:
            return 1 << 20  # type: ignore[return-value]

        def close(self) -> None:
            self.closed += 1

    class Large(Wrong):
        def open(self) -> Geometry:
            return Geometry(1 << 63)

    for cls, said in ((Wrong, "open() of target wrong returned 1048576"), (Large, "of size 9223372036854775808")):
        target = cls()
        with pytest.raises(UblkError) as caught:
            DeviceConfig(DeviceOptions(), target).open()
        assert said in caught.value.message + caught.value.hint
        assert target.closed == 1


@pytest.mark.parametrize(
    ("name", "beside"), [("write_buffer", "write"), ("write_fua", "write"), ("punch_hole", "write_zeroes")]
)
def test_what_is_never_called(name: str, beside: str) -> None:
    class Half(Ram):
        def methods(self) -> frozenset[str]:
            return super().methods() - {beside} | {name}

    with pytest.raises(UblkError, match=f"target half has {name}, which is never called without {beside}"):
        handlers.fit(Half(), GOOD)


@pytest.mark.parametrize(
    ("name", "made", "rule"),
    [
        ("read", lambda self, offset: None, "def read(self, offset, buf)"),
        ("read", staticmethod(lambda offset, buf: None), None),
        ("write", lambda offset, buf: None, "def write(self, offset, buf)"),
        ("flush", lambda self, offset: None, "def flush(self)"),
        ("discard", lambda self, offset, length, flags: None, "def discard(self, offset, length)"),
        ("discard", lambda self, offset, length, flags=0: None, None),
    ],
)
def test_methods_that_cannot_be_called(name: str, made: object, rule: str | None) -> None:
    target = type("Odd", (Ram,), {name: made, "__doc__": "A disk."})()
    if rule is None:
        handlers.fit(target, GOOD)
        return
    with pytest.raises(UblkError, match=rf"^{name}\(\) of target odd cannot be called: ") as caught:
        handlers.fit(target, GOOD)
    assert caught.value.hint == rule


@pytest.mark.logs
def test_misspelt_methods_are_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    class Typo(Target):
        """A disk."""

        def open(self) -> Geometry:
            return GOOD

        def read(self, offset: int, buf: memoryview) -> None:
            """Nothing."""

        def reads(self) -> None:
            """One of its own, and there is a read."""

        def wirte(self, offset: int, buf: memoryview) -> None:
            """Nothing."""

    assert handlers.fit(Typo(), GOOD).read_only
    assert [record.message for record in caplog.records] == [
        "target typo has no write(); is its wirte() meant to be that?"
    ]


@pytest.mark.parametrize("name", ["map", "backing", "status"])
def test_what_goes_wrong_in_any_method_is_the_targets(name: str) -> None:
    class Failing(NullTarget):
        pass

    def fail(*_args: object) -> object:
        raise KeyError("not there")

    setattr(Failing, name, fail)
    target = Failing()
    calls: dict[str, Callable[[], object]] = {
        "map": lambda: handlers.make_map(target, 1 << 20),
        "backing": lambda: handlers.backing(target),
        "status": lambda: handlers.status(target),
    }
    with pytest.raises(UblkError, match=rf"^target failing failed in {name}\(\)$") as caught:
        calls[name]()
    assert "KeyError: 'not there'" in caught.value.hint
    assert "/handlers.py" not in caught.value.hint


def test_a_status_that_is_not_for_json() -> None:
    class Odd(NullTarget):
        def status(self) -> dict[str, object]:
            return {"data": b"1"}

    with pytest.raises(UblkError, match=r"failed in status\(\)$") as caught:
        handlers.status(Odd())
    assert "bytes is not JSON serializable" in caught.value.hint


@pytest.mark.parametrize("name", ["start", "stop"])
def test_async_without_a_loop(name: str) -> None:
    class Mapped(NullTarget):
        pass

    async def wait(_self: Target) -> None: ...

    setattr(Mapped, name, wait)
    with pytest.raises(UblkError, match=rf"^{name}\(\) of target mapped is async, and nobody would run it") as caught:
        handlers.fit(Mapped(), GOOD)
    assert caught.value.hint == f"def {name}(self)"
