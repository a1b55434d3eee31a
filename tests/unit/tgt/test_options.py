"""Options: how values are written, checked and dumped."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ublkpy.tgt.base import Target
from ublkpy.tgt.options import (
    MAX_BYTES,
    Arguments,
    Code,
    Configurable,
    Duration,
    Errno,
    Offset,
    Range,
    Rate,
    Size,
    exact_size,
    format_duration,
    format_size,
    option,
    parse_size,
)


class Disk(Configurable):
    """One option of each kind."""

    size: Size = option("64M", "-s", help="size", minimum=512, maximum=1 << 40, multiple=512)
    start: Offset = option(0, help="start")
    path: Path | None = option(None, help="path")
    quick: bool = option(False, help="quick", off_flags=("--slow",))
    sure: bool | None = option(None, help="sure")
    max_depth: int = option(8, help="depth", minimum=1, maximum=16)
    low: int = option(0, help="low", minimum=-1)
    level: Literal["low", "high"] = option("low", help="level")
    label: str = option(..., "-l", help="label")
    block: Size | None = option(None, help="block", power_of_two=True)
    args: Arguments | None = option(None, help="args")
    program: Code | None = option(None, help="program")
    wait: Duration | None = option(None, help="wait", maximum=10**12)
    share: Rate | None = option(None, help="share")
    where: tuple[Range, ...] | None = option(None, help="where")
    error: Errno | None = option(None, help="error")
    files: tuple[Path, ...] | None = option(None, help="files", minimum=2)
    levels: tuple[Literal["low", "high"], ...] | None = option(None, help="levels")


OPTIONS = Disk.options


# -- sizes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "size"),
    [
        (0, 0),
        (4096, 4096),
        ("4096", 4096),
        (" 4096 ", 4096),
        ("4096B", 4096),
        ("1b", 1),
        ("8s", 4096),
        ("8S", 4096),
        ("64k", 65536),
        ("64K", 65536),
        ("64kB", 65536),
        ("64KiB", 65536),
        ("64 k", 65536),
        ("1M", 1 << 20),
        ("1g", 1 << 30),
        ("1T", 1 << 40),
        ("1P", 1 << 50),
        ("1E", 1 << 60),
        ("7.5e", 15 << 59),
        ("1.5G", 3 << 29),
        ("0.5k", 512),
        ("0.5s", 256),
        ("250G", 268435456000),
    ],
)
def test_size_is_understood(raw: object, size: int) -> None:
    assert parse_size(raw) == size


@pytest.mark.parametrize(
    "raw",
    ["", " ", "k", "x", "-1", -1, "1x", "1kk", "1 2", "1,5G", ".5G", "5.", "1e3", "0x10", None, True, 1.5, [1], "1iB"],
)
def test_what_is_no_size_is_refused(raw: object) -> None:
    with pytest.raises(ValueError, match=r"is not a size such as 4096, 64k or 1G"):
        parse_size(raw)


@pytest.mark.parametrize("raw", ["1.5", "1.5B", "0.3k", "0.001s", "0.3E", "1.0000000000000000001E"])
def test_part_of_a_byte_is_refused(raw: str) -> None:
    with pytest.raises(ValueError, match=f"{raw!r} is not a whole number of bytes"):
        parse_size(raw)


def test_largest_size_is_a_sector_less_than_the_kernel_can_count() -> None:
    assert parse_size("9007199254740991.5K") == parse_size(f"{2**63 - 512}") == MAX_BYTES == 2**63 - 512


@pytest.mark.parametrize(
    "raw", [2**63 - 511, "9223372036854775297", "8E", "8192P", "16E", "18014398509481984s", "1000000E"]
)
@pytest.mark.parametrize("name", ["size", "start"])
def test_size_that_no_device_can_have(name: str, raw: object) -> None:
    with pytest.raises(ValueError, match=f"^{raw} is too large: at most 9223372036854775296 bytes"):
        OPTIONS[name].parse(raw)


@pytest.mark.parametrize("raw", [2**54, "18014398509481984"])
def test_offset_in_sectors_that_no_device_can_have(raw: object) -> None:
    with pytest.raises(ValueError, match=f"^{raw} is too large: "):
        OPTIONS["start"].parse(raw)
    assert OPTIONS["start"].parse(2**54 - 1) == MAX_BYTES


@given(st.integers(0, MAX_BYTES))
def test_size_in_bytes_round_trip(size: int) -> None:
    assert parse_size(size) == parse_size(str(size)) == parse_size(f"{size}B") == size


@given(st.integers(0, 8191), st.sampled_from("sSkKmMgGtTpP"), st.sampled_from(["", " "]))
def test_size_with_a_unit(number: int, unit: str, blank: str) -> None:
    factor = 512 if unit in "sS" else 1024 ** ("kmgtp".index(unit.lower()) + 1)
    assert parse_size(f"{number}{blank}{unit}") == number * factor


@given(st.decimals(0, 8000, places=6, allow_nan=False), st.sampled_from("kMGTP"))
def test_decimal_size_is_exact_or_refused(number: object, unit: str) -> None:
    exact = Fraction(str(number)) * 1024 ** ("kMGTP".index(unit) + 1)
    if exact.denominator == 1:
        assert parse_size(f"{number}{unit}") == exact
    else:
        with pytest.raises(ValueError, match="whole number"):
            parse_size(f"{number}{unit}")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"),
        (1, "1B"),
        (1023, "1023B"),
        (1024, "1K"),
        (1536, "1.5K"),
        (1 << 20, "1M"),
        ((1 << 20) + 512, "1.00M"),
        (10 << 20, "10M"),
        ((10 << 20) - 512, "9.99M"),
        ((10 << 20) + 512, "10.00M"),
        ((1 << 40) - 1, "1023.99G"),
        (1000204886016, "931.51G"),
        (5 << 28, "1.25G"),
        (250 << 30, "250G"),
        (1 << 60, "1E"),
        (2**63 - 512, "7.99E"),
        (1 << 70, "1024E"),
    ],
)
def test_size_for_people(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 1023), st.integers(0, 5))
def test_size_for_people_can_be_read_back(number: int, power: int) -> None:
    size = number * 1024**power
    assert parse_size(format_size(size)) == size
    assert exact_size(size) == format_size(size)


@given(st.integers(0, MAX_BYTES))
def test_size_for_people_is_exact_or_rounded_down_by_less_than_a_percent(size: int) -> None:
    number, unit = format_size(size)[:-1], 1024 ** "BKMGTPE".index(format_size(size)[-1])
    shown = Fraction(number) * unit
    assert shown <= size < shown + Fraction(unit, 100)
    if number[-3:-2] != ".":
        assert shown == size


def test_size_to_compare_by_has_the_bytes_where_it_is_rounded() -> None:
    assert exact_size((10 << 20) - 512) == "9.99M (10485248 bytes)"
    assert (exact_size(10 << 20), exact_size(3 << 29)) == ("10M", "1.5G")


# -- offsets -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "offset"),
    [(0, 0), (8, 4096), ("8", 4096), (" 8 ", 4096), ("8s", 4096), ("4k", 4096), ("1M", 1 << 20), ("512B", 512)],
)
def test_offset_without_a_unit_counts_sectors(raw: object, offset: int) -> None:
    assert OPTIONS["start"].parse(raw) == offset


@pytest.mark.parametrize("raw", ["-1", "x", "", None, True, "1.5"])
def test_what_is_no_offset_is_refused(raw: object) -> None:
    with pytest.raises(ValueError, match=r"is not a (size|whole number)"):
        OPTIONS["start"].parse(raw)


@given(st.integers(0, 1 << 60))
def test_offset_round_trip(offset: int) -> None:
    start = OPTIONS["start"]
    assert start.load(start.kind.dump(offset)) == offset


def test_offset_is_dumped_in_bytes() -> None:
    start = OPTIONS["start"]
    assert start.kind.dump(4096) == start.load(4096) == start.load("4096B") == 4096
    with pytest.raises(ValueError, match="is too large"):
        start.load(2**63)


# -- the other kinds -----------------------------------------------------------------------


@pytest.mark.parametrize("value", [True, False])
def test_bool(value: bool) -> None:
    assert OPTIONS["quick"].parse(value) is value


@pytest.mark.parametrize("raw", ["true", "yes", 1, 0, None, ""])
def test_what_is_no_bool_is_refused(raw: object) -> None:
    with pytest.raises(ValueError, match="neither true nor false"):
        OPTIONS["quick"].parse(raw)


@pytest.mark.parametrize(("raw", "value"), [(3, 3), ("3", 3), (" 3 ", 3), ("+3", 3)])
def test_int(raw: object, value: int) -> None:
    assert OPTIONS["max_depth"].parse(raw) == value


@pytest.mark.parametrize("raw", ["", "x", "3.0", 3.0, True, None, "1k", [3]])
def test_what_is_no_int_is_refused(raw: object) -> None:
    with pytest.raises(ValueError, match="is not a whole number"):
        OPTIONS["max_depth"].parse(raw)


def test_choice() -> None:
    assert OPTIONS["level"].parse("high") == "high"
    assert OPTIONS["level"].kind.choices == ("low", "high")


@pytest.mark.parametrize("raw", ["HIGH", "", "medium", 1, None])
def test_other_choice_is_refused_and_all_are_named(raw: object) -> None:
    with pytest.raises(ValueError, match="low, high"):
        OPTIONS["level"].parse(raw)


def test_text_and_path() -> None:
    assert OPTIONS["label"].parse("a b") == "a b"
    assert OPTIONS["path"].parse("a/b") == Path("a/b")


@pytest.mark.parametrize("name", ["label", "path"])
@pytest.mark.parametrize("raw", ["", None, 5, True])
def test_what_is_no_text_is_refused(name: str, raw: object) -> None:
    with pytest.raises(ValueError, match="is not a text"):
        OPTIONS[name].parse(raw)


def test_a_number_where_a_text_belongs_is_told_to_be_quoted() -> None:
    with pytest.raises(ValueError, match="5 is not a text; put it in quotes"):
        OPTIONS["label"].parse(5)


# -- ranges --------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [1, 16])
def test_bounds_belong_to_the_range(raw: int) -> None:
    assert OPTIONS["max_depth"].parse(raw) == raw


@pytest.mark.parametrize("raw", [0, 17, -1])
def test_out_of_range_names_the_range(raw: int) -> None:
    with pytest.raises(ValueError, match=f"{raw} is out of range: 1 to 16"):
        OPTIONS["max_depth"].parse(raw)


def test_open_range_names_the_minimum() -> None:
    with pytest.raises(ValueError, match="-2 is out of range: -1 or more"):
        OPTIONS["low"].parse(-2)


def test_range_of_a_size_counts_bytes() -> None:
    with pytest.raises(ValueError, match="256B is out of range: 512 to"):
        OPTIONS["size"].parse("256B")


@pytest.mark.parametrize("raw", ["3000", "1536", 1537, "1.5M"])
def test_power_of_two(raw: object) -> None:
    opt = OPTIONS["block"]
    assert opt.parse("64k") == 65536
    with pytest.raises(ValueError, match=f"{raw} is not a power of two"):
        opt.parse(raw)


def test_multiple() -> None:
    assert OPTIONS["size"].parse(1024) == 1024
    with pytest.raises(ValueError, match="1000 is not a multiple of 512"):
        OPTIONS["size"].parse(1000)


# -- declarations --------------------------------------------------------------------------


def test_declared_flags() -> None:
    assert OPTIONS["size"].flags == ("-s",)
    assert OPTIONS["quick"].off_flags == ("--slow",)


def test_long_flags_are_those_of_ublksrv_too() -> None:
    assert OPTIONS["size"].long_flags == ("--size",)
    assert OPTIONS["max_depth"].long_flags == ("--max-depth", "--max_depth")


def test_only_an_option_without_default_is_required() -> None:
    assert [name for name, opt in OPTIONS.items() if opt.required] == ["label"]


def test_defaults_are_parsed() -> None:
    disk = Disk({"label": "x"})
    assert (disk.size, disk.start, disk.path, disk.quick, disk.sure) == (64 << 20, 0, None, False, None)
    assert (disk.max_depth, disk.level, disk.label) == (8, "low", "x")


def test_missing_required_value() -> None:
    with pytest.raises(ValueError, match="label is missing"):
        Disk({})


def test_options_are_inherited_and_not_given_back() -> None:
    class Big(Disk):
        more: int = option(1, help="more")

    assert [*Big.options] == ["more", *Disk.options]
    assert "more" not in Disk.options
    assert Configurable.options == {}


def test_dump_leaves_out_what_is_not_set() -> None:
    assert Disk({"label": "x"}).dump() == {
        "size": 64 << 20,
        "start": 0,
        "quick": False,
        "max_depth": 8,
        "low": 0,
        "level": "low",
        "label": "x",
    }


@given(
    size=st.integers(1, 1 << 31).map(lambda n: n * 512),
    start=st.integers(0, 1 << 50),
    path=st.none() | st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).map(Path),
    quick=st.booleans(),
    sure=st.none() | st.booleans(),
    max_depth=st.integers(1, 16),
    low=st.integers(-1),
    level=st.sampled_from(["low", "high"]),
    label=st.text(min_size=1),
    wait=st.none() | st.integers(0, 10**12),
    share=st.none() | st.floats(0, 1),
    where=st.none() | st.lists(st.integers(0, 1 << 60).map(lambda n: Range(n, 2 * n + 1))).map(tuple),
    error=st.none() | st.integers(1, 4095),
    files=st.none() | st.lists(st.sampled_from(["/a", "/b"]).map(Path), min_size=2).map(tuple),
)
def test_dump_round_trip(**values: object) -> None:
    disk = Disk(values)
    again = Disk({name: OPTIONS[name].load(raw) for name, raw in disk.dump().items()})
    assert vars(again) == vars(disk)


# -- times and shares ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "nanoseconds"),
    [("100us", 100_000), ("2ms", 2_000_000), ("1.5s", 1_500_000_000), (3, 3 * 10**9), ("0", 0), (0.5, 5 * 10**8)],
)
def test_time(raw: object, nanoseconds: int) -> None:
    assert OPTIONS["wait"].parse(raw) == nanoseconds


@pytest.mark.parametrize("raw", ["", "ms", "1m", "-1s", "1 h", None, True, [1], "1e3", "nan"])
def test_what_is_no_time(raw: object) -> None:
    with pytest.raises(ValueError, match=r"is not a time such as 100us, 2ms or 1\.5s"):
        OPTIONS["wait"].parse(raw)


@pytest.mark.parametrize(("raw", "shown"), [("1000s", ""), ("1000.1s", "1000s or less")])
def test_times_have_bounds_as_people_write_them(raw: str, shown: str) -> None:
    if not shown:
        assert OPTIONS["wait"].parse(raw) == 10**12
        return
    with pytest.raises(ValueError, match=f"{raw} is out of range: {shown}"):
        OPTIONS["wait"].parse(raw)


@pytest.mark.parametrize(
    ("duration", "text"),
    [(0, "0ns"), (20, "20ns"), (1500, "1.5us"), (2_000_000, "2ms"), (1_500_000_000, "1.5s"), (3600 * 10**9, "3600s")],
)
def test_time_for_people(duration: int, text: str) -> None:
    assert format_duration(duration) == text


@pytest.mark.parametrize(
    ("raw", "start", "end"),
    [
        ("1M-2M", 1 << 20, 2 << 20),
        ("1M+64k", 1 << 20, 17 << 16),
        (" 0 - 512 ", 0, 512),
        ("0+1s", 0, 512),
        ("8-4k", 8, 4096),
    ],
)
def test_range(raw: str, start: int, end: int) -> None:
    where = OPTIONS["where"]
    assert where.parse([raw]) == (Range(start, end),)
    assert where.parse([raw])[0].length == end - start
    assert where.load(where.dump(where.parse([raw]))) == (Range(start, end),)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        ("1M", "'1M' is not a range such as 1M-2M or 1M[+]64k"),
        ("1M-2M-3M", "is not a range"),
        (4096, "4096 is not a range"),
        ("", "is not a range"),
        ("-1", "is not a range"),
        ("1M-x", "'x' is not a size"),
        ("2M-1M", "has no bytes in it"),
        ("2M-2M", "has no bytes in it"),
        ("2M+0", "has no bytes in it"),
        ("7E+7E", "is too large"),
    ],
)
def test_what_is_no_range(raw: object, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        OPTIONS["where"].parse([raw])


@pytest.mark.parametrize(
    ("raw", "number"),
    [("ENOSPC", 28), ("enospc", 28), (" EIO ", 5), ("EOPNOTSUPP", 95), (28, 28), ("28", 28), (4095, 4095)],
)
def test_errno(raw: object, number: int) -> None:
    error = OPTIONS["error"]
    assert error.parse(raw) == number
    assert error.load(error.dump(number)) == number


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        ("ENOSPACE", "there is no errno ENOSPACE: did you mean ENOSPC[?]"),
        ("full", "'full' is no errno: a name such as ENOSPC, or a number from 1 to 4095"),
        (0, "0 is no errno"),
        (-28, "-28 is no errno"),
        (4096, "4096 is no errno"),
        (True, "True is no errno"),
        (None, "None is no errno"),
    ],
)
def test_what_is_no_errno(raw: object, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        OPTIONS["error"].parse(raw)


@pytest.mark.parametrize(
    ("raw", "share"), [("10%", 0.1), (0.1, 0.1), ("0.5", 0.5), (1, 1.0), ("0", 0.0), ("1e-3", 0.001)]
)
def test_share(raw: object, share: float) -> None:
    assert OPTIONS["share"].parse(raw) == share


@pytest.mark.parametrize("raw", ["", "%", "101%", 1.1, -0.1, "-1%", None, True, "nan", "inf", []])
def test_what_is_no_share(raw: object) -> None:
    with pytest.raises(ValueError, match=r"is not a share such as 0\.1 or 10%"):
        OPTIONS["share"].parse(raw)


# -- lists ---------------------------------------------------------------------------------


def test_several_of_a_kind() -> None:
    disk = Disk({"label": "x", "files": OPTIONS["files"].parse(["a", "b"]), "levels": OPTIONS["levels"].parse(["low"])})
    assert disk.files == (Path("a"), Path("b"))
    assert disk.levels == ("low",)
    assert disk.dump()["files"] == ["a", "b"]


def test_each_of_several_is_checked() -> None:
    with pytest.raises(ValueError, match="'mid' is not one of: low, high"):
        OPTIONS["levels"].parse(["low", "mid"])


@pytest.mark.parametrize("raw", [[], ["a"]])
def test_too_few(raw: object) -> None:
    with pytest.raises(ValueError, match=r"files are [01], and have to be 2 or more"):
        OPTIONS["files"].parse(raw)


def test_arguments_are_kept_in_their_order() -> None:
    disk = Disk({"label": "x", "args": OPTIONS["args"].parse(["size=1M", "file=a=b c", "file="])})
    assert disk.args == ("size=1M", "file=a=b c", "file=")
    assert disk.dump()["args"] == ["size=1M", "file=a=b c", "file="]
    assert OPTIONS["args"].load(disk.dump()["args"]) == disk.args


@pytest.mark.parametrize("raw", ["size", "=1", "1a=2", "", 3, None, ["a=b"]])
def test_what_is_no_argument(raw: object) -> None:
    with pytest.raises(ValueError, match=r"is not of the form key=value"):
        OPTIONS["args"].parse([raw])


@pytest.mark.parametrize("raw", ["a=b", 3, None, {"a": "b"}])
def test_what_is_no_list(raw: object) -> None:
    with pytest.raises(ValueError, match=r"is not a list, such as \[key=value\]"):
        OPTIONS["args"].parse(raw)


def test_a_program_is_a_path() -> None:
    assert OPTIONS["program"].parse("/bin/x.py") == Path("/bin/x.py")


# -- mistakes in a class -------------------------------------------------------------------


def test_values_for_options_that_there_are_not() -> None:
    with pytest.raises(ValueError, match="sise is no option of Disk; it has size, "):
        Disk({"label": "x", "sise": 8})


@pytest.mark.parametrize("name", ["read", "name", "options", "disk"])
def test_an_option_that_would_hide_something(name: str) -> None:
    with pytest.raises(TypeError, match=f"option {name} of Hiding would hide what else is called {name}: rename it"):
        type("Hiding", (Target,), {"__annotations__": {name: "int"}, name: option(1, help="of no use")})


def test_an_option_again() -> None:
    class Small(Disk):
        size: Size = option("1M", help="a smaller one")

    assert Small.options["size"].default == "1M"


def test_an_option_without_a_type() -> None:
    with pytest.raises(TypeError, match="option size of Untyped needs a type, as in size: Size = option"):
        type("Untyped", (Configurable,), {"size": option("64M", help="size")})


@pytest.mark.parametrize("kind", [list, float, dict[str, int]])
def test_a_type_that_options_do_not_have(kind: object) -> None:
    with pytest.raises(TypeError, match=r"option ratio: .* is no type of options, which are Size, "):
        type("Odd", (Configurable,), {"ratio": option("1", help="ratio"), "__annotations__": {"ratio": kind}})
