"""The ``ublk`` command: what is accepted, what is printed where, and exit codes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from ublkpy import __version__, cli, cli_options, tgt
from ublkpy.config import DeviceConfig, DeviceOptions
from ublkpy.driver.ctrl import CONTROL
from ublkpy.errors import BusyError, ExitCode, NoDeviceError, UblkError
from ublkpy.tgt import load
from ublkpy.tgt.loop import LoopTarget
from ublkpy.tgt.null import NullTarget

COMMANDS = ["add", "del", "list", "recover", "upgrade", "stop", "start", "quiesce", "resize", "resync"]
COMMANDS += ["set-affinity", "params", "features", "target", "udev", "check", "help"]

no_driver = pytest.mark.skipif(CONTROL.exists(), reason=f"{CONTROL} exists: nothing to be said about its absence")


@dataclass(frozen=True)
class Result:
    """What a run of the command gave."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


def words(value: object) -> str | None:
    """A test's arguments as its name."""
    return " ".join(value) if isinstance(value, list) else None if isinstance(value, str) else ""


@pytest.fixture
def ublk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run the command in this process."""
    on_term = signal.getsignal(signal.SIGTERM)

    def run(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["ublk", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    yield run
    signal.signal(signal.SIGTERM, on_term)


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[DeviceConfig]]:
    """The devices that were added, as far as ``ublk add`` is concerned: each gets id 7."""
    configs: list[DeviceConfig] = []

    def add(config: DeviceConfig, on_ready: Callable[[int], None]) -> int:
        configs.append(config)
        on_ready(7)
        return 7

    monkeypatch.setattr("ublkpy.life.add.add", add)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield configs
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def null_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "null.yaml"
    path.write_text("queues: 2\ndepth: 64\ntarget: {type: null, size: 1G}\n")
    return path


def usage_error(result: Result) -> str:
    """Check that it is one, told as every error is, and give back what is said."""
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("ublk: error: ")
    assert "Usage:" not in result.err
    assert "Traceback" not in result.err
    return result.err


# -- mistyped words ------------------------------------------------------------------------


def test_no_command_shows_the_commands_on_stderr(ublk: Run) -> None:
    shown = ublk()
    assert (shown.code, shown.out) == (2, "")
    assert shown.err.startswith("Usage: ")
    assert all(f"\n  {name} " in shown.err for name in COMMANDS)


@pytest.mark.parametrize("typed", ["lst", "lsit", "lis"])
def test_mistyped_command(ublk: Run, typed: str) -> None:
    err = usage_error(ublk(typed))
    assert f"No such command '{typed}'" in err
    assert "Did you mean 'list'?" in err


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (["add", "-t", "null", "--depht", "3"], "--depth"),
        (["add", "-t", "null", "--sise", "1G"], "--size"),
        (["add", "-t", "loop", "--bufferd_io"], "--buffered_io"),
        (["del", "--al"], "--all"),
        (["list", "--jsn"], "--json"),
    ],
)
def test_mistyped_option(ublk: Run, args: list[str], meant: str) -> None:
    err = usage_error(ublk(*args))
    assert "Did you mean" in err or "did you mean" in err.lower()
    assert meant in err


@pytest.mark.parametrize("args", [["add", "-t", "lop"], ["help", "-t", "lop"], ["add", "--type=lop", "-f", "x"]])
def test_mistyped_target(ublk: Run, args: list[str]) -> None:
    assert usage_error(ublk(*args)) == "ublk: error: there is no target 'lop'\n  hint: did you mean loop?\n"


def test_unknown_target_lists_all(ublk: Run) -> None:
    assert f"hint: targets are: {', '.join(tgt.names())}" in usage_error(ublk("add", "-t", "zzz"))


# -- usage ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["add"], "no target given"),
        (["add", "-f", "x"], "no target given"),
        (["add", "-t"], "requires an argument"),
        (["add", "-t", "null", "extra"], "two targets: extra and null"),
        (["add", "-t", "null", "-f", "x"], "No such option '-f'"),
        (["add", "-t", "null", "-d", "0"], "'-d' / '--depth': 0 is out of range: 1 to 4096"),
        (["add", "-t", "null", "-d", "x"], "'x' is not a whole number"),
        (["add", "-t", "null", "-n", "1048576"], "out of range: -1 to 1048575"),
        (["add", "-t", "null", "--size", "1.5x"], "'1.5x' is not a size such as 4096, 64k or 1G"),
        (["add", "-t", "null", "--size", "1000"], "1000 is not a multiple of 512"),
        (["add", "-t", "null", "--size", "16E"], "16E is too large: at most 9223372036854775296 bytes"),
        (["add", "-t", "null", "--size", "1000000E"], "1000000E is too large"),
        (["add", "-t", "null", "--recovery", "often"], "none, queue, reissue, fail"),
        (["add", "-t", "loop"], "no file given: target loop needs -f or --file"),
        (["add", "-t", "null", "-i", "1", "-e", "1"], "nor -i with -e"),
        (["add", "-t", "null", "-r", "x"], "'-r' / '--user_recovery'"),
        (["add", "-t", "null", "-r", "2"], "'2' is not one of '0', '1'"),
        (["add", "-t", "null", "-i", "-5"], "'-5' is not one of '0', '1'"),
        (["add", "-t", "null", "-e", "2"], "'-e' / '--user_recovery_fail_io'"),
        (["add", "-t", "null", "-u", "2"], "'-u' / '--uring_comp'"),
        (["del"], "name the devices, or say -a for all of them"),
        (["del", "-a", "3"], "name the devices, or say -a for all of them"),
        (["del", "-a", "-n", "3"], "name the devices, or say -a for all of them"),
        (["del", "-n", "1048576"], "1048576 is not in the range"),
        (["del", "--", "-1"], "-1"),
        (["recover"], "name the devices, or say -a for all of them (not both)"),
        (["upgrade", "-a", "3"], "name the devices, or say -a for all of them (not both)"),
        (["stop"], "Missing option '-n' / '--number'"),
        (["stop", "-n", "1", "--safe", "--force"], "--safe and --force exclude each other"),
        (["resize", "-n", "1"], "Missing argument 'SIZE'"),
        (["resize", "-n", "1", "big"], "'big' is not a size such as 4096, 64k or 1G"),
        (["resize", "-n", "1", "9E"], "too large"),
        (["set-affinity", "-n", "1", "-q", "0"], "Missing option '--cpuset'"),
        (["set-affinity", "-n", "1", "-q", "0", "--cpuset", ""], "'' is not a set of CPUs such as 0-3,5"),
        (["set_affinity", "-n", "1", "-q", "0", "--cpuset", "1-"], "'1-' is not a set of CPUs such as 0-3,5"),
        (["set-affinity", "-n", "1", "-q", "-1", "--cpuset", "1"], "'-q' / '--queue'"),
        (["list", "3"], "unexpected extra argument"),
        (["check"], "no target given"),
        (["help", "lst"], "No such command 'lst'. Did you mean 'list'?"),
    ],
    ids=words,
)
def test_usage_error(ublk: Run, args: list[str], said: str) -> None:
    assert said in usage_error(ublk(*args))


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["list", "3"], "Got unexpected extra argument (3)", "list --help"),
        (["start"], "Missing option '-n' / '--number'", "start --help"),
        (["lst"], "No such command 'lst'. Did you mean 'list'?", "--help"),
        (["add", "-t", "null", "-d", "0"], "Invalid value for '-d' / '--depth': 0 is", "ublk help -t null"),
        (["add", "-t", "null", "-f", "x"], "No such option '-f'", "ublk help -t null"),
        (["list", "-n"], "Option '-n' requires an argument", "ublk --help"),
    ],
    ids=words,
)
def test_usage_error_names_the_help_that_belongs_to_it(ublk: Run, args: list[str], message: str, hint: str) -> None:
    first, second = usage_error(ublk(*args)).splitlines()
    assert first.startswith(f"ublk: error: {message}")
    assert not first.endswith(".")
    assert second.startswith("  hint: see: ")
    assert second.endswith(hint)


def test_extra_recovery_switches_are_named(ublk: Run) -> None:
    err = usage_error(ublk("add", "-t", "null", "-r", "1", "--recovery", "fail"))
    assert "-r" in err.split("hint")[0].replace("--recovery", "")


# -- what is accepted ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "values"),
    [
        ([], {"id": -1, "queues": 1, "depth": 128, "max_io_buf_bytes": 524288, "recovery": "none", "log": None}),
        (["-n", "3"], {"id": 3}),
        (["--number", "3"], {"id": 3}),
        (["--id=3"], {"id": 3}),
        (["-n", "-1"], {"id": -1}),
        (["-q", "2"], {"queues": 2}),
        (["--queues", "2"], {"queues": 2}),
        (["-q2", "-d64"], {"queues": 2, "depth": 64}),
        (["-d", "64"], {"depth": 64}),
        (["--depth", "64"], {"depth": 64}),
        (["-T", "4"], {"threads_per_queue": 4}),
        (["--threads_per_queue", "4"], {"threads_per_queue": 4}),
        (["--max_io_buf_bytes", "1048576"], {"max_io_buf_bytes": 1 << 20}),
        (["--max-io-buf-bytes", "1M"], {"max_io_buf_bytes": 1 << 20}),
        (["-r", "1"], {"recovery": "queue"}),
        (["--user_recovery", "1"], {"recovery": "queue"}),
        (["-r", "0"], {"recovery": "none"}),
        (["-i", "1"], {"recovery": "reissue"}),
        (["--user_recovery_reissue", "1"], {"recovery": "reissue"}),
        (["-r", "1", "-i", "1"], {"recovery": "reissue"}),
        (["-e", "1"], {"recovery": "fail"}),
        (["-r", "1", "-e", "1"], {"recovery": "fail"}),
        (["--user_recovery_fail_io", "1"], {"recovery": "fail"}),
        (["--recovery", "queue"], {"recovery": "queue"}),
        (["-u", "1"], {}),
        (["--uring_comp", "0"], {}),
        (["--log", "/tmp/x.log"], {"log": Path("/tmp/x.log")}),
        (["--ro"], {"read_only": True}),
        (["--read-only"], {"read_only": True}),
        (["--read_only"], {"read_only": True}),
        (["--max_sectors", "64"], {"max_sectors": 64}),
        ([], {"part_scan": None, "max_sectors": None, "write_cache": None}),
        (["--no-part-scan"], {"part_scan": False}),
        (["--no_auto_part_scan"], {"part_scan": False}),
        (["--part-scan"], {"part_scan": True}),
        (["--no-write-cache"], {"write_cache": False}),
        (["--write_cache"], {"write_cache": True}),
        (["--rotational"], {"rotational": True}),
        (["--no_rotational"], {"rotational": False}),
        (["--logical_block_size", "4096", "--io-opt", "1M"], {"logical_block_size": 4096, "io_opt": 1 << 20}),
        (["--max-discard-bytes", "0"], {"max_discard_bytes": 0}),
    ],
    ids=words,
)
def test_device_options(ublk: Run, added: list[DeviceConfig], args: list[str], values: dict[str, object]) -> None:
    assert ublk("add", "-t", "null", *args) == Result(0, "/dev/ublkb7\n", "")
    (config,) = added
    assert {name: getattr(config.device, name) for name in values} == values


@pytest.mark.parametrize(
    ("args", "values"),
    [
        ([], None),
        (["size=1M", "file=/x"], ("size=1M", "file=/x")),
        (["--args", "size=1M", "--args", "a=b=c", "d="], ("size=1M", "a=b=c", "d=")),
    ],
    ids=words,
)
@pytest.mark.parametrize("named", [["-t", "nbdkit-python"], ["nbdkit-python"]], ids=words)
def test_arguments(
    ublk: Run, added: list[DeviceConfig], named: list[str], args: list[str], values: tuple[str, ...] | None
) -> None:
    assert ublk("add", *named, "--script", "/x.py", *args) == Result(0, "/dev/ublkb7\n", "")
    assert ublk("add", *args, "--script", "/x.py", *named).code == 0
    for config in added:
        assert config.target.dump().get("args") == (list(values) if values else None)


def test_arguments_win_over_those_of_a_file(ublk: Run, added: list[DeviceConfig], tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("target: {type: nbdkit-python, script: x.py, args: [size=1M, a=b]}\n")
    assert ublk("add", "-c", tmp_path / "x.yaml", "size=2M").code == 0
    assert added[0].target.dump()["args"] == ["size=2M"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["-t", "null", "size=1M"], "size=1M: target null takes no key=value"),
        (["size=1M"], "size=1M: no target given"),
        (["-t", "nbdkit-python", "--script", "x", "--args", "size"], "'size' is not of the form key=value"),
        (["nbdkit-python", "extra", "a=b"], "two targets: nbdkit-python and extra"),
    ],
    ids=words,
)
def test_arguments_that_nobody_takes(ublk: Run, args: list[str], said: str) -> None:
    assert said in usage_error(ublk("add", *args))


@pytest.mark.parametrize(
    ("said", "args", "mode"),
    [
        ("auto", ["-b"], "batch+copy"),
        ("zero-copy", ["-b"], "batch+zero-copy"),
        ("batch+user-copy", ["-b"], "batch+user-copy"),
        ("zero-copy", ["-b", "-z"], "batch+auto-buf"),
        ("zero-copy", ["--usercopy"], "user-copy"),
        ("get-data", ["-g", "0"], "copy"),
        ("get-data", ["-g", "0", "-b"], "batch+copy"),
        ("user-copy", ["-g", "0"], "user-copy"),
        ("user-copy", ["-g", "1"], "get-data"),
        ("zero-copy", ["--mode", "auto"], "auto"),
    ],
    ids=words,
)
def test_switches_change_what_a_file_says(
    ublk: Run, added: list[DeviceConfig], tmp_path: Path, said: str, args: list[str], mode: str
) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(f"mode: {said}\ntarget: {{type: null}}\n")
    assert ublk("add", "-c", str(file), *args).code == 0
    assert added[0].device.mode == mode


def test_batches_do_not_go_with_get_data_of_a_file(ublk: Run, added: list[DeviceConfig], tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("mode: get-data\ntarget: {type: null}\n")
    done = ublk("add", "-c", str(file), "-b")
    assert (done.code, done.out, added) == (2, "", [])
    assert "-g excludes -b" in done.err


@pytest.mark.parametrize(
    ("args", "values"),
    [
        (["-f", "/a"], {"file": Path("/a"), "offset": 0, "size": None, "direct": None}),
        (["--file=/a"], {"file": Path("/a")}),
        (["-ftest.img"], {"file": Path("/test.img")}),
        (["-fc.yaml"], {"file": Path("/c.yaml")}),
        (["-f", "../b"], {"file": Path("/b")}),
        (["-f", "~/b"], {"file": Path("/~/b")}),
        (["-f", "/a", "-o", "8"], {"offset": 4096}),
        (["-f", "/a", "--offset", "1M"], {"offset": 1 << 20}),
        (["-f", "/a", "--size", "1G"], {"size": 1 << 30}),
        (["-f", "/a", "--buffered_io"], {"direct": False}),
        (["-f", "/a", "--buffered-io"], {"direct": False}),
        (["-f", "/a", "--direct"], {"direct": True}),
    ],
    ids=words,
)
@pytest.mark.parametrize("first", [True, False], ids=["target first", "target last"])
def test_loop_options(
    ublk: Run,
    added: list[DeviceConfig],
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    values: dict[str, object],
    first: bool,
) -> None:
    monkeypatch.chdir("/")
    target = ["-t", "loop"]
    assert ublk("add", *(target + args if first else args + target)).code == 0
    assert isinstance(added[0].target, LoopTarget)
    assert {name: getattr(added[0].target, name) for name in values} == values


@pytest.mark.parametrize("target", [["-t", "null"], ["-tnull"], ["--type", "null"], ["--type=null"]])
def test_ways_to_name_the_target(ublk: Run, added: list[DeviceConfig], target: list[str]) -> None:
    assert ublk("add", *target, "--size", "1M").code == 0
    assert isinstance(added[0].target, NullTarget)
    assert added[0].target.size == 1 << 20


@pytest.mark.parametrize("name", ["-test.img", "-crazy.yaml", "--type=null", "-t", "--config", "--"])
def test_value_that_looks_like_the_target_or_the_file(
    ublk: Run, added: list[DeviceConfig], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir("/")
    assert ublk("add", "-t", "loop", "-f", name).code == 0
    assert ublk("add", "-f", name, "--log", name, "-t", "loop").code == 0
    assert [config.target.backing() for config in added] == [f"/{name}", f"/{name}"]
    assert added[1].device.log == Path("/", name)


def test_last_target_counts(ublk: Run, added: list[DeviceConfig]) -> None:
    assert ublk("add", "-t", "loop", "-tnull").code == 0
    assert added[0].target.name == "null"


def test_file_names_the_target_and_the_command_line_wins(ublk: Run, added: list[DeviceConfig], null_yaml: Path) -> None:
    assert ublk("add", "-c", null_yaml, "-d", "32", "--size", "2G").code == 0
    config = added[0]
    assert (config.device.queues, config.device.depth, config.target.dump()) == (2, 32, {"size": 2 << 30})


def test_file_for_another_target(ublk: Run, added: list[DeviceConfig], null_yaml: Path) -> None:
    err = usage_error(ublk("add", "-t", "loop", "-f", "x", "-c", null_yaml))
    assert err.startswith("ublk: error: the file is for a null target, not loop\n  hint: ")
    assert added == []


def test_mistakes_in_the_file_come_with_place_and_line(ublk: Run, added: list[DeviceConfig], tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("dept: 3\ntarget: {type: null}\n")
    err = usage_error(ublk("add", "-c", path))
    assert err == f"ublk: error: {path}:1: dept: unknown key; did you mean depth?\n    dept: 3\n"


def test_no_two_options_share_a_flag(ublk: Run) -> None:
    for name in tgt.names():
        context = click.Context(cli.add)
        context.meta[cli_options.TARGET] = name
        flags = [flag for param in cli.add.get_params(context) for flag in (*param.opts, *param.secondary_opts)]
        assert len(flags) == len(set(flags)), f"{name}: {sorted(flags)}"


# -- help ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--version", "-V", "-v"])
def test_version(ublk: Run, flag: str) -> None:
    assert ublk(flag) == Result(0, f"ublk {__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(ublk: Run, command: str) -> None:
    shown = ublk(command, "--help")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.startswith("Usage: ")
    assert ublk(command, "-h").out == shown.out
    assert f"{command} [OPTIONS]" in ublk("help", command).out


def test_help_lists_every_command(ublk: Run) -> None:
    shown = ublk("help")
    assert (shown.code, shown.err) == (0, "")
    assert all(f"\n  {name} " in shown.out for name in COMMANDS)
    assert list(cli.cli.commands) == COMMANDS


@pytest.mark.parametrize("target", tgt.names())
def test_help_of_a_target_shows_every_option(ublk: Run, target: str) -> None:
    shown = ublk("help", "-t", target).out
    cls = tgt.find(target)
    assert shown.startswith(f"{target}: ")
    own = shown.split(f"Options of target {target}:")[1]
    for opt in cls.options.values():
        for flag in (*opt.flags, *opt.long_flags, *opt.off_flags):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", own), f"{flag} of {target}"
        assert opt.help.split()[0] in own
    for opt in DeviceOptions.options.values():
        assert all(flag in shown for flag in (*opt.flags, *opt.long_flags))


def test_help_of_add_without_a_target_says_where_their_options_are(ublk: Run) -> None:
    shown = " ".join(ublk("add", "--help").out.split())
    assert f"Targets: {', '.join(tgt.names())}. Their options: ublk help -t TARGET" in shown


def test_help_writes_choices_as_they_are_typed(ublk: Run) -> None:
    assert "none|queue|reissue|fail" in ublk("add", "--help").out


def test_help_names_a_flag_once(ublk: Run) -> None:
    own = ublk("help", "-t", "loop").out.split("Options of target loop:")[1]
    assert own.count("--direct") == 1
    assert own.count("--buffered_io") == 1


def test_help_shows_defaults_and_what_is_required(ublk: Run) -> None:
    shown = " ".join(ublk("help", "-t", "loop").out.split())
    assert "[default: 512k]" in shown
    assert "[default: 128]" in shown
    assert "[required]" in shown


# -- check ---------------------------------------------------------------------------------


def test_check_of_a_good_file(ublk: Run, null_yaml: Path) -> None:
    assert ublk("check", "-c", null_yaml) == Result(0, f"{null_yaml}: null, 1G: good\n", "")


def test_check_of_what_would_be_added(ublk: Run, tmp_path: Path) -> None:
    path = tmp_path / "disk.py"
    path.write_text(load.template().read_text())
    assert ublk("check", path, "--size", "2M", "-q", "4") == Result(0, f"{path}:MyDisk: my-disk, 2M: good\n", "")
    assert ublk("check", "null") == Result(0, "null: null, 250G: good\n", "")
    assert "not a multiple of" in usage_error(ublk("check", path, "--size", "5000"))


def test_options_that_others_would_hide(ublk: Run, tmp_path: Path) -> None:
    path = tmp_path / "disk.py"
    text = load.template().read_text()
    path.write_text(text.replace('"-s"', '"-q"'))
    for command in ("add", "check"):
        refused = ublk(command, path)
        assert (refused.code, refused.out) == (ExitCode.FAILED, "")
        assert "option size of the target has the flag -q, which any device has" in refused.err
        assert "give it another name, or other flags" in refused.err


def test_check_opens_the_target(ublk: Run, tmp_path: Path) -> None:
    path = tmp_path / "loop.yaml"
    path.write_text("target: {type: loop, file: disk.img}")
    missing = ublk("check", "-c", path)
    assert (missing.code, missing.out) == (1, "")
    assert "disk.img does not exist" in missing.err
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    assert ublk("check", "-c", path) == Result(0, f"{path}: loop on {tmp_path / 'disk.img'}, 1M: good\n", "")


def test_check_changes_nothing(ublk: Run, tmp_path: Path) -> None:
    path, disk = tmp_path / "loop.yaml", tmp_path / "disk.img"
    path.write_text("target: {type: loop, file: disk.img}")
    disk.write_bytes(bytes(1 << 20))
    os.utime(disk, ns=(1, 1))
    before = disk.stat()
    assert ublk("check", "-c", path).code == 0
    after = disk.stat()
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
    assert after.st_blocks == before.st_blocks


def test_check_of_a_file_in_use(ublk: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ublkpy.tgt.backing._RELEASE", 0.0)
    path, disk = tmp_path / "loop.yaml", tmp_path / "disk.img"
    path.write_text("target: {type: loop, file: disk.img}")
    disk.write_bytes(bytes(1 << 20))
    with disk.open() as user:
        fcntl.flock(user, fcntl.LOCK_EX)
        refused = ublk("check", "-c", path)
    assert (refused.code, refused.out) == (4, "")
    assert f"backing file {disk} is in use by another device or program" in refused.err
    assert "ublk list" in refused.err


@pytest.mark.parametrize("keys", ["", ", offset: 4M", ", size: 2M"], ids=["odd", "offset", "size"])
def test_check_of_a_backing_that_does_not_fit(ublk: Run, tmp_path: Path, keys: str) -> None:
    path = tmp_path / "loop.yaml"
    path.write_text(f"target: {{type: loop, file: disk.img{keys}}}")
    (tmp_path / "disk.img").write_bytes(bytes((1 << 20) + 100))
    refused = ublk("check", "-c", path)
    assert (refused.code, refused.out) == (1, "")
    assert refused.err.startswith("ublk: error: ")


def test_check_of_a_bad_file_lists_every_mistake(ublk: Run, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("depth: 0\ntarget: {type: null, size: 1X}\n")
    err = usage_error(ublk("check", "-c", path))
    assert f"{path}:1: depth: " in err
    assert f"{path}:2: target.size: " in err


def test_check_of_a_missing_file(ublk: Run) -> None:
    assert "cannot read /no/such.yaml: No such file or directory" in usage_error(ublk("check", "-c", "/no/such.yaml"))


# -- no driver -----------------------------------------------------------------------------


@no_driver
@pytest.mark.parametrize(
    "args",
    [
        ["add", "-t", "null"],
        ["add", "-t", "null", "--json"],
        ["add", "-t", "null", "--foreground"],
        ["add", "-t", "loop", "-f", "/dev/null"],
        ["del", "5"],
        ["del", "-n", "5", "-n", "6"],
        ["del", "--force", "5"],
        ["list"],
        ["list", "--json"],
        ["list", "-n", "5"],
        ["params", "-n", "5"],
        ["params", "-n", "5", "--json"],
        ["recover", "-n", "5"],
        ["features"],
        ["features", "--json"],
    ],
    ids=words,
)
@pytest.mark.logs
def test_without_driver(ublk: Run, args: list[str]) -> None:
    result = ublk(*args)
    assert (result.code, result.out) == (5, "")
    assert f"ublk: error: {CONTROL} does not exist: the ublk driver is not loaded" in result.err
    assert "hint: load it with: modprobe ublk_drv" in result.err


@no_driver
@pytest.mark.logs
def test_del_of_all_without_driver(ublk: Run) -> None:
    assert ublk("del", "-a").code in (0, 5)


# -- del: several devices ------------------------------------------------------------------


def test_del_takes_each_device_once_and_goes_on_after_an_error(ublk: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bool, bool]] = []

    def delete(dev_id: int, *, force: bool, spare_used: bool, wait: bool) -> None:
        seen.append((dev_id, force, wait))
        errors: dict[int, UblkError] = {3: BusyError("device 3 is busy", "wait"), 4: NoDeviceError("no device 4")}
        if dev_id in errors:
            raise errors[dev_id]

    monkeypatch.setattr("ublkpy.driver.delete.delete", delete)
    result = ublk("del", "-n", "3", "--async", "4", "5", "3")
    # 3 once more at the end, because 4 or 5 may have stood on it
    assert seen == [(3, False, False), (4, False, False), (5, False, False), (3, False, False)]
    assert result.code == 4  # of the first that failed
    assert result.err == "ublk: error: device 3 is busy\n  hint: wait\nublk: error: no device 4\n"


def test_del_of_all_does_not_miss_what_others_deleted_meanwhile(ublk: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def delete(dev_id: int, **kwargs: object) -> None:
        raise {3: NoDeviceError("no device 3"), 4: UblkError("device 4 did not stop")}[dev_id]

    monkeypatch.setattr("ublkpy.driver.delete.delete", delete)
    monkeypatch.setattr("ublkpy.driver.ctrl.require_driver", lambda: None)
    monkeypatch.setattr("ublkpy.driver.inspect.device_ids", lambda: [3])
    assert ublk("del", "-a") == Result(0, "", "")
    assert ublk("del", "-n", "3").code == 3
    monkeypatch.setattr("ublkpy.driver.inspect.device_ids", lambda: [3, 4])
    assert ublk("del", "-a") == Result(1, "", "ublk: error: device 4 did not stop\n")


# -- completion ----------------------------------------------------------------------------


def complete(typed: str) -> tuple[list[str], str]:
    """What the shell offers behind these words, and what appears on the terminal besides."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'ublk'; from ublkpy.cli import main; main()"],
        env={"_UBLK_COMPLETE": "bash_complete", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))},
        capture_output=True,
        text=True,
        check=False,
    )
    return [line.partition(",")[2] for line in done.stdout.splitlines()], done.stderr


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("ublk re", ["recover", "resize", "resync"]),
        ("ublk add -t ", tgt.names()),
        ("ublk add -t l", ["loop"]),
        ("ublk help -t ", tgt.names()),
        ("ublk add -t loop --buf", ["--buffered_io", "--buffered-io"]),
        ("ublk add -t null --recovery ", ["none", "queue", "reissue", "fail"]),
    ],
)
def test_completion(typed: str, offered: list[str]) -> None:
    assert complete(typed) == (offered, "")


