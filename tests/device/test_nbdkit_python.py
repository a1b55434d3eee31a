"""Plugins for nbdkit as real disks."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from ublkpy.config import DeviceConfig, DeviceOptions
from ublkpy.errors import ExitCode, UblkError
from ublkpy.life.add import add
from ublkpy.tgt.nbdkit_python import NbdkitPythonTarget
from ublkpy.uring.uapi import State

from . import disk, kernel, load, program
from .devices import MIB, Device, Devices, until

pytestmark = pytest.mark.any_kernel

PAGE = Path(__file__).parents[2] / "docs/targets/nbdkit-python.md"

RAM = """
import nbdkit

API_VERSION = 2
said = {"size": "8M", "model": nbdkit.THREAD_MODEL_SERIALIZE_ALL_REQUESTS, "fua": nbdkit.FUA_NATIVE}

def config(key, value):
    said[key] = value

def config_complete():
    global data, calls
    data = bytearray(nbdkit.parse_size(said["size"]))
    calls = []

def thread_model():
    return int(said["model"])

def open(readonly):
    calls.append(f"open {readonly}")
    return data

def get_size(h):
    return len(h)

def can_fua(h):
    return int(said["fua"])

def pread(h, buf, offset, flags):
    buf[:] = h[offset : offset + len(buf)]

def pwrite(h, buf, offset, flags):
    calls.append(f"pwrite {len(buf)} {offset} {flags}")
    h[offset : offset + len(buf)] = buf

def flush(h, flags):
    calls.append("flush")

def trim(h, count, offset, flags):
    calls.append(f"trim {count} {offset} {flags}")
    h[offset : offset + count] = bytes(count)

def zero(h, count, offset, flags):
    calls.append(f"zero {count} {offset} {flags}")
    h[offset : offset + count] = bytes(count)
"""

# Shows in its last block what was called.
TELLING = RAM.replace(
    "def pread(h, buf, offset, flags):\n",
    """def pread(h, buf, offset, flags):
    if offset == len(h) - 4096:
        h[offset:] = "\\n".join(calls).encode().ljust(4096, b"\\0")
""",
)

GENERATOR = """
def open(readonly):
    return None

def get_size(h):
    return 1 << 20

