"""Targets in files of people's own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from ublkpy.errors import ExitCode
from ublkpy.tgt import load
from ublkpy.uring.uapi import State

from . import disk, program
from . import load as fio
from .devices import Devices

TEN_LINES = re.findall(r"^```python\n(.*?)^```$", Path("README.md").read_text(), re.M | re.S)[0]


def test_ten_lines_of_python(devices: Devices, scratch: Path) -> None:
    """From the file to a device with an option of its own, recovery, and an upgrade where the kernel has it."""
    (scratch / "ram.py").write_text(TEN_LINES)
    done = program.ublk("add", str(scratch / "ram.py"), "--size", "16M", "--recovery", "queue")
    assert done.status == 0, done.err
    device = devices.adopt(0)
    assert device.queue("../size") == str((16 << 20) // 512)
    disk.write(device.node, 0, disk.pattern(4096))
    assert disk.read(device.node, 0, 4096) == disk.pattern(4096)
    device.kill_daemon()
    done = program.ublk("recover", "-n", "0")
    assert done.status == 0, done.err
    assert device.state is State.LIVE
    assert disk.read(device.node, 0, 4096) == bytes(4096)  # what was in memory is gone
    assert "ram" in program.ublk("list").out


def test_one_that_breaks_meanwhile(devices: Devices, scratch: Path) -> None:
    """``list`` goes on; ``recover`` shows where."""
    path = scratch / "ram.py"
    path.write_text(TEN_LINES)
    assert program.ublk("add", str(path), "--recovery", "queue").status == 0
    device = devices.adopt(0)
    device.kill_daemon()
    path.write_text("1 / 0\n")
    assert "ram" in program.ublk("list").out
    refused = program.ublk("recover", "-n", "0")
    assert refused.status == ExitCode.FAILED
    assert f"{path} cannot be loaded" in refused.err
    assert "line 1" in refused.err
    path.write_text(TEN_LINES)
    assert program.ublk("recover", "-n", "0").status == 0


def test_what_people_begin_with(devices: Devices, scratch: Path) -> None:
    path = scratch / "disk.py"
    assert program.ublk("target", "new", str(path)).status == 0
    assert path.read_text() == load.template().read_text()
    done = program.ublk("add", f"{path}:MyDisk", "-s", "8M")
    assert done.status == 0, done.err
    device = devices.adopt(0)
    fio.verify(device.node, "--ioengine=libaio", "--iodepth=16", "--rw=randrw", "--bs=4k", "--size=4m", "--fsync=64")
    disk.discard(device.node, 0, 65536)


def test_a_file_as_a_program(devices: Devices, scratch: Path) -> None:
    path = scratch / "disk.py"
    assert program.ublk("target", "new", str(path)).status == 0
    done = subprocess.run([sys.executable, path, "--size", "8M"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "/dev/ublkb0\n"), done.stderr
    device = devices.adopt(0)
    assert disk.read(device.node, 0, 4096) == bytes(4096)


def test_in_a_yaml_file(devices: Devices, scratch: Path) -> None:
    (scratch / "ram.py").write_text(TEN_LINES)
    (scratch / "disk.yaml").write_text("target: {type: ./ram.py, size: 8M}\n")
    done = program.ublk("add", "-c", str(scratch / "disk.yaml"))
    assert done.status == 0, done.err
    assert devices.adopt(0).queue("../size") == str((8 << 20) // 512)
