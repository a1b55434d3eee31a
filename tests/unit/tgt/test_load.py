"""Targets of others: where they are found, and what is said of those that are broken."""

from __future__ import annotations

import importlib.util
import os
import py_compile
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ublkpy import config, tgt
from ublkpy.errors import ConfigError, UblkError
from ublkpy.tgt import load

DISK = '''
from ublkpy import Geometry, Size, Target, option

class {name}(Target):
    """A disk."""
    size: Size = option("1M", help="size of the disk")

    def open(self):
        return Geometry(self.size)

    def read(self, offset, buf):
        buf[:] = bytes(len(buf))
'''


@pytest.fixture(autouse=True)
def modules() -> Iterator[None]:
    """What is imported here goes with the test."""
    before, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]
    sys.path[:] = path


def write(path: Path, *names: str, more: str = "") -> Path:
    path.write_text("".join(DISK.format(name=name) for name in names) + more)
    return path


def test_a_file_with_one_target(tmp_path: Path) -> None:
    path = write(tmp_path / "disk.py", "Ram")
    found = tgt.find(str(path))
    assert (found.__name__, found.name, found.__doc__) == ("Ram", "ram", "A disk.")
    assert tgt.find(load.reference(found)) is found
    assert load.reference(found) == f"{path}:Ram"


@pytest.mark.parametrize("said", ["./disk.py", "disk.py", "disk.py:Ram", "sub/../disk.py"])
def test_how_a_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "disk.py", "Ram")
    monkeypatch.chdir(tmp_path)
    assert tgt.find(said).name == "ram"


def test_a_file_with_several(tmp_path: Path) -> None:
    path = write(tmp_path / "disks.py", "Fast", "VerySlowTarget")
    assert tgt.find(f"{path}:Fast").name == "fast"
    assert tgt.find(f"{path}:VerySlowTarget").name == "very-slow"
    with pytest.raises(ConfigError, match="several targets: Fast, VerySlowTarget") as caught:
        tgt.find(str(path))
    assert caught.value.hint.startswith(f"name one: {path}:Fast; ")


def test_a_base_of_others(tmp_path: Path) -> None:
    path = write(tmp_path / "disks.py", "_Base", more="class Mine(_Base): pass\n")
    assert tgt.find(str(path)).name == "mine"
    assert tgt.find(f"{path}:_Base").__name__ == "_Base"


def test_what_it_imports_is_not_its_own(tmp_path: Path) -> None:
    write(tmp_path / "base.py", "Base")
    path = write(tmp_path / "disk.py", more="from base import Base\nclass Mine(Base): pass\n")
    assert tgt.find(str(path)).name == "mine"


def test_one_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "my_disks.py", "Ram")
    monkeypatch.syspath_prepend(tmp_path)
    found = tgt.find("my_disks:Ram")
    assert load.reference(found) == "my_disks:Ram"


def install(folder: Path, name: str, place: str) -> None:
    """As pip does: what importlib.metadata finds."""
    info = folder / "cloud-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cloud\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[ublkpy.targets]\n{name} = {place}\n")


def test_one_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "cloud.py", "Disk")
    install(tmp_path, "cloud-disk", "cloud:Disk")
    monkeypatch.syspath_prepend(tmp_path)
    assert tgt.names() == sorted(["cloud-disk", *load.BUILT_IN])
    assert tgt.find("cloud-disk").__module__ == "cloud"
    with pytest.raises(ConfigError) as caught:
        tgt.find("cloud-dsk")
    assert caught.value.hint == "did you mean cloud-disk?"


