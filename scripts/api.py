"""The API reference, docs/api.md, from the docstrings: ``python scripts/api.py``.

griffe reads the sources and imports nothing, so what ublkpy offers lazily is found like the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"

_HEAD = """# API reference

What `ublkpy`, `ublkpy.io`, `ublkpy.errors` and `ublkpy.testing` offer to programs. To write a disk of your own, begin
with [write a target](write-a-target.md); to control devices, with [recovery and upgrade](life.md). Sizes, offsets and
lengths are in bytes wherever nothing else is said.

`make docs` writes this page from the docstrings.
"""


@dataclass(frozen=True)
class Section:
    """A part of the page: ``names`` of the module ``offers``; the docstring of ``module`` comes first."""

    title: str
    module: str
    names: tuple[str, ...]
    offers: str = "ublkpy"


_WIDTH = 100  # of code
_MADE_FOR_YOU = ("Request",)  # no program of others does it

_ACTIONS = (
    *("File", "Stripe", "Mirror", "Space", "Spaces", "Memory", "Null", "Zero", "Pattern", "Error", "Upcall", "Sync"),
    *("Faulty", "Fault"),
)
SECTIONS = (
    Section("Targets", "ublkpy.tgt.base", ("Target", "Geometry", "main")),
    Section("Options of a target", "ublkpy.tgt.options", ("option", "Size", "Offset", "Duration", "Rate")),
    Section("Where the bytes live", "ublkpy.uring.map", ("Map", "OpenFile", "Extent", "Routing", *_ACTIONS)),
    Section("Files", "ublkpy.io", ("read", "write", "fsync", "punch_hole", "zero_range"), "ublkpy.io"),
    Section("Zoned disks", "ublkpy.uring.zones", ("Zones", "Zone", "ZoneType", "ZoneCond")),
    Section("Requests", "ublkpy.upcall.raw", ("Request", "Op", "IoFlag")),
    Section("Devices", "ublkpy.device", ("Device",)),
    Section(
        "Errors",
        "ublkpy.errors",
        (
            "UblkError",
            "ConfigError",
            "NoDeviceError",
            "BusyError",
            "DriverError",
            "InterruptedByUser",
            "ExitCode",
        ),
        "ublkpy.errors",
    ),
    Section(
        "Tests",
        "ublkpy.testing",
        ("open_disk", "open_device", "ublk_device", "Disk", "TargetContract"),
        "ublkpy.testing",
    ),
)


def load() -> griffe.Module:
    """The package, with imported names leading to what they mean."""
    package = griffe.load("ublkpy", search_paths=[ROOT], resolve_aliases=True)
    assert isinstance(package, griffe.Module)
    return package


def find(package: griffe.Module, path: str) -> griffe.Object:
    """The object of this full name, where it is defined."""
    found = package if path == package.path else package[path.removeprefix("ublkpy.")]
    return found.final_target if isinstance(found, griffe.Alias) else found


def text(thing: griffe.Object) -> str:
    """Its docstring."""
    return thing.docstring.value if thing.docstring else ""


def is_enum(thing: griffe.Class) -> bool:
    return any(str(base) in ("IntEnum", "IntFlag") for base in thing.bases)


def members(thing: griffe.Class, known: Iterable[str]) -> Iterator[griffe.Attribute | griffe.Function]:
    """What programs may use of a class: its own, and that of bases which have no place on the page themselves."""
    for name, member in thing.all_members.items():
        member = member.final_target if isinstance(member, griffe.Alias) else member
        if name.startswith("_") or not isinstance(member, griffe.Attribute | griffe.Function):
            continue
        assert isinstance(member.parent, griffe.Class)
        inherited = member.parent is not thing
        if (inherited and member.parent.name in known) or not member.parent.path.startswith("ublkpy."):
            continue
        if isinstance(member, griffe.Function) or text(member) or "dataclass" in thing.labels or is_enum(thing):
            yield member


def constructor(thing: griffe.Class) -> griffe.Class | None:
    """The class that says what its objects are made from, if it is programs that make them."""
    if is_enum(thing) or thing.name in _MADE_FOR_YOU:
        return None
    return next((one for one in (thing, *thing.mro()) if "__init__" in one.members), None)


class Page:
    """The Markdown of the whole page."""

    def __init__(self) -> None:
        self._package = load()
        self._things = {
            name: find(self._package, f"{section.offers}.{name}") for section in SECTIONS for name in section.names
        }
        self._headings = set(self._things)
        for name, thing in self._things.items():
            if isinstance(thing, griffe.Class):
                self._headings |= {f"{name}.{one.name}" for one in self._methods(thing)}
        self._besides: dict[str, griffe.Object] = {}

    def __str__(self) -> str:
        parts = [_HEAD, *(self._section(section) for section in SECTIONS), self._what_else()]
        return "\n".join(parts).rstrip("\n") + "\n"

    def _section(self, section: Section) -> str:
        names = ", ".join(f"[`{name}`](#{name.lower()})" for name in section.names)
        parts = [f"## {section.title}\n", f"From `{section.offers}`: {names}.\n"]
        parts.append(self._prose(text(find(self._package, section.module)), ""))
        parts += [self._thing(name) for name in section.names]
        return "\n".join(parts)

    def _thing(self, name: str) -> str:
        thing = self._things[name]
        parts = [f"### {name}\n"]
        if isinstance(thing, griffe.Function):
            parts.append(_code(self._signature(thing, name)))
        elif isinstance(thing, griffe.Class):
            parts.append(self._class(thing))
        elif isinstance(thing, griffe.Attribute):
            parts.append(_code(f"{name} = {thing.value}"))
        parts.append(self._prose(text(thing), name))
        if isinstance(thing, griffe.Class):
            parts += [self._fields(thing), *(self._method(name, method) for method in self._methods(thing))]
        return "\n".join(part for part in parts if part)

    def _methods(self, thing: griffe.Class) -> list[griffe.Function]:
        return [one for one in members(thing, self._things) if isinstance(one, griffe.Function)]

    def _fields(self, thing: griffe.Class) -> str:
        fields = [one for one in members(thing, self._things) if isinstance(one, griffe.Attribute)]
        return "".join(f"- `{self._field(thing, field)}`{self._told(thing, field)}\n" for field in fields)

    def _field(self, thing: griffe.Class, field: griffe.Attribute) -> str:
        self._name_types(field.annotation)
        kind = f": {field.annotation}" if field.annotation else ""
        is_number = is_enum(thing) and not str(field.value).startswith("lib.")
        has_default = ("dataclass" in thing.labels or is_number) and field.value is not None
        return f"{field.name}{kind}" + (f" = {field.value}" if has_default else "")

    def _told(self, thing: griffe.Class, field: griffe.Attribute) -> str:
        said = self._prose(text(field), thing.name).strip()
        return said and ": " + said.replace("\n\n", "\n").replace("\n", "\n  ")

    def _method(self, owner: str, method: griffe.Function) -> str:
        full = f"{owner}.{method.name}"
        is_of_class = "classmethod" in method.labels
        shown = _code(self._signature(method, full if is_of_class else method.name))
        return "\n".join([f"#### {full}\n", shown, self._prose(text(method), owner)])

    def _class(self, thing: griffe.Class) -> str:
        bases = [str(base) for base in thing.bases if str(base) not in ("ABC", "Configurable")]
        shown = [f"class {thing.name}({', '.join(bases)})"] if bases else []
        if made := constructor(thing):
            shown.append(self._signature(made, thing.name))
        return _code("\n\n".join(shown)) if shown else ""

    def _signature(self, thing: griffe.Function | griffe.Class, name: str) -> str:
        for parameter in thing.parameters:
            self._name_types(parameter.annotation)
        if isinstance(thing, griffe.Function):
            self._name_types(thing.returns)
            is_async = "async " if "async" in thing.labels else ""
            return _wrapped(is_async + thing.signature(return_type=True, name=name))
        return _wrapped(thing.signature(name=name))

    def _name_types(self, annotation: str | griffe.Expr | None) -> None:
        """Remember those of ours that have no place of their own on the page."""
        if not isinstance(annotation, griffe.Expr):
            return
        for part in annotation.iterate(flat=True):
            if isinstance(part, griffe.ExprName) and part.canonical_path.startswith("ublkpy."):
                thing = find(self._package, part.canonical_path)
                if thing.name not in self._things:
                    self._besides[thing.path] = thing

    def _what_else(self) -> str:
        told = []
        for path, thing in sorted(self._besides.items()):
            short, _, _ = text(thing).partition("\n\n")
            told.append(f"- `{path}`: {self._linked(short, '')}\n".replace("\n", "\n  ").rstrip() + "\n")
        return "## What the signatures name besides\n\n" + "".join(told)

    def _prose(self, docstring: str, owner: str) -> str:
        """A docstring as Markdown: blocks after ``::`` as code, and names that have a place on the page as links."""
        blocks = re.split(r"::\n\n((?: {4}.*\n|\n)+)", docstring + "\n")
        parts = []
        for n, block in enumerate(blocks):
            if n % 2:
                lines = (line.removeprefix("    ") for line in block.strip("\n").split("\n"))
                parts.append(_code("\n".join(lines), "python" if "──" not in block else ""))
            elif block.strip():
                follows = ":" if n + 1 < len(blocks) and not block.endswith("\n") else ""
                parts.append(self._linked(block.strip("\n"), owner) + follows + "\n")
        return "\n".join(parts)

    def _linked(self, prose: str, owner: str) -> str:
        def one(match: re.Match[str]) -> str:
            code = match[1]
            for heading in (f"{owner}.{code}", code):
                if heading in self._headings and heading != owner:
                    return f"[`{code}`](#{heading.lower().replace('.', '')})"
            return f"`{code}`"

        parts = re.split(r"(``[^`]+``)", prose)
        return "".join(
            re.sub(r"``([^`]+)``", one, part) if n % 2 else re.sub(r"([*<])", r"\\\1", part)
            for n, part in enumerate(parts)
        )


def _wrapped(signature: str) -> str:
    """A long one with a parameter in each line."""
    if len(signature) <= _WIDTH:
        return signature
    begin, _, rest = signature.partition("(")
    end = rest.rfind(")") if ") -> " not in rest else rest.rfind(") -> ")
    parameters, depth = [""], 0
    for letter in rest[:end]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parameters.append("")
        else:
            parameters[-1] += letter
    lines = "".join(f"    {parameter.strip()},\n" for parameter in parameters)
    return f"{begin}(\n{lines}{rest[end:]}"


def _code(code: str, language: str = "python") -> str:
    code = code.replace("'", '"') if language else code
    return f"```{language}\n{code}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(str(Page()))