def pread(h, count, offset):
    return b"".join(n.to_bytes(512, "little") for n in range(offset // 512, (offset + count) // 512))
"""

FILE = """
import os
import nbdkit

API_VERSION = 2

def config(key, value):
    global name
    if key != "file":
        raise RuntimeError("unknown parameter: " + key)
    name = value

def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL

def open(readonly):
    return os.open(name, os.O_RDONLY if readonly else os.O_RDWR)

def close(h):
    os.close(h)

def get_size(h):
    return os.stat(h).st_size

def pread(h, buf, offset, flags):
    if os.preadv(h, [buf], offset) != len(buf):
        raise RuntimeError("short read")

def pwrite(h, buf, offset, flags):
    if os.pwritev(h, [buf], offset) != len(buf):
        raise RuntimeError("short write")

def flush(h, flags):
    os.fdatasync(h)
"""

FAILING = """
import errno
import nbdkit

API_VERSION = 2

def open(readonly):
    return None

def get_size(h):
    return 1 << 20

def pread(h, buf, offset, flags):
    if offset == 0:
        nbdkit.set_error(errno.ENOSPC)
        raise RuntimeError("full")
    if offset == 4096:
        raise RuntimeError("a bug")
    if offset == 8192:
        raise OSError(errno.ENOLINK, "away")
    buf[:] = bytes(len(buf))
"""


def plugin(scratch: Path, text: str) -> Path:
    path = scratch / "plugin.py"
    path.write_text(text)
    return path


def serve(devices: Devices, scratch: Path, text: str, *args: str, **options: object) -> Device:
    target = NbdkitPythonTarget({"script": plugin(scratch, text), "args": args})
    return devices.adopt(add(DeviceConfig(DeviceOptions(options), target)))


def called(device: Device) -> list[str]:
    end = int((device.sysfs / "size").read_text()) * 512
    return disk.read(device.node, end - 4096, 4096).rstrip(b"\0").decode().splitlines()


@pytest.mark.parametrize("mode", ["auto", "copy", "user-copy"])
@pytest.mark.parametrize("model", [1, 3], ids=["serialized", "parallel"])
def test_what_fio_writes_is_there(devices: Devices, scratch: Path, model: int, mode: str) -> None:
    device = serve(devices, scratch, RAM, f"model={model}", mode=mode)
    load.verify(device.node, "--ioengine=libaio", "--iodepth=32", "--rw=randrw", "--bsrange=4k-64k", "--size=4m")


@pytest.mark.parametrize("model", [1, 3], ids=["serialized", "parallel"])
def test_over_several_queues(devices: Devices, scratch: Path, model: int) -> None:
    device = serve(devices, scratch, RAM, f"model={model}", queues=2)
    mixed = ("--ioengine=libaio", "--iodepth=16", "--rw=randrw", "--bs=4k", "--size=2m")
    load.verify(device.node, *mixed, "--numjobs=2", "--offset_increment=4m")


def test_a_file_system(devices: Devices, scratch: Path) -> None:
    device = serve(devices, scratch, RAM)
    kernel.keep_file(device.node, scratch / "mnt", disk.pattern(MIB))


def test_a_file_with_many_requests_at_once(devices: Devices, scratch: Path) -> None:
    image = disk.image(scratch / "disk.img", 8 * MIB)
    device = serve(devices, scratch, FILE, f"file={image}")
    load.verify(device.node, "--ioengine=libaio", "--iodepth=32", "--rw=randrw", "--bs=4k", "--size=4m")
    disk.write(device.node, 4 * MIB, disk.pattern(MIB))
    disk.flush(device.node)
    assert image.read_bytes()[4 * MIB : 5 * MIB] == disk.pattern(MIB)


@pytest.mark.parametrize("model", [1, 3], ids=["serialized", "parallel"])
@pytest.mark.parametrize(
    ("fua", "durable"),
    [(1, ["pwrite 4096 8192 0", "flush"]), (2, ["pwrite 4096 8192 2"])],
    ids=["emulated", "native"],
)
def test_flags_of_writes(devices: Devices, scratch: Path, model: int, fua: int, durable: list[str]) -> None:
    device = serve(devices, scratch, TELLING, f"fua={fua}", f"model={model}")
    assert device.queue("write_cache") == "write back"
    disk.write(device.node, 0, bytes(4096))
    disk.flush(device.node)
    disk.write(device.node, 8192, bytes(4096), os.O_DSYNC)
    expected = ["open False", "open False", "pwrite 4096 0 0", "flush", *durable]
    found = called(device)
    assert found[: len(expected)] == expected
    assert found[len(expected) :] in ([], ["flush"])  # the block layer may add one to what O_DSYNC has written


@pytest.mark.parametrize("model", [1, 3], ids=["serialized", "parallel"])
def test_flags_of_zeroes(devices: Devices, scratch: Path, model: int) -> None:
    device = serve(devices, scratch, TELLING, f"model={model}")
    disk.zero_allocated(device.node, 65536, 4096)
    disk.zero_unmapped(device.node, 4096, 8192)
    disk.discard(device.node, 0, 4096)
    assert called(device)[2:] == ["zero 4096 65536 0", "zero 8192 4096 1", "trim 4096 0 0"]


def test_without_a_write_cache_each_write_is_durable(devices: Devices, scratch: Path) -> None:
    device = serve(devices, scratch, TELLING, write_cache=False)
    assert device.queue("write_cache") == "write through"
    disk.write(device.node, 0, bytes(4096))
    assert called(device)[2:] == ["pwrite 4096 0 2"]


def test_a_generator_of_the_first_api(devices: Devices, scratch: Path) -> None:
    device = serve(devices, scratch, GENERATOR)
    assert (device.sysfs / "ro").read_text() == "1\n"
    assert (device.queue("discard_max_bytes"), device.queue("write_zeroes_max_bytes")) == ("0", "0")
    assert disk.read(device.node, 512 * 77, 1024) == (77).to_bytes(512, "little") + (78).to_bytes(512, "little")


@pytest.mark.logs
def test_what_it_raises_is_the_answer(devices: Devices, scratch: Path) -> None:
    device = serve(devices, scratch, FAILING, log=scratch / "log")
    log = (scratch / "log").read_text
    for place, err in ((0, errno.ENOSPC), (8192, errno.ENOLINK), (4096, errno.EIO)):
        with pytest.raises(OSError, match=os.strerror(err)):
            disk.read(device.node, place, 4096)
    assert 'plugin.py", line' in log()
    assert "RuntimeError: a bug" in log()
    assert disk.read(device.node, 16384, 4096) == bytes(4096)


def test_what_is_wrong_is_told_before_there_is_a_device(devices: Devices, scratch: Path) -> None:
    with pytest.raises(UblkError, match=r"plugin\.py:10: config failed: RuntimeError: unknown parameter: fil"):
        serve(devices, scratch, FILE, "fil=x")


def test_one_that_opens_only_once(devices: Devices, scratch: Path) -> None:
    """The second open is in a thread of the daemon, and fails the command all the same."""
    text = RAM.replace("    return data\n", "    assert len(calls) < 2, 'only once'\n    return data\n")
    with pytest.raises(UblkError, match="open failed: AssertionError: only once"):
        serve(devices, scratch, text)


def test_from_the_command_line_and_back_after_a_crash(devices: Devices, scratch: Path) -> None:
    (text,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    path = plugin(scratch, text)
    done = program.ublk("add", "-t", "nbdkit-python", "--script", str(path), "size=16M", "--recovery", "queue")
    assert (done.status, done.out) == (0, "/dev/ublkb0\n"), done.err
    device = devices.adopt(0)
    assert int((device.sysfs / "size").read_text()) == 16 * MIB // 512
    disk.write(device.node, 0, disk.pattern(4096))
    assert disk.read(device.node, 0, 4096) == disk.pattern(4096)
    listed = program.ublk("list").out
    assert "nbdkit-python" in listed
    assert str(path) in listed
    device.kill_daemon()
    assert program.ublk("recover", "-n", "0").status == 0
    assert device.state is State.LIVE
    assert disk.read(device.node, 0, 4096) == bytes(4096)  # what was in memory is gone


def test_from_a_file(devices: Devices, scratch: Path) -> None:
    plugin(scratch, RAM)
    (scratch / "disk.yaml").write_text("target: {type: nbdkit-python, script: plugin.py, args: [size=1M]}\n")
    (scratch / "plugin.py").chmod(0o666)
    refused = program.ublk("add", "-c", str(scratch / "disk.yaml"))
    assert refused.status == ExitCode.FAILED
    assert "is code that others than root can change" in refused.err
    (scratch / "plugin.py").chmod(0o644)
    done = program.ublk("add", "-c", str(scratch / "disk.yaml"))
    assert done.status == 0, done.err
    assert int((devices.adopt(0).sysfs / "size").read_text()) == MIB // 512


def test_it_can_end_its_device(devices: Devices, scratch: Path) -> None:
    text = RAM + "\ndef flush(h, flags):\n    nbdkit.shutdown()\n"
    device = serve(devices, scratch, text)
    disk.flush(device.node)
    until(lambda: not device.exists(), "the device goes")
