"""``ublk target``, and a target's file as a program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ublkpy import tgt
from ublkpy.errors import ExitCode
from ublkpy.tgt import load

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def ublk(tmp_path: Path) -> Run:
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ublkpy", *args],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            timeout=60,
        )

    return run


def install(folder: Path, text: str) -> None:
    (folder / "cloud.py").write_text(text)
    info = folder / "cloud-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cloud\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ublkpy.targets]\ncloud-disk = cloud:Disk\n")


def test_list(ublk: Run) -> None:
    done = ublk("target", "list")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["NAME", "FROM", "WHAT", "IT", "IS"]
    assert [line.split()[:2] for line in lines[1:]] == [[name, "ublkpy"] for name in tgt.names()]
    assert "Several files, block devices or targets, one after the other." in lines[1]


def test_list_with_a_broken_one(ublk: Run, tmp_path: Path) -> None:
    install(tmp_path, "1 / 0\n")
    done = ublk("target", "list")
    assert (done.returncode, done.stderr) == (0, "")
    assert "cloud-disk     cloud   broken: cloud cannot be loaded" in done.stdout
    found = json.loads(ublk("target", "list", "--json").stdout)["targets"]
    assert {"name": "cloud-disk", "from": "cloud", "error": "cloud cannot be loaded"} in found
    refused = ublk("target", "show", "cloud-disk")
    assert refused.returncode == ExitCode.FAILED
    assert "ZeroDivisionError" in refused.stderr
    assert ublk("help", "-t", "null").returncode == 0


def test_show(ublk: Run) -> None:
    done = ublk("target", "show", "loop")
    assert done.returncode == 0
    assert done.stdout.startswith("loop: A file or block device as a block device.\n")
    assert "required" in next(line for line in done.stdout.splitlines() if line.startswith("file"))
    assert done.stdout.endswith("ublk add loop --file PATH\n")
    found = json.loads(ublk("target", "show", "loop", "--json").stdout)["target"]
    assert found["type"] == "loop"
    assert found["methods"] == []
    assert {"name": "offset", "kind": "SECTORS", "default": 0, "required": False} | {
        "help": found["options"][1]["help"]
    } == found["options"][1]


def test_show_knows_what_is_meant(ublk: Run) -> None:
    done = ublk("target", "show", "lop")
    assert (done.returncode, done.stdout) == (ExitCode.USAGE, "")
    assert "did you mean loop?" in done.stderr


def test_new_and_show(ublk: Run, tmp_path: Path) -> None:
    done = ublk("target", "new", "disk.py")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "wrote disk.py; try it: ublk add ./disk.py\n"
    assert (tmp_path / "disk.py").read_text() == load.template().read_text()
    shown = json.loads(ublk("target", "show", "./disk.py", "--json").stdout)["target"]
    assert shown["name"] == "my-disk"
    assert shown["methods"] == ["discard", "flush", "read", "write", "write_zeroes"]
    again = ublk("target", "new", "disk.py")
    assert (again.returncode, "exists already" in again.stderr) == (ExitCode.USAGE, True)


@pytest.mark.parametrize(
    ("file", "status", "message"),
    [
        ("disk", ExitCode.USAGE, "disk does not end with .py"),
        ("no/where/disk.py", ExitCode.FAILED, "cannot write no/where/disk.py: No such file or directory"),
    ],
)
def test_new_where_it_cannot_be(ublk: Run, file: str, status: ExitCode, message: str) -> None:
    done = ublk("target", "new", file)
    assert (done.returncode, done.stdout) == (status, "")
    assert f"ublk: error: {message}" in done.stderr


def test_a_file_as_a_program(ublk: Run, tmp_path: Path) -> None:
    ublk("target", "new", "disk.py")

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "disk.py", *args], capture_output=True, text=True, cwd=tmp_path)

    shown = run("--help")
    assert shown.returncode == 0
    assert shown.stdout.startswith("Usage: disk.py [OPTIONS]\n\n  A disk in memory")
    assert "Options of target my-disk" in shown.stdout
    assert "--size" in shown.stdout
    wrong = run("--size", "5000")
    assert wrong.returncode == ExitCode.USAGE
    assert "not a multiple of 4096" in wrong.stderr
