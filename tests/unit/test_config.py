"""Configuration: YAML files and their mistakes, and what wins over what."""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ublkpy import tgt
from ublkpy.config import DeviceConfig, DeviceOptions, Draft, build, from_dump, read_yaml
from ublkpy.errors import ConfigError, UblkError
from ublkpy.tgt.loop import LoopTarget
from ublkpy.tgt.null import NullTarget
from ublkpy.uring.mode import MODES

Write = Callable[[str], Path]
TARGETS = ", ".join(tgt.names())


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a YAML file."""

    def write(text: str) -> Path:
        path = tmp_path / "disk.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def mistakes(path: Path) -> list[str]:
    """What is wrong with a file, without its name: "line: key: what", and the lines shown."""
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    return caught.value.message.replace(f"{path}:", "").splitlines()


# -- what is right -------------------------------------------------------------------------


def test_smallest_file(write: Write) -> None:
    draft = read_yaml(write("target: {type: loop, file: /a}"))
    assert (draft.target_type, draft.target, draft.device) == ("loop", {"file": Path("/a")}, {})


def test_every_key_of_a_device(write: Write) -> None:
    text = "id: 5\nqueues: 2\ndepth: 64\nmax_io_buf_bytes: 1M\nrecovery: reissue\nlog: /l\n"
    path = write(text + "target: {type: 'null', size: 1G}")
    config = build(Draft(), read_yaml(path))
    device = config.device
    assert (device.id, device.queues, device.depth, device.max_io_buf_bytes) == (5, 2, 64, 1 << 20)
    assert (device.recovery, device.log) == ("reissue", Path("/l"))
    assert isinstance(config.target, NullTarget)
    assert config.target.size == 1 << 30


def test_defaults_of_a_device() -> None:
    assert DeviceOptions().dump() == {
        "id": -1,
        "queues": 1,
        "depth": 128,
        "threads_per_queue": 1,
        "max_io_buf_bytes": 512 << 10,
        "io_desc_size": 24,
        "mode": "auto",
        "recovery": "none",
        "supervise": False,
        "unprivileged": False,
        "shmem_zc": False,
        "rdonly_shmem_buf": False,
        "read_only": False,
    }


@pytest.mark.parametrize("null", ["null", "Null", "NULL", "~", "'null'", '"null"'])
def test_null_is_the_target_of_that_name(write: Write, null: str) -> None:
    assert read_yaml(write(f"target: {{type: {null}}}")).target_type == "null"


@pytest.mark.parametrize(
    ("offset", "parsed"), [("8", 4096), ("1M", 1 << 20), ("8s", 4096), ("512B", 512)], ids=["bare", "M", "s", "B"]
)
def test_offset_in_a_file(write: Write, offset: str, parsed: int) -> None:
    draft = read_yaml(write(f"target: {{type: loop, file: /a, offset: {offset}}}"))
    assert draft.target["offset"] == parsed


@pytest.mark.parametrize(
    ("word", "value"), [("true", True), ("yes", True), ("on", True), ("no", False), ("off", False)]
)
def test_yes_and_no(write: Write, word: str, value: bool) -> None:
    draft = read_yaml(write(f"target: {{type: loop, file: /a, direct: {word}}}"))
    assert draft.target["direct"] is value


def test_anchors_and_aliases(write: Write) -> None:
    draft = read_yaml(write("queues: &n 4\ndepth: *n\ntarget: {type: null}"))
    assert draft.device == {"queues": 4, "depth": 4}


def test_relative_path_counts_from_the_folder_of_the_file(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("log: x.log\ntarget: {type: loop, file: ../a/./disk.img}")
    monkeypatch.chdir("/")
    draft = read_yaml(tmp_path / "disk.yaml")
    assert draft.target["file"] == tmp_path.parent / "a" / "disk.img"
    assert draft.device["log"] == tmp_path / "x.log"


def test_path_in_the_home_folder(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    draft = read_yaml(write("log: ~/x.log\ntarget: {type: loop, file: ~root/disk.img}"))
    assert draft.device["log"] == Path("/home/me/x.log")
    assert draft.target["file"] == Path(pwd.getpwnam("root").pw_dir, "disk.img")


@pytest.mark.parametrize("name", ["./~/x", "a~", "a/~/b", "~no such user/x"])
def test_other_tildes_are_letters(write: Write, tmp_path: Path, name: str) -> None:
    draft = read_yaml(write(f"target: {{type: loop, file: '{name}'}}"))
    assert draft.target["file"] == tmp_path / name


def test_relative_name_of_the_file_itself(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("target: {type: loop, file: disk.img}")
    monkeypatch.chdir(tmp_path)
    assert read_yaml(Path("disk.yaml")).target["file"] == tmp_path / "disk.img"


def test_file_with_a_byte_order_mark_and_crlf(tmp_path: Path) -> None:
    path = tmp_path / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbfdepth: 4\r\ntarget:\r\n  type: null\r\n")
    assert read_yaml(path).device == {"depth": 4}


def test_names_beyond_ascii(write: Write) -> None:
    assert read_yaml(write("target: {type: loop, file: /Bücher/磁盘.img}")).target["file"] == Path("/Bücher/磁盘.img")


# -- mistakes: exactly what is said --------------------------------------------------------


def test_unknown_key(write: Write) -> None:
    assert mistakes(write("dept: 64\ntarget: {type: null}")) == [
        "1: dept: unknown key; did you mean depth?",
        "    dept: 64",
    ]


def test_unknown_key_that_is_like_no_other_lists_them_all(write: Write) -> None:
    assert mistakes(write("zzz: 1\ntarget: {type: null}"))[0] == (
        f"1: zzz: unknown key; known here: {', '.join(DeviceOptions.options)}, target"
    )


def test_unknown_key_of_a_target(write: Write) -> None:
    assert mistakes(write("target:\n  type: null\n  sise: 1G\n")) == [
        "3: target.sise: unknown key; did you mean size?",
        "      sise: 1G",
    ]


def test_key_of_the_device_in_the_target(write: Write) -> None:
    assert mistakes(write("target:\n  type: null\n  read_only: true\n"))[0] == (
        "3: target.read_only: unknown key; it belongs to the device: write it beside target, not into it"
    )


def test_mistyped_target_key(write: Write) -> None:
    assert mistakes(write("traget: {type: null}")) == [
        "1: traget: unknown key; did you mean target?",
        "    traget: {type: null}",
        "1: target is missing: say, for example, target: {type: null}",
        "    traget: {type: null}",
    ]


def test_duplicate_key(write: Write) -> None:
    assert mistakes(write("depth: 3\ntarget: {type: null, size: 1G, size: 2G}\ndepth: 4")) == [
        "2: target.size: given twice",
        "    target: {type: null, size: 1G, size: 2G}",
        "3: depth: given twice",
        "    depth: 4",
    ]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("depth: 0", "depth: '0' is out of range: 1 to 4096"),
        ("depth: 4097", "depth: '4097' is out of range: 1 to 4096"),
        ("depth: x", "depth: 'x' is not a whole number"),
        ("depth: 1.5", "depth: '1.5' is not a whole number"),
        ("queues: 0", "queues: '0' is out of range: 1 to 4096"),
        ("queues: 4097", "queues: '4097' is out of range: 1 to 4096"),
        ("id: -2", "id: '-2' is out of range: -1 to 1048575"),
        ("io_desc_size: 28", "io_desc_size: '28' is not a multiple of 8"),
        ("max_io_buf_bytes: 6000", "max_io_buf_bytes: '6000' is not a multiple of 4096"),
        ("max_io_buf_bytes: 5q", "max_io_buf_bytes: '5q' is not a size such as 4096, 64k or 1G"),
        ("max_io_buf_bytes: 64M", "max_io_buf_bytes: 64M is out of range: 4096 to 33554432"),
        ("log: 5", "log: '5' is not a text; put it in quotes"),
        ("queues: [1]", "queues: expected a single value here"),
        ("queues: {a: 1}", "queues: expected a single value here"),
    ],
)
def test_wrong_value(write: Write, line: str, what: str) -> None:
    assert mistakes(write(f"target: {{type: null}}\n{line}")) == [f"2: {what}", f"    {line}"]


@pytest.mark.parametrize("line", ["recovery: often", "recovery: yes", "recovery: 5", "recovery: None"])
def test_wrong_choice_names_what_was_written_and_what_may_be(write: Write, line: str) -> None:
    first, second = mistakes(write(f"target: {{type: null}}\n{line}"))
    assert first.startswith("2: recovery: ")
    assert "none, queue, reissue, fail" in first
    assert repr(line.split()[1]) in first
    assert second == f"    {line}"


@pytest.mark.parametrize("line", ["log:", "depth: ", "recovery: ~", "max_io_buf_bytes: null"])
def test_key_without_a_value(write: Write, line: str) -> None:
    first = mistakes(write(f"target: {{type: null}}\n{line}"))[0]
    assert first.startswith(f"2: {line.split(':')[0]}: ")
    assert "None" not in first


@pytest.mark.parametrize("raw", ["2026-01-01", "!!binary aGk=", "2026-01-01 10:00:00"])
def test_python_stays_out_of_messages(write: Write, raw: str) -> None:
    text = mistakes(write(f"target: {{type: null, size: {raw}}}"))[0]
    assert text.startswith("1: target.size: ")
    assert "datetime" not in text
    assert "b'" not in text


@pytest.mark.parametrize(
    "value",
    ['!!int ""', '!!float ""', "!!int abc", "!!bool maybe", "!!timestamp x", "!!python/object:a.b c", "!mine 5"],
)
def test_tag_that_does_not_fit(write: Write, value: str) -> None:
    lines = mistakes(write(f"id: {value}\ntarget: {{type: null}}"))
    assert lines[0].startswith("1: id: ")
    assert lines[1] == f"    id: {value}"


def test_several_mistakes_are_all_listed_by_line(write: Write) -> None:
    text = "target:\n  type: loop\n  fiel: a\n  size: 1X\ndept: 3\ndepth: 0\n"
    found = [line for line in mistakes(write(text)) if not line.startswith("    ")]
    assert found == [
        "3: target.fiel: unknown key; did you mean file?",
        "4: target.size: '1X' is not a size such as 4096, 64k or 1G",
        "5: dept: unknown key; did you mean depth?",
        "6: depth: '0' is out of range: 1 to 4096",
    ]


@pytest.mark.parametrize("path", ["/a\\0b", "~a\\0b", "~/\\0"])
def test_path_that_the_kernel_could_not_read(write: Write, path: str) -> None:
    first = mistakes(write(f'log: "{path}"\ntarget: {{type: null}}'))[0]
    assert first.startswith("1: log: ")
    assert "null byte" in first


def test_size_that_no_device_can_have(write: Write) -> None:
    assert mistakes(write("target:\n  type: null\n  size: 16E")) == [
        "3: target.size: 16E is too large: at most 9223372036854775296 bytes, one sector less than 8E",
        "      size: 16E",
    ]


# -- mistakes: targets ---------------------------------------------------------------------


def test_no_target(write: Write) -> None:
    assert mistakes(write("depth: 3")) == [
        "1: target is missing: say, for example, target: {type: null}",
        "    depth: 3",
    ]


def test_target_without_type(write: Write) -> None:
    assert mistakes(write("target:\n  size: 1G")) == [
        f"2: target: type is missing: one of {TARGETS}",
        "      size: 1G",
    ]


def test_type_without_a_value_is_not_the_null_target(write: Write) -> None:
    assert mistakes(write("target:\n  type:\n"))[0] == f"2: target.type: has no value: one of {TARGETS}"


def test_unknown_target(write: Write) -> None:
    assert mistakes(write("target: {type: lop}"))[0] == "1: target.type: there is no target 'lop'; did you mean loop?"
    assert mistakes(write("target: {type: qcow3}"))[0] == (
        f"1: target.type: there is no target 'qcow3'; targets are: {TARGETS}; or ./FILE.py"
    )


@pytest.mark.parametrize("value", ["5", "true", "1.5"])
def test_type_that_is_no_name(write: Write, value: str) -> None:
    assert mistakes(write(f"target: {{type: {value}}}"))[0].startswith("1: target.type: ")


@pytest.mark.parametrize("value", ["[loop]", "{a: b}"])
def test_type_that_is_no_scalar(write: Write, value: str) -> None:
    assert mistakes(write(f"target: {{type: {value}}}"))[0] == "1: target.type: expected a single value here"


@pytest.mark.parametrize("value", ["loop", "null", "5", "[loop]", ""])
def test_target_that_is_no_mapping(write: Write, value: str) -> None:
    assert mistakes(write(f"target: {value}"))[0] == "1: target: expected keys and values here, such as type: loop"


def test_missing_required_option_names_the_place(write: Write) -> None:
    path = write("target:\n  type: loop\n")
    with pytest.raises(ConfigError) as caught:
        build(Draft(), read_yaml(path))
    assert caught.value.message == (
        f"{path}:2: target: no file given: target loop needs -f or --file, backing file or block device"
    )
    assert caught.value.hint == "ublk help -t loop"


def test_required_option_may_come_from_the_command_line(write: Write) -> None:
    config = build(Draft(target={"file": Path("/a")}), read_yaml(write("target: {type: loop}")))
    assert config.target.backing() == "/a"


# -- mistakes: not the YAML that is expected -----------------------------------------------


@pytest.mark.parametrize("text", ["hello", "- a", "5"])
def test_root_that_is_no_mapping(write: Write, text: str) -> None:
    assert mistakes(write(text))[0].startswith("1: expected keys and values here")


def test_key_that_is_no_word(write: Write) -> None:
    assert mistakes(write("target: {type: null}\n? [a]\n: 1"))[0] == "2: a key must be a plain word"


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n"])
def test_empty_file(write: Write, text: str) -> None:
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert caught.value.message == f"{path} is empty"
    assert "conf/" in caught.value.hint


def test_tab(write: Write) -> None:
    assert mistakes(write("target:\n\ttype: null\n")) == [
        "2: while scanning for the next token, found character '\\t' that cannot start any token",
        "    \ttype: null",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("depth: 3: 4", 1),
        ("depth: *x", 1),
        ("a: [1", 1),
        ("depth: 1\ntarget: {type: null", 2),
        ("depth: 1\nlog: 'x", 2),
    ],
)
def test_broken_yaml_names_the_line(write: Write, text: str, line: int) -> None:
    found = mistakes(write(text))
    assert int(found[0].split(":")[0]) in (line, line + 1)
    assert len(found) <= 2


def test_two_documents(write: Write) -> None:
    found = mistakes(write("target: {type: null}\n---\ntarget: {type: null}\n"))
    assert found[0].startswith("2: ")
    assert "document" in found[0]
    assert not found[0].startswith("2: but")


def test_control_character_is_named_with_its_line(write: Write) -> None:
    found = mistakes(write("depth: 3\nlog: a\x01b\n"))
    assert found[0].startswith("2: ")
    assert "<unicode string>" not in "".join(found)


def test_binary_file(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert "<unicode string>" not in caught.value.message
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("text", ["[" * 5000, "target: " + "{a: " * 3000, "- " * 5000], ids=["lists", "maps", "blocks"])
def test_nesting_without_end(write: Write, text: str) -> None:
    with pytest.raises(ConfigError):
        read_yaml(write(text))


def test_alias_to_itself(write: Write) -> None:
    assert mistakes(write("target: &a {type: *a}"))[0].startswith("1: ")


def test_merge_key_is_not_supported(write: Write) -> None:
    assert any("<<" in line for line in mistakes(write("target: &a {type: null}\n<<: *a\n")))


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin1.yaml"
    path.write_bytes("log: Bücher\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin1\.yaml is not a text in UTF-8: .* byte 6"):
        read_yaml(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*/no\.yaml: No such file or directory"):
        read_yaml(tmp_path / "no.yaml")


def test_folder_instead_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*: Is a directory"):
        read_yaml(tmp_path)


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError):
        read_yaml(path)


_SCALARS = st.sampled_from(["null", "loop", "5", "1G", "'x'", "[1]", "{a: 1}", "", "~", "yes", "!!int x", "*a", "&a 3"])
_KEYS = st.sampled_from(["id", "depth", "queues", "log", "recovery", "target", "type", "size", "file", "<<", "x"])


@given(
    st.dictionaries(_KEYS, _SCALARS, max_size=4),
    st.dictionaries(_KEYS, _SCALARS, max_size=4),
)
def test_any_keys_and_values_give_a_configuration_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, device: dict[str, str], target: dict[str, str]
) -> None:
    lines = [f"{key}: {value}" for key, value in device.items()]
    lines += ["target:", *(f"  {key}: {value}" for key, value in target.items())]
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text("\n".join(lines))
    message = ""
    try:
        found = build(Draft(), read_yaml(path)).target.name
    except ConfigError as e:
        found, message = "", e.message
    assert found in ("null", "loop") or message


# -- one configuration from two sources ----------------------------------------------------


def test_command_line_wins_over_the_file() -> None:
    said = Draft({"depth": 4}, None, {"size": 1 << 20})
    file = Draft({"depth": 8, "queues": 2}, "null", {"size": 1 << 30})
    config = build(said, file)
    assert (config.device.depth, config.device.queues) == (4, 2)
    assert isinstance(config.target, NullTarget)
    assert config.target.size == 1 << 20


def test_default_is_used_when_nobody_says_anything() -> None:
    assert build(Draft(target_type="null")).dump() == {
        "device": DeviceOptions().dump(),
        "target": {"type": "null", "size": 250 << 30},
    }


def test_same_target_on_the_command_line_and_in_the_file() -> None:
    assert build(Draft(target_type="null"), Draft(target_type="null")).target.name == "null"


def test_other_target_than_the_file() -> None:
    with pytest.raises(ConfigError) as caught:
        build(Draft(target_type="null"), Draft(target_type="loop", target={"file": Path("/a")}))
    assert caught.value.message == "the file is for a loop target, not null"
    assert caught.value.hint


def test_no_target_anywhere() -> None:
    with pytest.raises(ConfigError, match="no target given") as caught:
        build(Draft())
    assert TARGETS in caught.value.hint


def test_required_option_that_nobody_gave() -> None:
    with pytest.raises(ConfigError, match=r"^no file given: target loop needs -f or --file") as caught:
        build(Draft(target_type="loop"))
    assert caught.value.hint == "ublk help -t loop"


def test_more_threads_than_requests() -> None:
    with pytest.raises(ConfigError, match=r"^9 threads per queue need a depth of 9 or more, not 8") as caught:
        build(Draft({"threads_per_queue": 9}), Draft({"depth": 8}, "null"))
    assert caught.value.hint == "lower threads_per_queue, or raise the depth"
    assert build(Draft({"threads_per_queue": 8}), Draft({"depth": 8}, "null")).device.threads_per_queue == 8


# -- state file ----------------------------------------------------------------------------

_SIZE = st.integers(1, 1 << 40).map(lambda n: n * 512)
_DEVICES = st.builds(
    lambda **values: DeviceOptions(values),
    id=st.integers(-1, 2**20 - 1),
    queues=st.integers(1, 4096),
    depth=st.integers(1, 4096),
    max_io_buf_bytes=st.integers(1, 8192).map(lambda n: n * 4096),
    recovery=st.sampled_from(["none", "queue", "reissue", "fail"]),
    log=st.none() | st.just(Path("/var/log/x")),
    read_only=st.booleans(),
    write_cache=st.none() | st.just(False),
    rotational=st.none() | st.booleans(),
    physical_block_size=st.none() | st.integers(9, 28).map(lambda shift: 1 << shift),
)
_NULLS = st.builds(lambda **values: NullTarget(values), size=_SIZE)
_LOOPS = st.builds(
    lambda **values: LoopTarget(values),
    file=st.sampled_from([Path("/a"), Path("/a b/ü")]),
    offset=_SIZE,
    size=st.none() | _SIZE,
    direct=st.none() | st.booleans(),
)


def test_offset_is_dumped_in_bytes_and_one_in_text_is_taken_back() -> None:
    dump = DeviceConfig(DeviceOptions(), LoopTarget({"file": Path("/a"), "offset": 4096})).dump()
    assert dump["target"]["offset"] == 4096
    for offset in (4096, "4096B"):
        target = from_dump({**dump, "target": {**dump["target"], "offset": offset}}).target
        assert isinstance(target, LoopTarget)
        assert target.offset == 4096


@given(st.builds(DeviceConfig, _DEVICES, _NULLS | _LOOPS))
def test_dump_round_trip(config: DeviceConfig) -> None:
    again = from_dump(config.dump())
    assert vars(again.device) == vars(config.device)
    assert vars(again.target) | {"disk": None} == vars(config.target) | {"disk": None}
    assert again.target.disk is again.device
    assert again.dump() == config.dump()


# -- shared memory -------------------------------------------------------------------------


def test_shared_memory(write: Write) -> None:
    path = write("shmem_zc: true\nhtlb: huge\nrdonly_shmem_buf: true\ntarget: {type: 'null'}\n")
    device = build(Draft(), read_yaml(path)).device
    assert (device.shmem_zc, device.htlb, device.rdonly_shmem_buf) == (True, path.parent / "huge", True)


@pytest.mark.parametrize("name", ["htlb", "rdonly_shmem_buf"])
def test_what_is_only_about_shared_memory(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is about shared memory, which is off"):
        build(Draft(device={name: Path("/huge")}, target_type="null"))


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("logical_block_size: 3000", "'3000' is not a power of two"),
        ("logical_block_size: 8k", "8k is out of range: 512 to 4096"),
        ("logical_block_size: 256", "'256' is out of range: 512 to 4096"),
        ("physical_block_size: 512M", "512M is out of range: 512 to 268435456"),
        ("io_min: 0", "'0' is out of range: 512 to 268435456"),
        ("io_opt: 1.5M", "1.5M is not a power of two"),
        ("discard_granularity: 0", "'0' is out of range: 512 to 268435456"),
        ("max_discard_bytes: 1000", "'1000' is not a multiple of 512"),
        ("max_write_zeroes_bytes: -1", "'-1' is not a size such as 4096, 64k or 1G"),
        ("max_sectors: 0", "'0' is out of range: 8 to 65536"),
        ("max_sectors: 20", "'20' is not a multiple of 8"),
        ("part_scan: 1", "'1' is neither true nor false"),
        ("write_cache: auto", "'auto' is neither true nor false"),
        ("rotational: 7200", "'7200' is neither true nor false"),
    ],
)
def test_property_that_no_disk_has(write: Write, line: str, what: str) -> None:
    assert mistakes(write(f"{line}\ntarget: {{type: null}}"))[0] == f"1: {line.partition(':')[0]}: {what}"


def test_batches_of_one() -> None:
    with pytest.raises(ConfigError, match=r"mode batch\+copy needs a depth of 2 or more"):
        build(Draft(device={"mode": "batch+copy", "depth": 1}, target_type="null"))


@pytest.mark.parametrize(
    ("said", "text", "place"),
    [
        ({"threads_per_queue": 9}, "depth: 4\ntarget: {type: null}", "1: depth: 9 threads"),
        ({"depth": 4}, "queues: 2\nthreads_per_queue: 9\ntarget: {type: null}", "2: threads_per_queue: 9 threads"),
        ({}, "depth: 4\nthreads_per_queue: 9\ntarget: {type: null}", "2: threads_per_queue: 9 threads"),
        ({}, "depth: 1\nmode: batch+copy\ntarget: {type: null}", "2: mode: mode batch"),
        ({}, "supervise: true\ntarget: {type: null}", "1: supervise: supervise: without recovery"),
        ({}, "htlb: /huge\ntarget: {type: null}", "1: htlb: htlb is about"),
        ({}, "name: '12'\ntarget: {type: null}", "1: name: name '12' could be taken for an id"),
        ({}, "target: {type: null}\nrecovery: fail\nshmem_zc: true\nmode: copy", "4: mode: shmem_zc with recovery"),
        ({}, "mode: auto-buf\ntarget: {type: null, metadata_size: 8}", "1: mode: mode auto-buf cannot move metadata"),
        ({"mode": "copy"}, "target:\n  type: null\n  metadata_size: 8", "3: target.metadata_size: mode copy cannot"),
        ({}, "shmem_zc: true\ntarget: {type: null, metadata_size: 8}", "1: shmem_zc: memory shared by clients does"),
        ({}, "max_sectors: 16\nmax_io_buf_bytes: 4k\ntarget: {type: null}", "1: max_sectors: max_sectors 16 is more"),
        ({"max_sectors": 2048}, "max_io_buf_bytes: 4k\ntarget: {type: null}", "1: max_io_buf_bytes: max_sectors"),
        ({}, "io_min: 1k\nio_opt: 512\ntarget: {type: null}", "2: io_opt: io_opt 512 is less than io_min 1024"),
        ({"io_opt": 512}, "io_min: 1k\ntarget: {type: null}", "1: io_min: io_opt 512 is less than io_min 1024"),
        ({}, "read_only: yes\nwrite_cache: on\ntarget: {type: null}", "2: write_cache: write_cache: nothing"),
        ({}, "max_discard_bytes: 4k\nread_only: yes\ntarget: {type: null}", "1: max_discard_bytes: max_discard"),
        (
            {"logical_block_size": 4096},
            "target:\n  type: null\n  size: 1001s",
            "3: target.size: the size 500.5K is not a multiple of logical_block_size 4096",
        ),
    ],
)
def test_what_a_file_and_the_command_line_contradict_each_other_in(
    write: Write, said: dict[str, object], text: str, place: str
) -> None:
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        build(Draft(said), read_yaml(path))
    assert caught.value.message.startswith(f"{path}:{place}")


@pytest.mark.parametrize("name", ["/dev/ublkb0", "7", "", "-a", "+1"])
def test_names_that_look_like_something_else(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^name {re.escape(repr(name))} could be taken for an id") as caught:
        build(Draft({"name": name}, "null"))
    assert "such as disk" in caught.value.hint


def test_on_the_command_line_alone_there_is_no_place_to_name() -> None:
    with pytest.raises(ConfigError, match=r"^mode batch\+copy needs"):
        build(Draft({"mode": "batch+copy", "depth": 1}, "null"), Draft({"queues": 2}))


def test_shared_memory_in_a_mode_that_has_no_use_for_it() -> None:
    with pytest.raises(ConfigError, match="shmem_zc and mode get-data exclude each other"):
        build(Draft(device={"shmem_zc": True, "mode": "get-data"}, target_type="null"))
    with pytest.raises(ConfigError, match="shmem_zc with recovery does not go with mode copy"):
        build(Draft(device={"shmem_zc": True, "mode": "copy", "recovery": "fail"}, target_type="null"))


# -- devices of ordinary users -------------------------------------------------------------


@pytest.mark.parametrize("mode", sorted(MODES))
def test_modes_of_ordinary_users(mode: str) -> None:
    """As in ublk_drv.c, ublk_ctrl_add_dev: the driver copies their data itself."""
    draft = Draft(device={"unprivileged": True, "mode": mode}, target_type="null")
    if mode in ("copy", "get-data", "batch+copy"):
        assert build(draft).device.unprivileged
        return
    with pytest.raises(ConfigError) as caught:
        build(draft)
    assert caught.value.message == f"mode {mode} is not for unprivileged devices: the driver copies their data itself"
    assert caught.value.hint == "leave mode out, or choose copy, get-data, batch+copy"


def test_unprivileged_and_what_does_not_go_with_it(write: Write) -> None:
    for device, target, words in (
        ({"recovery": "fail"}, {}, "has no recovery for them"),
        ({}, {"metadata_size": 8}, "cannot have metadata"),
    ):
        with pytest.raises(ConfigError, match=words):
            build(Draft(device={"unprivileged": True, **device}, target_type="null", target=target))
    path = write("depth: 8\nunprivileged: true\nrecovery: queue\ntarget: {type: null}")
    with pytest.raises(ConfigError) as caught:
        build(Draft(), read_yaml(path))
    assert caught.value.message.startswith(f"{path}:3: recovery: ")


# -- whose file it is ----------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "refused"), [(0o644, False), (0o664, False), (0o666, True), (0o602, True)])
def test_root_takes_no_file_that_anybody_can_write(write: Write, mode: int, refused: bool) -> None:
    path = write("target: {type: null}")
    path.chmod(mode)
    if not refused or os.geteuid() != 0:
        assert read_yaml(path).target_type == "null"
        return
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert caught.value.message == f"{path} can be written by anybody, and says what root is to open"
    assert caught.value.hint == f"chmod o-w {path}"


# -- lists and programs --------------------------------------------------------------------


def test_a_list_of_arguments(write: Write, tmp_path: Path) -> None:
    draft = read_yaml(write("target:\n  type: nbdkit-python\n  script: x.py\n  args:\n  - size=1M\n  - note=a b\n"))
    assert draft.target == {"script": tmp_path / "x.py", "args": ("size=1M", "note=a b")}
    assert build(Draft(target={"args": ("size=2M",)}), draft).target.dump()["args"] == ["size=2M"]


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("size=1M", "expected a list here, such as [one, another]"),
        ("{size: 1M}", "expected a list here, such as [one, another]"),
        ("[size=1M, size]", "'size' is not of the form key=value"),
        ("[size=1M, 3]", "3 is not of the form key=value"),
        ("[size=1M, [a=b]]", "expected a single value here"),
    ],
)
def test_a_list_that_is_none(write: Write, value: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_yaml(write(f"target: {{type: nbdkit-python, script: x.py, args: {value}}}\n"))
    assert f"disk.yaml:1: target.args: {what}" in caught.value.message


@pytest.mark.skipif(os.geteuid() != 0, reason="others' files are none of our concern")
def test_root_takes_no_script_from_others_that_a_file_names(write: Write, tmp_path: Path) -> None:
    (tmp_path / "x.py").touch()
    (tmp_path / "x.py").chmod(0o666)
    with pytest.raises(UblkError, match="is code that others than root can change"):
        read_yaml(write("target: {type: nbdkit-python, script: x.py}\n"))


def test_a_class_with_an_init_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "disk.py"
    path.write_text(
        "from ublkpy import Target\n\n\nclass Mine(Target):\n    def __init__(self):\n        pass\n\n    open = None\n"
    )
    with pytest.raises(UblkError, match="target mine cannot be made: ") as caught:
        build(Draft(target_type=str(path)))
    assert "open() is the place" in caught.value.hint