def test_completion_after_a_mistyped_target_is_silent() -> None:
    assert complete("ublk add -t lop --dep") == (["--depth"], "")


# -- the installed command -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["ublk", "ublkpy"])
def test_installed_command(name: str) -> None:
    program = Path(sys.executable).parent / name
    if not program.exists():
        pytest.skip(f"{program} is not installed")
    shown = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    assert (shown.stdout, shown.stderr) == (f"ublk {__version__}\n", "")


def test_module_is_the_command() -> None:
    shown = subprocess.run([sys.executable, "-m", "ublkpy", "lst"], capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert "Did you mean 'list'?" in shown.stderr


def test_yaml_from_a_pipe(null_yaml: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ublkpy", "check", "-c", "/dev/stdin"],
        input=null_yaml.read_bytes(),
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, b"/dev/stdin: null, 1G: good\n")


@no_driver
def test_yaml_from_a_pipe_for_add(null_yaml: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ublkpy", "add", "-c", "/dev/stdin"],
        input=null_yaml.read_bytes(),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 5, done.stderr


@pytest.mark.parametrize("args", ["--help", "--version", "help add", "add --help", "check -c FILE"])
def test_full_stdout_is_an_error(null_yaml: Path, args: str) -> None:
    argv = [str(null_yaml) if arg == "FILE" else arg for arg in args.split()]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ublkpy", *argv], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, "ublk: error: cannot write to stdout: No space left on device\n")


def test_other_errors_of_the_system_are_bugs(ublk: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr("ublkpy.config.read_yaml", fail)
    with pytest.raises(OSError, match="broken"):
        ublk("check", "-c", "some.yaml")


@pytest.mark.parametrize("path", ["/dev/full", "pipe"])
def test_recover_is_done_whoever_hears_of_it(path: str) -> None:
    code = (
        "from ublkpy import cli, config; from ublkpy.life import recover\n"
        "recover.recover = lambda dev_id: config.build(config.Draft(target_type='null'))\n"
        "cli.main()"
    )
    read_end, write_end = os.pipe()
    os.close(read_end)
    out = write_end if path == "pipe" else os.open(path, os.O_WRONLY)
    argv = [sys.executable, "-c", code, "recover", "-n", "7"]
    done = subprocess.run(argv, stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    for fd in {out, write_end}:
        os.close(fd)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch("ublk: cannot write to stdout: [A-Z][a-z ]+\n", done.stderr)


def test_closed_pipe_is_no_traceback() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "ublkpy", "help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()


def test_start_is_quick_because_nothing_is_imported_in_vain() -> None:
    code = "import sys, ublkpy.cli; print(sorted(m for m in sys.modules if m.startswith('ublkpy.tgt.')))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(shown.stdout.replace("'", '"')) == [
        "ublkpy.tgt.base",
        "ublkpy.tgt.disk",
        "ublkpy.tgt.handlers",
        "ublkpy.tgt.limits",
        "ublkpy.tgt.load",
        "ublkpy.tgt.options",
    ]


# -- streams -------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_nothing_of_ours(closed: str) -> None:
    """The lowest free descriptors are those of the streams: pipes and files must not land there."""
    code = (
        "import os; from ublkpy import cli\n"
        "cli._fill_standard_streams()\n"
        "os.write(9, b'%d' % os.open('/', os.O_RDONLY))\n"
    )
    done = subprocess.run(
        ["sh", "-c", f'exec 9>&1; exec "$0" -c "$1" {closed}', sys.executable, code],
        capture_output=True,
        text=True,
    )
    assert int(done.stdout) > 2, done.stderr
