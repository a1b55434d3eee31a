"""Rules that hold for the whole tree: who may import what, how long a module may be, what must be documented."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ublkpy
from ublkpy import tgt
from ublkpy.config import DeviceOptions, Draft, build, read_yaml
from ublkpy.tgt.options import Option, parse_size

PACKAGE = Path(ublkpy.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(PACKAGE.rglob("*.py"))
EXAMPLES = sorted((ROOT / "conf").glob("*.yaml"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[str]:
    """The full names of what a module imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importers(*wanted: str) -> set[str]:
    """The modules that import one of these or something in it."""
    return {
        name(path)
        for path in MODULES
        if any(found == one or found.startswith(f"{one}.") for found in imports(path) for one in wanted)
    }


# -- modules -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*MODULES, *sorted(PACKAGE.rglob("*.[ch]"))], ids=name)
def test_module_is_short_enough_to_be_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 600


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_only_the_command_line_knows_click() -> None:
    assert importers("click") == {"ublkpy/cli.py", "ublkpy/cli_target.py", "ublkpy/cli_options.py"}


def test_one_door_to_the_compiled_module() -> None:
    assert importers("ublkpy.uring._ffi") == {"ublkpy/uring/ffi.py"}


def test_only_spawn_forks() -> None:
    """A fork in a process with threads or rings is a trap, so there is one place for it."""
    found = {
        name(path)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("fork", "forkpty")
    }
    assert found == {"ublkpy/system/spawn.py"}


def test_no_multiprocessing_and_no_mocks() -> None:
    assert importers("multiprocessing", "unittest", "concurrent.futures.process") == set()


def test_arrows_between_packages_go_one_way() -> None:
    linter = Path(sys.executable).parent / "lint-imports"
    if not linter.exists():
        pytest.skip("import-linter is not installed")
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("the contracts are in pyproject.toml, which is not installed")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# -- examples ------------------------------------------------------------------------------


def test_one_example_for_each_target() -> None:
    assert [path.stem for path in EXAMPLES] == tgt.names()


@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_example_is_valid(path: Path) -> None:
    config = build(Draft(), read_yaml(path))
    assert config.target.name == path.stem


@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_example_shows_every_option_and_all_of_them_are_valid(path: Path, tmp_path: Path) -> None:
    """Keys that are commented out stand behind a "#" without a blank."""
    complete = tmp_path / path.name
    complete.write_text(re.sub(r"^( *)#(?=\w+:)", r"\1", path.read_text(), flags=re.MULTILINE))
    draft = read_yaml(complete)
    assert set(draft.device) == (set(DeviceOptions.options) if path.stem == "loop" else set())
    assert set(draft.target) == set(tgt.find(path.stem).options)


@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_commented_keys_of_an_example_that_have_a_default_show_it(path: Path) -> None:
    options = DeviceOptions.options | tgt.find(path.stem).options
    for key, value in re.findall(r"^ *#(\w+): *(.*)$", path.read_text(), re.MULTILINE):
        if options[key].default is not None:
            assert value == written(options[key].default), key


# -- documentation -------------------------------------------------------------------------


def written(value: object) -> str:
    """A default as one writes it in YAML."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def rows(page: str) -> dict[str, list[str]]:
    """The table of options on a page, by key."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {row[0].strip("`"): row for row in cells}


OPTIONS = [
    *(pytest.param("yaml.md", opt, id=f"yaml.md-{opt.name}") for opt in DeviceOptions.options.values()),
    *(
        pytest.param(f"targets/{target}.md", opt, id=f"{target}.md-{opt.name}")
        for target in tgt.names()
        for opt in tgt.find(target).options.values()
    ),
]


@pytest.mark.parametrize(("page", "opt"), OPTIONS)
def test_option_is_documented(page: str, opt: Option) -> None:
    _, flags, value, default, meaning = rows(page)[opt.name]
    for flag in (*opt.flags, opt.long_flags[0], *opt.off_flags[:1]):
        assert f"`{flag}`" in flags
    assert all(f"`{choice}`" in value for choice in opt.kind.choices)
    for bound in (opt.minimum, opt.maximum):
        if opt.kind.metavar == "N" and bound is not None:
            assert str(bound) in value
    if opt.required:
        assert default == "required"
    elif opt.default is not None:
        assert default == written(opt.default)
    assert meaning


def test_bounds_of_sizes_are_documented() -> None:
    opt = DeviceOptions.options["max_io_buf_bytes"]
    sizes = [parse_size(word) for word in re.findall(r"\d+[kM]", rows("yaml.md")["max_io_buf_bytes"][2])]
    assert sizes == [opt.minimum, opt.maximum, opt.multiple]


@pytest.mark.parametrize("page", ["yaml.md", *(f"targets/{target}.md" for target in tgt.names())])
def test_documented_options_exist(page: str) -> None:
    cls = DeviceOptions if page == "yaml.md" else tgt.find(Path(page).stem)
    assert set(rows(page)) - {"target"} == set(cls.options)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), link


def test_example_on_the_yaml_page_is_valid(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "yaml.md").read_text(), re.DOTALL)
    path = tmp_path / "disk.yaml"
    path.write_text(text)
    assert build(Draft(), read_yaml(path)).target.name == "loop"