def test_a_broken_package_breaks_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cloud.py").write_text("import os\n\n1 / 0\n")
    install(tmp_path, "cloud-disk", "cloud:Disk")
    monkeypatch.syspath_prepend(tmp_path)
    assert "cloud-disk" in tgt.names()
    assert tgt.find("null").name == "null"
    with pytest.raises(UblkError, match="cloud cannot be loaded") as caught:
        tgt.find("cloud-disk")
    assert f'File "{tmp_path}/cloud.py", line 3, in <module>' in caught.value.hint
    assert caught.value.hint.endswith("ZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    ("text", "line", "error"),
    [
        ("import ublkpy\n\nraise KeyError('x')\n", 3, "KeyError: 'x'"),
        ("def broken(:\n", 1, "SyntaxError"),
        ("import there_is_no_such_module\n", 1, "ModuleNotFoundError"),
        ("raise SystemExit('no')\n", 1, "SystemExit: no"),
    ],
)
def test_a_broken_file_shows_where(tmp_path: Path, text: str, line: int, error: str) -> None:
    path = tmp_path / "disk.py"
    path.write_text(text)
    with pytest.raises(UblkError) as caught:
        tgt.find(str(path))
    assert caught.value.message == f"{path} cannot be loaded"
    assert f'File "{path}", line {line}' in caught.value.hint
    assert error in caught.value.hint
    assert "importlib" not in caught.value.hint
    assert load.__file__ not in caught.value.hint


def test_it_can_be_mended_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "disk.py"
    path.write_text("1 / 0\n")
    with pytest.raises(UblkError):
        tgt.find(str(path))
    write(path, "Ram")
    assert tgt.find(str(path)).name == "ram"


def test_it_can_be_edited_meanwhile(tmp_path: Path) -> None:
    path = write(tmp_path / "disk.py", "Ram")
    before = tgt.find(str(path))
    assert tgt.find(str(path)) is before
    write(path, "RamOfTomorrow")
    after = tgt.find(str(path))
    assert after.name == "ram-of-tomorrow"
    assert load.is_found_again(after)
    assert not load.is_found_again(before)


def test_two_files_of_almost_the_same_name(tmp_path: Path) -> None:
    one, other = write(tmp_path / "my-disk.py", "One"), write(tmp_path / "my_disk.py", "Other")
    found = [tgt.find(str(one)), tgt.find(str(other))]
    assert [cls.name for cls in found] == ["one", "other"]
    for cls, path in zip(found, (one, other), strict=True):
        assert load.reference(cls) == f"{path}:{cls.__name__}"
        assert load.is_found_again(cls)
        assert tgt.find(load.reference(cls)) is cls


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("{folder}/nothing.py", "{folder}/nothing.py does not exist"),
        ("{folder}", "{folder} is not a file"),
        ("{folder}/text", "{folder}/text is not a Python file"),
        ("{folder}/empty.py", "there is no target in {folder}/empty.py"),
        ("{folder}/disk.py:Rom", "{folder}/disk.py has no target Rom"),
        ("{folder}/disk.py:Size", "Size of {folder}/disk.py is not a target"),
        ("{folder}/half.py:Half", "target Half of {folder}/half.py has no open method"),
        ("no_such_package.disk:Ram", "there is no module no_such_package"),
        ("ublkpy.errors:Ram", "ublkpy.errors has no target Ram"),
        ("ublkpy.errors:UblkError", "UblkError of ublkpy.errors is not a target"),
    ],
)
def test_what_is_no_target(tmp_path: Path, reference: str, message: str) -> None:
    write(tmp_path / "disk.py", "Ram")
    (tmp_path / "text").touch()
    (tmp_path / "empty.py").touch()
    (tmp_path / "half.py").write_text("from ublkpy import Target\nclass Half(Target): pass\n")
    with pytest.raises(ConfigError) as caught:
        tgt.find(reference.format(folder=tmp_path))
    assert caught.value.message == message.format(folder=tmp_path)


def test_a_class_that_nobody_finds_again() -> None:
    from ublkpy.tgt.null import NullTarget

    class Local(NullTarget):
        pass

    assert not load.is_found_again(Local)
    assert load.is_found_again(NullTarget)
    config.DeviceConfig(config.DeviceOptions({"recovery": "none"}), Local())
    with pytest.raises(ConfigError, match="a next daemon could not find target local"):
        config.DeviceConfig(config.DeviceOptions({"recovery": "queue"}), Local())


# -- in a file ------------------------------------------------------------------------------


def test_a_yaml_file_names_one_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "disk.py", "Ram").chmod(0o644)
    (tmp_path / "disk.yaml").write_text("target: {type: ./disk.py, size: 2M}\n")
    tmp_path.chmod(0o755)
    made = config.build(config.Draft(), config.read_yaml(tmp_path / "disk.yaml"))
    assert made.target.dump() == {"size": 2 << 20}
    assert config.from_dump(made.dump()).dump() == made.dump()


