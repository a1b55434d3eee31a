"""Plugins for nbdkit: what becomes of their functions, without a kernel."""

from __future__ import annotations

import errno
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ublkpy.config import DeviceConfig, DeviceOptions, from_dump
from ublkpy.errors import UblkError
from ublkpy.testing import TargetContract, open_disk
from ublkpy.testing.disk import Disk
from ublkpy.tgt import handlers, limits
from ublkpy.tgt.base import Geometry
from ublkpy.tgt.handlers import Way
from ublkpy.tgt.nbdkit_python import NbdkitPythonTarget

MIB = 1 << 20
PAGE = Path(__file__).parents[3] / "docs/targets/nbdkit-python.md"

# All that a plugin can have, with what was called, and switches in its arguments: size=, can_fua=2, fail=pwrite:28 ...
FULL = """
import threading
import nbdkit

API_VERSION = 2
calls = []
said = {}
disk = bytearray()

def config(key, value):
    if key == "bad":
        raise KeyError(value)
    said[key] = value

def config_complete():
    calls.append("config_complete")
    disk.extend(bytes(nbdkit.parse_size(said.get("size", "1M"))))

def thread_model():
    return int(said.get("model", nbdkit.THREAD_MODEL_SERIALIZE_ALL_REQUESTS))

def get_ready():
    calls.append("get_ready")

def after_fork():
    calls.append("after_fork")

def cleanup():
    calls.append("cleanup")

def preconnect(readonly):
    calls.append(f"preconnect {readonly}")

def open(readonly):
    calls.append(f"open {readonly}")
    return {"thread": threading.get_ident()}

def close(h):
    calls.append("close")

def get_size(h):
    return len(disk)

def block_size(h):
    return tuple(map(int, said.get("block_size", "512,4096,0").split(",")))

def is_rotational(h):
    return "rotational" in said

def can_write(h):
    return said.get("can_write") != "no"

def can_flush(h):
    return said.get("can_flush") != "no"

def can_trim(h):
    return said.get("can_trim") != "no"

def can_zero(h):
    return said.get("can_zero") != "no"

def can_fua(h):
    return int(said.get("can_fua", nbdkit.FUA_EMULATE))

def did(what, *args):
    name, _, err = said.get("fail", "").partition(":")
    if name == what:
        if err:
            nbdkit.set_error(int(err))
        raise RuntimeError(f"no {what}")
    if said.get("recovers") == what:
        nbdkit.set_error(5)
    calls.append(" ".join(map(str, (what, *args))))

def pread(h, buf, offset, flags):
    did("pread", len(buf), offset, flags)
    buf[:] = disk[offset : offset + len(buf)]

def pwrite(h, buf, offset, flags):
    did("pwrite", len(buf), offset, flags)
    disk[offset : offset + len(buf)] = buf

def flush(h, flags):
    did("flush", flags)

def trim(h, count, offset, flags):
    did("trim", count, offset, flags)

def zero(h, count, offset, flags):
    did("zero", count, offset, flags)
    disk[offset : offset + count] = bytes(count)
"""

FIRST_API = """
calls = []
disk = bytearray(1 << 20)

def open(readonly):
    return disk

def get_size(h):
    return len(h)

def pread(h, count, offset):
    return h[offset : offset + count]

def pwrite(h, buf, offset):
    calls.append(f"pwrite {len(buf)} {offset}")
    h[offset : offset + len(buf)] = buf

def can_fua(h):
    return 2

def flush(h):
    calls.append("flush")

def trim(h, count, offset):
    calls.append(f"trim {count} {offset}")

def zero(h, count, offset, may_trim):
    calls.append(f"zero {count} {offset} {may_trim}")
    h[offset : offset + count] = bytes(count)
"""

SMALLEST = """
API_VERSION = 2

def open(readonly):
    return None

def get_size(h):
    return 1 << 20

def pread(h, buf, offset, flags):
    buf[:] = bytes(offset // 512 + n // 512 & 255 for n in range(len(buf)))
"""

