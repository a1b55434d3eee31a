"""The examples' methods, called as a daemon calls them; tests/device/test_examples.py has the devices."""

from __future__ import annotations

import ast
import errno
import os
import random
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from tests import examples
from tests.examples import FILES, FOLDER, NbdServer, WebServer, example, serving
from ublkpy.errors import UblkError
from ublkpy.testing import Disk, TargetContract, open_disk
from ublkpy.tgt import handlers
from ublkpy.tgt.base import Target
from ublkpy.uring.map import Null, Routing

MIB = 1 << 20
DATA = random.Random(0).randbytes(MIB)

Options = Callable[[], dict[str, object]]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    found = tmp_path / "image"
    found.touch()
    os.truncate(found, 4 * MIB)
    return found


@pytest.fixture
def key(tmp_path: Path) -> Path:
    found = tmp_path / "key"
    found.write_bytes(b"correct horse battery staple")
    return found


@pytest.fixture
def web() -> Iterator[WebServer]:
    with serving(WebServer(DATA)) as server:
        yield server


@pytest.fixture
def nbd() -> Iterator[NbdServer]:
    with serving(NbdServer(4 * MIB)) as server:
        yield server


@pytest.fixture
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Target]:
    """An example, with what it takes."""

    def make(name: str) -> Target:
        match name:
            case "sqlite_disk" | "compressed":
                return example(name, file=tmp_path / "disk.db", size=4 * MIB)
            case "encrypted":
                return example(name, file=request.getfixturevalue("image"), key_file=request.getfixturevalue("key"))
            case "http_disk":
                return example(name, url=request.getfixturevalue("web").url)
            case "rpc_buffer":
                return example(name, port=request.getfixturevalue("nbd").port)
        return example(name, size=4 * MIB)

    return make


Make = Callable[[str], Target]
Opened = Callable[[str], AbstractContextManager[Disk]]


@pytest.fixture
def opened(make: Make) -> Opened:
    return lambda name: open_disk(make(name))


class TestContract(TargetContract):
    """event and null have no methods to call."""

    @pytest.fixture(params=["ram", "sqlite_disk", "encrypted", "compressed", "http_disk", "rpc_buffer"])
    def disk(self, request: pytest.FixtureRequest, opened: Opened) -> Iterator[Disk]:
        with opened(request.param) as disk:
            yield disk


@pytest.mark.parametrize("name", ["sqlite_disk", "encrypted", "compressed"])
def test_what_was_written_is_there_again(opened: Opened, name: str) -> None:
    with opened(name) as disk:
        disk.write(MIB, DATA[:65536])
        disk.flush()
    with opened(name) as disk:
        assert disk.read(MIB, 65536) == DATA[:65536]


@pytest.mark.parametrize("name", ["ram", "sqlite_disk", "compressed"])
def test_a_new_disk_is_empty(opened: Opened, name: str) -> None:
    with opened(name) as disk:
        assert disk.read(0, disk.size) == bytes(disk.size)


# -- sqlite_disk ---------------------------------------------------------------------------


def rows(file: Path) -> int:
    db = sqlite3.connect(file)
    (found,) = db.execute("SELECT count(*) FROM blocks").fetchone()
    db.close()
    return int(found)


def test_sqlite_commits_with_a_flush(opened: Opened, tmp_path: Path) -> None:
    with opened("sqlite_disk") as disk:
        disk.write(8192, bytes(16384))
        assert rows(tmp_path / "disk.db") == 0
        disk.flush()
        assert rows(tmp_path / "disk.db") == 4
        disk.discard(8192, 8192)
        disk.flush()
        assert rows(tmp_path / "disk.db") == 2


@pytest.mark.parametrize("name", ["sqlite_disk", "compressed"])
def test_sqlite_refuses_another_file(opened: Opened, name: str, tmp_path: Path) -> None:
    (tmp_path / "disk.db").write_bytes(DATA)
    with pytest.raises(UblkError, match="failed in ") as caught, opened(name):
        pass
    assert "file is not a database" in caught.value.hint


# -- http_disk -----------------------------------------------------------------------------


def test_http_reads_parts_and_keeps_them(make: Make, web: WebServer) -> None:
    with open_disk(make("http_disk")) as disk:
        assert disk.size == MIB
        assert disk.read_only
        assert disk.read(65536 - 4096, 8192) == DATA[65536 - 4096 :][:8192]
        assert sorted(filter(None, web.ranges)) == [(0, 0), (0, 65535), (65536, 131071)]
        assert disk.read(0, 131072) == DATA[:131072]
        assert len(web.ranges) == 3
        assert disk.together([("read", MIB - 4096 * n, 4096) for n in range(1, 9)])[0] == DATA[-4096:]
        assert len(web.ranges) == 4


