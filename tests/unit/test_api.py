"""What ublkpy offers to programs: each of it is said what it is, and docs/api.md says it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from enum import Enum
from types import FunctionType, ModuleType

import ublkpy
from scripts import api
from ublkpy import errors, io, testing

MODULES = (ublkpy, errors, io, testing)


def offered(module: ModuleType) -> Iterator[tuple[str, object]]:
    for name in module.__all__:
        if not name.startswith("_"):
            yield f"{module.__name__}.{name}", getattr(module, name)


def methods(thing: type) -> Iterator[tuple[str, object]]:
    """Its own, and those of bases of ours; of an enumeration none is."""
    for name, _ in [] if issubclass(thing, Enum) else inspect.getmembers_static(thing):
        member = inspect.getattr_static(thing, name)
        if name.startswith("_") or not isinstance(member, FunctionType | classmethod | staticmethod | property):
            continue
        defined = next(base for base in thing.__mro__ if name in vars(base))
        if defined.__module__.startswith("ublkpy."):
            yield name, member


def undocumented() -> Iterator[str]:
    for module in MODULES:
        for name, thing in offered(module):
            if isinstance(thing, type | FunctionType) and not thing.__doc__:
                yield name
            if isinstance(thing, type):
                yield from (f"{name}.{method}" for method, member in methods(thing) if not member.__doc__)


def test_each_public_name_and_method_has_a_docstring() -> None:
    assert list(undocumented()) == []


def test_no_docstring_of_a_class_is_only_the_one_that_a_dataclass_makes() -> None:
    made = re.compile(r"\w+\((\w+: .*)?\)")
    assert [name for module in MODULES for name, thing in offered(module) if made.fullmatch(thing.__doc__ or "")] == []


def test_the_reference_has_each_public_name() -> None:
    shown = {(section.offers, name) for section in api.SECTIONS for name in section.names}
    everything = {(module.__name__, name) for module in MODULES for name in module.__all__ if not name.startswith("_")}
    also_elsewhere = {("ublkpy", name) for name in errors.__all__}
    assert everything - shown <= also_elsewhere
    assert shown <= everything


def test_the_reference_is_what_the_docstrings_say() -> None:
    assert api.PAGE.read_text() == str(api.Page()), "run: make docs"


def test_the_links_of_the_reference_lead_somewhere() -> None:
    page = api.PAGE.read_text()
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    anchors = [heading.lower().replace(" ", "-").replace(".", "") for heading in headings]
    assert len(anchors) == len(set(anchors))
    assert set(re.findall(r"\]\(#([^)]*)\)", page)) <= set(anchors)
    assert all((api.PAGE.parent / target).exists() for target in re.findall(r"\]\(([^#)]+)\)", page))