Make = Callable[..., NbdkitPythonTarget]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A target of a plugin with this text and these arguments; what is said of the device by name."""

    def make(text: str = FULL, *args: str, **said: object) -> NbdkitPythonTarget:
        path = tmp_path / "plugin.py"
        path.write_text(text)
        target = NbdkitPythonTarget({"script": path, "args": args})
        target.disk = DeviceOptions(said)
        return target

    return make


def calls(target: NbdkitPythonTarget) -> list[str]:
    """What the plugin says that was called since the last time."""
    log = vars(target._script._module)["calls"]
    found = list(log)
    log.clear()
    return found


@pytest.fixture
def opened() -> Iterator[Callable[[NbdkitPythonTarget], Disk]]:
    """The disk of a target until the end of the test."""
    left = []

    def enter(target: NbdkitPythonTarget) -> Disk:
        entered = open_disk(target)
        disk = entered.__enter__()
        left.append(entered)
        if "calls" in vars(target._script._module):
            calls(target)
        return disk

    yield enter
    for entered in left:
        entered.__exit__(None, None, None)


Opened = Callable[[NbdkitPythonTarget], Disk]


def geometry(target: NbdkitPythonTarget) -> Geometry:
    return limits.settle(target.disk, handlers.fit(target, handlers.open_target(target)))


def refused(target: NbdkitPythonTarget) -> UblkError:
    with pytest.raises(UblkError) as caught, open_disk(target):
        pass
    return caught.value


def line(text: str, of: str) -> int:
    return next(n for n, line in enumerate(text.splitlines(), 1) if of in line)


# -- what every disk owes ------------------------------------------------------------------


class TestFull(TargetContract):
    args: tuple[str, ...] = ()
    text = FULL

    @pytest.fixture
    def disk(self, make: Make) -> Iterator[Disk]:
        with open_disk(make(self.text, *self.args)) as disk:
            yield disk


class TestNativeFua(TestFull):
    args = ("can_fua=2",)


class TestParallel(TestFull):
    args = ("model=3",)


class TestSmallRequests(TestFull):
    args = ("block_size=4096,4096,8192",)


class TestZeroesAreWritten(TestFull):
    args = (f"fail=zero:{errno.EOPNOTSUPP}",)


class TestFirstApi(TestFull):
    text = FIRST_API


class TestSmallest(TestFull):
    text = SMALLEST


# -- its life ------------------------------------------------------------------------------


def test_each_step_of_its_life_in_order(make: Make) -> None:
    target = make(FULL, "size=2M")
    with open_disk(target) as disk:
        assert disk.size == 2 * MIB
    asked = ["preconnect False", "open False"]
    assert calls(target) == [
        *["config_complete", "get_ready", *asked, "close"],
        *["after_fork", *asked, "close", "cleanup"],
    ]


def test_a_check_opens_and_closes(make: Make) -> None:
    target = make()
    target.open()
    target.close()
    assert calls(target)[-1] == "close"


def test_it_is_told_that_the_device_is_read_only(make: Make) -> None:
    target = make(read_only=True)
    assert geometry(target).read_only
    assert "open True" in calls(target)
    assert target.methods() == {"read"}


def test_a_handle_stays_in_the_thread_that_serves(make: Make, tmp_path: Path) -> None:
    """sqlite3 refuses what another thread has opened."""
    base = tmp_path / "blocks.db"
    connection = sqlite3.connect(base)
    connection.execute("create table disk (data blob)")
    connection.execute("insert into disk values (?)", (bytes(range(256)) * 16,))
    connection.commit()
    connection.close()
    text = f"""
import sqlite3
API_VERSION = 2
def open(readonly):
    return sqlite3.connect({str(base)!r})
def close(h):
    h.close()
def get_size(h):
    return 4096
def pread(h, buf, offset, flags):
    buf[:] = h.execute("select substr(data, ?, ?) from disk", (offset + 1, len(buf))).fetchone()[0]
