"""The targets by name, and what each of them must have."""

from __future__ import annotations

import pytest

from ublkpy import tgt
from ublkpy.errors import ConfigError
from ublkpy.tgt.base import Geometry, Target


def test_names_are_sorted() -> None:
    assert tgt.names() == sorted(tgt.names())
    assert {"loop", "null"} <= set(tgt.names())


@pytest.mark.parametrize("name", tgt.names())
def test_target_is_found_by_its_own_name(name: str) -> None:
    cls = tgt.find(name)
    assert issubclass(cls, Target)
    assert cls.name == name


@pytest.mark.parametrize("name", tgt.names())
def test_first_line_of_the_docstring_is_the_help(name: str) -> None:
    first = (tgt.find(name).__doc__ or "").splitlines()[0]
    assert first.endswith((".", ":")) or ": " in first
    assert len(first) < 80


@pytest.mark.parametrize("name", tgt.names())
def test_options_do_not_shadow_the_contract(name: str) -> None:
    assert not set(tgt.find(name).options) & (set(dir(Target)) | {"type"})


def test_mistyped_name() -> None:
    with pytest.raises(ConfigError) as caught:
        tgt.find("nul")
    assert caught.value.message == "there is no target 'nul'"
    assert caught.value.hint == "did you mean null?"


@pytest.mark.parametrize("name", ["", "zzz", "Loop."])
def test_unknown_name_lists_all(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tgt.find(name)
    assert caught.value.hint in (f"targets are: {', '.join(tgt.names())}; or ./FILE.py", "did you mean loop?")


def test_a_target_must_open() -> None:
    with pytest.raises(TypeError, match=r"abstract method '?open"):
        Target()  # type: ignore[abstract]


def test_geometry_defaults_offer_no_discard() -> None:
    geometry = Geometry(1 << 20)
    assert (geometry.logical_block, geometry.discard_granularity, geometry.read_only) == (512, 0, False)