@pytest.mark.skipif(os.geteuid() != 0, reason="others' files are none of our concern")
@pytest.mark.parametrize("whose", ["file", "folder", "owner"])
def test_root_takes_no_code_from_others_that_a_file_names(tmp_path: Path, whose: str) -> None:
    path = write(tmp_path / "disk.py", "Ram")
    (tmp_path / "disk.yaml").write_text("target: {type: ./disk.py}\n")
    match whose:
        case "file":
            path.chmod(0o666)
        case "folder":
            tmp_path.chmod(0o777)
        case "owner":
            os.chown(path, 65534, 65534)
    with pytest.raises(UblkError, match="is code that others than root can change") as caught:
        config.read_yaml(tmp_path / "disk.yaml")
    assert "chmod go-w" in caught.value.hint
    tgt.find(str(path))  # said on the command line, it is root's own choice


def others_folder(tmp_path: Path, code: Path) -> Path:
    """A folder of another user, with a link to root's file, and with what that user would have root run beside it."""
    folder = tmp_path / "theirs"
    (folder / "__pycache__").mkdir(parents=True)
    (folder / "disk.py").symlink_to(code)
    bad = write(tmp_path / "bad.py", "Bad")
    os.utime(bad, (code.stat().st_atime, code.stat().st_mtime))
    compiled = importlib.util.cache_from_source(str(folder / "disk.py"))
    py_compile.compile(
        str(bad), cfile=compiled, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH, doraise=True
    )
    (folder / "helper.py").write_text("raise SystemExit('theirs')\n")
    (folder / "disk.yaml").write_text("target: {type: ./disk.py}\n")
    for place in (folder, *folder.rglob("*")):
        os.chown(place, 65534, 65534, follow_symlinks=False)
    return folder


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to fear others")
def test_a_link_of_another_user_leads_to_the_file_and_to_nothing_beside_the_link(tmp_path: Path) -> None:
    code = write(tmp_path / "disk.py", "Ram")
    code.chmod(0o644)
    tmp_path.chmod(0o755)
    folder = others_folder(tmp_path, code)
    draft = config.read_yaml(folder / "disk.yaml")
    assert draft.target_type == f"{code}:Ram"
    assert str(folder) not in sys.path
    assert config.build(config.Draft(), draft).target.name == "ram"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to fear others")
@pytest.mark.parametrize("mode", [0o1777, 0o1775])
def test_a_folder_for_all_is_no_place_for_code(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(mode)
    write(folder / "disk.py", "Ram").chmod(0o644)
    (tmp_path / "disk.yaml").write_text("target: {type: ./shared/disk.py}\n")
    with pytest.raises(UblkError, match="can be written by them") as caught:
        config.read_yaml(tmp_path / "disk.yaml")
    assert caught.value.hint == "put the file elsewhere"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to fear others")
def test_bytecode_of_another_user(tmp_path: Path) -> None:
    code = write(tmp_path / "disk.py", "Ram")
    code.chmod(0o644)
    tmp_path.chmod(0o755)
    (tmp_path / "__pycache__").mkdir()
    os.chown(tmp_path / "__pycache__", 65534, 65534)
    (tmp_path / "disk.yaml").write_text("target: {type: ./disk.py}\n")
    with pytest.raises(UblkError, match="__pycache__ can be written by them"):
        config.read_yaml(tmp_path / "disk.yaml")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to fear others")
def test_a_script_behind_a_link_of_another_user(tmp_path: Path) -> None:
    script = tmp_path / "plugin.py"
    script.write_text("")
    script.chmod(0o644)
    tmp_path.chmod(0o755)
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "plugin.py").symlink_to(script)
    (folder / "disk.yaml").write_text("target: {type: nbdkit-python, script: plugin.py}\n")
    os.chown(folder, 65534, 65534)
    assert config.read_yaml(folder / "disk.yaml").target["script"] == script  # and the link may change afterwards
    (folder / "plugin.py").unlink()
    with pytest.raises(UblkError, match="can be written by them"):  # nor is one taken that comes only later
        config.read_yaml(folder / "disk.yaml")