"""
    target = make(text)
    target.open()
    target.start()
    failed: list[BaseException] = []
    buf = bytearray(512)

    def queue() -> None:
        try:
            target.start_thread()
            target.read(512, memoryview(buf))
            target.stop_thread()
        except BaseException as e:
            failed.append(e)

    thread = threading.Thread(target=queue)
    thread.start()
    thread.join()
    target.stop()
    assert not failed
    assert buf == bytes(range(256)) * 2


def test_a_disk_that_is_another_one_the_second_time(make: Make) -> None:
    text = SMALLEST.replace("return None", "sizes.append(1); return None") + "\nsizes = []\n"
    text = text.replace("return 1 << 20", "return len(sizes) << 20")
    assert "has another disk each time" in refused(make(text)).message


def test_it_is_kept_for_the_next_daemon(make: Make) -> None:
    target = make(FULL, "size=2M", "note=a=b c")
    again = from_dump(DeviceConfig(DeviceOptions({}), target).dump()).target
    assert isinstance(again, NbdkitPythonTarget)
    assert (again.script, again.args) == (target.script, ("size=2M", "note=a=b c"))


def test_the_daemon_sees_the_files_that_arguments_name(make: Make, tmp_path: Path) -> None:
    """Its plugin opens them there once more."""
    (tmp_path / "image").touch()
    target = make(SMALLEST, f"file={tmp_path}/image", f"new={tmp_path}/none", "size=1M", "path=image", "bytes=/\0")
    assert target.paths() == [target.script, tmp_path / "image"]


def test_what_it_prints_is_not_what_the_command_prints(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    make('print("hello")\n' + SMALLEST).open()
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello\n")


def test_the_stdout_of_a_program_is_left_alone(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """It is that of all its threads."""
    thread = threading.Thread(target=make('print("hello")\n' + SMALLEST).open)
    thread.start()
    thread.join()
    assert capsys.readouterr().out == "hello\n"


def test_it_is_compiled_as_it_stands(make: Make) -> None:
    """Without what this package imports from __future__."""
    make("def f(x: int): pass\nassert f.__annotations__['x'] is int\n" + SMALLEST).open()


# -- what its disk can do ------------------------------------------------------------------


ALL = {"read", "write", "flush", "discard", "write_zeroes", "punch_hole"}


@pytest.mark.parametrize(
    ("args", "methods"),
    [
        ((), ALL),
        (("can_write=no",), {"read"}),
        (("can_flush=no",), ALL - {"flush"}),
        (("can_trim=no",), ALL - {"discard"}),
        (("can_zero=no",), ALL - {"write_zeroes", "punch_hole"}),
        (("can_fua=0",), ALL),
        (("can_fua=2",), ALL | {"write_fua"}),
        (("can_fua=2", "can_flush=no"), ALL - {"flush"}),
    ],
    ids=str,
)
def test_abilities(make: Make, args: tuple[str, ...], methods: set[str]) -> None:
    target = make(FULL, *args)
    found = geometry(target)
    assert target.methods() == methods
    assert found.read_only is ("write" not in methods)
    assert found.write_cache is ("flush" in methods)
    assert found.max_discard_bytes == (64 * MIB if "discard" in methods else 0)
    assert found.max_write_zeroes_bytes == (64 * MIB if "write_zeroes" in methods else 0)


def test_the_smallest_plugin(make: Make) -> None:
    target = make(SMALLEST)
    found = geometry(target)
    assert target.methods() == {"read"}
    assert (found.size, found.logical_block, found.io_min, found.rotational) == (MIB, 512, 4096, False)


def test_block_sizes(make: Make) -> None:
    found = geometry(make(FULL, "block_size=1024,65536,0", "rotational=yes"))
    assert (found.logical_block, found.physical_block, found.io_min, found.io_opt) == (1024, 4096, 65536, 65536)
    assert found.rotational
    assert geometry(make(FULL, "block_size=1,512,0")).logical_block == 512
    assert geometry(make(FULL, logical_block_size=4096)).logical_block == 4096


def test_requests_above_the_maximum_come_in_pieces(make: Make, opened: Opened) -> None:
    target = make(FULL, "block_size=512,4096,4096", "can_fua=2")
    disk = opened(target)
    disk.write(512, bytes(9000 // 512 * 512), durable=True)
    disk.read(0, 8192)
    assert calls(target) == [
        *["pwrite 4096 512 2", "pwrite 4096 4608 2", "pwrite 512 8704 2"],
        *["pread 4096 0 0", "pread 4096 4096 0"],
    ]


@pytest.mark.parametrize(("model", "way"), [(0, Way.PLAIN), (1, Way.PLAIN), (2, Way.PLAIN), (3, Way.BLOCKING)], ids=str)
def test_thread_models(make: Make, model: int, way: Way) -> None:
    target = make(FULL, f"model={model}")
    target.open()
    assert handlers.way(target) is way


def test_one_thread_only(make: Make) -> None:
    assert "wants all its requests from one thread" in refused(make(FULL, "model=0", queues=2)).message


def test_several_threads_one_at_a_time(make: Make) -> None:
    text = """
import time
API_VERSION = 2
inside = []
def open(readonly):
    opened.append(1)
opened = []
def close(h):
    opened.append(-1)
def get_size(h):
    return 1 << 20
def pread(h, buf, offset, flags):
    assert not inside
    inside.append(1)
    time.sleep(0.001)
    inside.pop()