def test_http_forgets_what_was_not_used_for_longest(web: WebServer) -> None:
    with open_disk(example("http_disk", url=web.url, cached=2)) as disk:
        for block in (0, 1, 0, 2, 0, 1):
            assert disk.read(block * 65536, 4096) == DATA[block * 65536 :][:4096]
    assert [place and place[0] // 65536 for place in web.ranges[1:]] == [0, 1, 2, 1]


def test_http_asks_again_after_a_failure(make: Make, web: WebServer, caplog: pytest.LogCaptureFixture) -> None:
    with open_disk(make("http_disk")) as disk:
        web.fails = True
        with pytest.raises(OSError, match="503"):
            disk.read(0, 4096)
        web.fails = False
        assert disk.read(0, 4096) == DATA[:4096]


def test_http_size_that_is_no_multiple_of_a_sector() -> None:
    with serving(WebServer(DATA[:100_000])) as web, open_disk(example("http_disk", url=web.url)) as disk:
        assert disk.size == 99_840
        assert disk.read(0, disk.size) == DATA[:99_840]


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/x", "http://nothing.invalid/x", "ftp://127.0.0.1/x", "disk.img"])
def test_http_needs_a_server(url: str) -> None:
    with pytest.raises(UblkError, match=re.escape(f"cannot read {url}")), open_disk(example("http_disk", url=url)):
        pass


# -- encrypted -----------------------------------------------------------------------------


def xts(key: bytes, sector: int, plain: bytes) -> bytes:
    """AES-XTS once more, by the standard's text (IEEE 1619) and from single blocks of AES."""
    aes = [Cipher(algorithms.AES(half), modes.ECB()).encryptor() for half in (key[:32], key[32:])]
    tweak, done = int.from_bytes(aes[1].update(sector.to_bytes(16, "little")), "little"), b""
    for n in range(0, len(plain), 16):
        mask = tweak.to_bytes(16, "little")
        mixed = bytes(a ^ b for a, b in zip(plain[n : n + 16], mask, strict=True))
        done += bytes(a ^ b for a, b in zip(aes[0].update(mixed), mask, strict=True))
        tweak = (tweak << 1) ^ (0x87 | 1 << 128 if tweak >> 127 else 0)
    return done


def test_encrypted_is_aes_xts(make: Make, image: Path) -> None:
    target = make("encrypted")
    with open_disk(target) as disk:
        assert disk.size == 4 * MIB - 4096
        disk.write(8192, DATA[:4096] + DATA[:4096])
        disk.flush()
    stored = image.read_bytes()[4096 + 8192 :][:8192]
    assert stored == b"".join(xts(vars(target)["key"], sector, DATA[:4096]) for sector in (16, 24))


def test_encrypted_knows_a_wrong_key(opened: Opened, key: Path, image: Path) -> None:
    with opened("encrypted") as disk:
        disk.write(0, DATA[:4096])
    before = image.read_bytes()
    key.write_bytes(b"incorrect horse")
    with pytest.raises(UblkError, match="not the key"), opened("encrypted"):
        pass
    assert image.read_bytes() == before


@pytest.mark.parametrize("size", [0, 100, 4096, 8191])
def test_encrypted_leaves_a_file_alone_that_is_too_short(opened: Opened, image: Path, size: int) -> None:
    image.write_bytes(bytes(size))
    with pytest.raises(UblkError) as caught, opened("encrypted"):
        pass
    assert caught.value.hint == "a new one is 8192 or more zeroes"
    assert image.read_bytes() == bytes(size)


def test_encrypted_takes_no_file_of_others(opened: Opened, image: Path) -> None:
    image.write_bytes(DATA)
    with pytest.raises(UblkError, match="or no disk"), opened("encrypted"):
        pass
    assert image.read_bytes() == DATA


# -- compressed ----------------------------------------------------------------------------


def test_compressed_is_smaller(opened: Opened, tmp_path: Path) -> None:
    with opened("compressed") as disk:
        disk.write(0, b"0123456789abcdef" * (MIB // 16))
        disk.flush()
        assert disk.read(MIB - 4096, 4096) == b"0123456789abcdef" * 256
    assert (tmp_path / "disk.db").stat().st_size < MIB // 10


# -- rpc_buffer ----------------------------------------------------------------------------


def test_rpc_sends_the_buffer_that_it_gave(make: Make, nbd: NbdServer) -> None:
    with open_disk(make("rpc_buffer")) as disk:
        disk.write(4096, DATA[:65536])
        disk.flush()
        assert nbd.data[4096:][:65536] == DATA[:65536]
        assert disk.read(4096, 65536) == DATA[:65536]
    assert nbd.commands == [1, 3, 0]


def test_rpc_that_ends(make: Make, nbd: NbdServer) -> None:
    target = make("rpc_buffer")
    with open_disk(target) as disk:
        vars(target)["socket"].shutdown(2)
        with pytest.raises(OSError, match="Broken pipe") as caught:
            disk.write(0, DATA[:4096])
        assert caught.value.errno == errno.EPIPE


# -- null ----------------------------------------------------------------------------------


def test_null_never_asks(make: Make) -> None:
    found = handlers.make_map(make("null"), MIB)
    assert [extent.routing for extent in found.extents()] == [Routing.all(Null())]
    found.close()


# -- all of them ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_is_short_and_says_how_to_try_it(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 60
    said = ast.get_docstring(ast.parse(text)) or ""
    assert f"ublk add examples/{path.name}" in said
    shown = subprocess.run(
        [sys.executable, "-m", "ublkpy", "help", "-t", path], capture_output=True, text=True, check=False
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert '\nif __name__ == "__main__":\n    main(' in text


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_page_has_it(path: Path) -> None:
    page = (FOLDER.parent / "docs/examples.md").read_text()
    assert f"](../examples/{path.name})" in page
    assert examples.path(path.stem) == str(path)
