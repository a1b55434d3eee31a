"""The archive, as another program reads it."""

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.vm.cpio import archive

FILES = {"init": (0o755, b"#!/bin/sh\n"), "sub/odd": (0o640, b"12345"), "empty": (0o644, b"")}


def test_layout() -> None:
    data = archive(["sub"], FILES)
    assert len(data) % 4 == 0
    assert data.startswith(b"070701")
    assert data.count(b"070701") == 5
    assert data.rstrip(b"\0").endswith(b"TRAILER!!!")


@pytest.mark.skipif(not shutil.which("busybox"), reason="needs busybox to unpack the archive: scripts/setup vm")
def test_busybox_unpacks_it(tmp_path: Path) -> None:
    unpack = ["busybox", "cpio", "-i", "-d"]
    subprocess.run(unpack, input=archive(["sub"], FILES), cwd=tmp_path, check=True, timeout=10, capture_output=True)
    for name, (mode, content) in FILES.items():
        path = tmp_path / name
        assert path.read_bytes() == content
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert (tmp_path / "sub").is_dir()