"""
    target = make(text, threads_per_queue=4)
    target.open()
    target.start()
    failed: list[BaseException] = []

    def queue() -> None:
        try:
            target.start_thread()
            both.wait()
            for _ in range(20):
                target.read(0, memoryview(bytearray(512)))
            target.stop_thread()
        except BaseException as e:
            failed.append(e)

    both = threading.Barrier(4)
    threads = [threading.Thread(target=queue) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    target.stop()
    assert not failed
    assert vars(target._script._module)["opened"] == [1, -1, 1, -1]


# -- flags ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said", "called"),
    [
        (["can_fua=2"], {}, ["pwrite 512 0 2", "pwrite 512 0 0", "flush 0"]),
        (["can_fua=1"], {}, ["pwrite 512 0 0", "flush 0", "pwrite 512 0 0", "flush 0"]),
        (["can_fua=0"], {}, ["pwrite 512 0 0", "flush 0", "pwrite 512 0 0", "flush 0"]),
        (["can_fua=2", "can_flush=no"], {}, ["pwrite 512 0 2", "pwrite 512 0 2"]),
        (["can_fua=1", "can_flush=no"], {}, ["pwrite 512 0 0", "pwrite 512 0 0"]),
        (["can_fua=2"], {"write_cache": False}, ["pwrite 512 0 2", "pwrite 512 0 2"]),
        (["can_fua=1"], {"write_cache": False}, ["pwrite 512 0 0", "flush 0", "pwrite 512 0 0", "flush 0"]),
    ],
    ids=str,
)
def test_durable_writes(
    make: Make, opened: Opened, args: list[str], said: dict[str, object], called: list[str]
) -> None:
    """One with FUA, one without, and a flush where there are such."""
    target = make(FULL, *args, **said)
    disk = opened(target)
    disk.write(0, bytes(512), durable=True)
    disk.write(0, bytes(512))
    disk.flush()
    assert calls(target) == called


def test_zeroes(make: Make, opened: Opened) -> None:
    target = make()
    opened(target)
    target.write_zeroes(0, 4096)
    target.punch_hole(4096, 512)
    target.discard(0, 1024)
    assert calls(target) == ["zero 4096 0 0", "zero 512 4096 1", "trim 1024 0 0"]


def test_durable_zeroes(make: Make, opened: Opened) -> None:
    target = make(FULL, "can_fua=2", write_cache=False)
    opened(target)
    target.punch_hole(4096, 512)
    assert calls(target) == ["zero 512 4096 3"]


def test_zeroes_are_written_where_it_knows_no_better_way(make: Make, opened: Opened) -> None:
    target = make(FULL, "size=4M", f"fail=zero:{errno.EOPNOTSUPP}")
    disk = opened(target)
    disk.write(0, b"x" * 512)
    target.punch_hole(0, 2 * MIB + 512)
    assert calls(target) == [
        *["pwrite 512 0 0", f"pwrite {MIB} 0 0", f"pwrite {MIB} {MIB} 0", f"pwrite 512 {2 * MIB} 0"]
    ]
    assert disk.read(0, 512) == bytes(512)


def test_the_first_api(make: Make, opened: Opened) -> None:
    target = make(FIRST_API)
    disk = opened(target)
    disk.write(0, bytes(512), durable=True)
    disk.flush()
    target.write_zeroes(0, 512)
    target.punch_hole(0, 512)
    target.discard(512, 1024)
    expected = ["pwrite 512 0", "flush", "flush", "zero 512 0 False", "zero 512 0 True", "trim 1024 512"]
    assert calls(target) == expected


@pytest.mark.parametrize("extra", [1, -1])
def test_the_first_api_returns_more_or_less(make: Make, opened: Opened, extra: int) -> None:
    disk = opened(make(FIRST_API.replace("offset + count]\n", f"offset + count + {extra}]\n", 1)))
    if extra > 0:
        assert disk.read(0, 4096) == bytes(4096)
    else:
        with pytest.raises(ValueError, match="pread returned 4095 bytes of 4096"):
            disk.read(0, 4096)


# -- errors of requests --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pread", "pwrite", "flush", "trim", "zero"])
def test_what_it_raises(make: Make, opened: Opened, name: str) -> None:
    def do(disk: Disk, target: NbdkitPythonTarget) -> None:
        match name:
            case "pread":
                disk.read(0, 512)
            case "pwrite":
                disk.write(0, bytes(512))
            case "flush":
                disk.flush()
            case "trim":
                target.discard(0, 512)
            case "zero":
                target.write_zeroes(0, 512)

    target = make(FULL, f"fail={name}:{errno.ENOSPC}")
    disk = opened(target)
    with pytest.raises(OSError, match=f"No space left on device: no {name}") as caught:
        do(disk, target)
    assert caught.value.errno == errno.ENOSPC
    target = make(FULL, f"fail={name}")
    disk = opened(target)
    with pytest.raises(RuntimeError, match=f"no {name}"):  # which is EIO, and in the log
        do(disk, target)


def test_an_errno_that_was_not_needed_is_forgotten(make: Make, opened: Opened) -> None:
    target = make(FULL, "recovers=pread")
    disk = opened(target)
    disk.read(0, 512)
    vars(target._script._module)["said"]["fail"] = "pread"
    with pytest.raises(RuntimeError):
        disk.read(0, 512)


def test_exit_is_an_error_like_others(make: Make, opened: Opened) -> None:
    disk = opened(make(SMALLEST.replace("buf[:] =", "raise SystemExit(1)\n    x =")))
    with pytest.raises(RuntimeError, match="SystemExit"):
        disk.read(0, 512)


# -- errors before there is a device -------------------------------------------------------


def test_what_its_config_raises_is_told_with_the_line(make: Make, tmp_path: Path) -> None:
    e = refused(make(FULL, "bad=unknown"))
    assert e.message == f"{tmp_path}/plugin.py:{line(FULL, 'raise KeyError')}: config failed: KeyError: 'unknown'"
    assert "raise KeyError(value)" in e.hint
    assert "ublkpy" not in e.hint


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def open(readonly:\n", ":1: loading failed: SyntaxError"),
        ("\n1 / 0\n", ":2: loading failed: ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)\n", ":1: loading failed: SystemExit: 3"),
        (SMALLEST.replace("return None", "return no_such"), ":5: open failed: NameError"),
        (SMALLEST.replace("1 << 20", "h.size"), ":8: get_size failed: AttributeError"),
        (SMALLEST + "def thread_model():\n    assert False\n", "thread_model failed: AssertionError"),
        (SMALLEST + "def get_ready():\n    assert False\n", "get_ready failed: AssertionError"),
        (SMALLEST + "def can_write(h):\n    assert False\ndef pwrite(): pass\n", "can_write failed: AssertionError"),
    ],
    ids=lambda value: value[-30:],
)
def test_functions_that_fail(make: Make, text: str, said: str) -> None:
    assert said in refused(make(text)).message


@pytest.mark.parametrize("name", ["open", "get_size", "pread"])
def test_functions_that_are_missing(make: Make, name: str) -> None:
    e = refused(make(SMALLEST.replace(f"def {name}(", "def other(")))
    assert e.message.endswith(f"plugin.py has no function {name}")
    assert "open, get_size, pread" in e.hint


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("1 << 20", "1000", "get_size returned 1000, which is not a multiple of 512"),
        ("1 << 20", "0", "get_size returned 0"),
        ("1 << 20", "'1M'", "get_size returned '1M'"),
        ("VERSION = 2", "VERSION = 3", "is for version 3 of nbdkit's API"),
        ("API", "def thread_model():\n  return 9\nAPI", "thread_model returned 9"),
        ("API", "def block_size(h):\n  return 8192, 8192, 8192\nAPI", "block_size returned (8192, 8192, 8192)"),
        ("API", "def block_size(h):\n  return 512, 1000, 0\nAPI", "block_size returned (512, 1000, 0)"),
        ("API", "def block_size(h):\n  return 1024, 1024, 1536\nAPI", "block_size returned (1024, 1024, 1536)"),
        ("API", "def block_size(h):\n  return 512\nAPI", "block_size returned 512"),
    ],
    ids=lambda value: value[-25:],
)
def test_what_it_returns_is_no_disk(make: Make, old: str, new: str, said: str) -> None:
    e = refused(make(SMALLEST.replace(old, new, 1)))
    assert said in e.message
    assert e.hint


def test_arguments_for_a_plugin_without_config(make: Make) -> None:
    assert "takes no arguments such as size=1M" in refused(make(SMALLEST, "size=1M")).message


def test_a_script_that_is_not_there(tmp_path: Path) -> None:
    e = refused(NbdkitPythonTarget({"script": tmp_path / "none.py"}))
    assert e.message == f"cannot read {tmp_path}/none.py: No such file or directory"


# -- its page ------------------------------------------------------------------------------


def test_the_plugin_on_its_page(make: Make, opened: Opened) -> None:
    (text,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    disk = opened(make(text, "size=64M"))
    assert disk.size == 64 * MIB
    disk.write(4096, b"x" * 512)
    assert disk.read(4096, 512) == b"x" * 512
    assert "unknown parameter siz" in refused(make(text, "siz=1M")).message
