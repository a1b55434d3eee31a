"""Options declared once, as typed class attributes.

An attribute is at the same time a flag of the command line, a key in YAML, a
line of help and a checked value::

    class Disk(Target):
        size: Size = option("64M", "-s", help="size of the disk")

The annotation decides how a value is written: ``Size`` (bytes, "64k"),
``Offset`` (a bare number counts 512-byte sectors), ``Duration`` ("2ms"), ``Rate``
("10%"), ``Range`` ("1M-2M"), ``Errno`` ("ENOSPC"), ``Path``, ``Code`` (the path of a
program), ``bool``, ``int``, ``str``, ``Literal[...]``, ``Arguments`` (a list of
``key=value``, on the command line without a flag). ``X | None`` may be left out,
and ``tuple[X, ...]`` is a list in YAML, and a flag to repeat on the command line.
"""

from __future__ import annotations

import difflib
import errno
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from inspect import get_annotations
from pathlib import Path
from typing import Any, ClassVar, Literal, NewType, Union, get_args, get_origin, get_type_hints

SECTOR = 512

MAX_BYTES = 2**63 - SECTOR
"""The size of the largest device: the kernel counts the bytes of files and devices in a signed 64-bit number."""

Size = NewType("Size", int)
"""A number of bytes; written "64k", "1.5G", "8s" (512-byte sectors) or as a bare number of bytes."""

Offset = NewType("Offset", int)
"""A place in bytes; written like a ``Size``, but a number without a unit counts 512-byte sectors, as in ublksrv."""

Duration = NewType("Duration", int)
"""A time in nanoseconds; written "100us", "2ms", "1.5s", or as a number of seconds."""

Rate = NewType("Rate", float)
"""A share, 0 to 1; written "10%" or 0.1."""

Errno = NewType("Errno", int)
"""A number of an error, 1 to 4095; written by its name, "ENOSPC", or as that number."""

Code = NewType("Code", Path)
"""The path of a file that is run: one that others could have written is not taken from a YAML file by root."""

Arguments = NewType("Arguments", tuple[str, ...])
"""Texts of the form ``key=value``, in their order."""


@dataclass(frozen=True, order=True)
class Range:
    """The bytes from ``start`` up to, and not, ``end``; written "1M-2M", or "1M+64k" by their number. Not empty."""

    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.start}-{self.end}"


_UNITS = {"": 1, "s": SECTOR, "b": 1} | {unit: 1024**n for n, unit in enumerate("kmgtpe", 1)}
_SHOWN_UNITS = "BKMGTPE"
_TIMES = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "": 10**9}
_MAX_ERRNO = 4095


@dataclass(frozen=True)
class Kind:
    """How values of a type are written, on the command line and in YAML alike.

    ``parse`` takes what YAML or the command line gives and raises ValueError with a reason. ``dump`` makes a
    plain value for the state file and JSON, where sizes and places are numbers of bytes; ``load`` takes it
    back, and is ``parse`` where people write the same. ``show`` is for messages. With ``several``, the value is a
    tuple, written as a list, and these four are about one of it. ``is_path`` if it is a place in the file system;
    ``is_target`` if it may also be a target, written as a mapping.
    """

    metavar: str
    parse: Callable[[object], Any]
    dump: Callable[[Any], object] = lambda value: value
    choices: tuple[str, ...] = ()
    load: Callable[[object], Any] | None = None
    show: Callable[[Any], str] = str
    several: bool = False
    is_path: bool = False
    is_target: bool = False


@dataclass(frozen=True)
class Option:
    """One declared option. ``off_flags`` are flags that set a bool to False."""

    name: str
    kind: Kind
    default: Any
    help: str
    flags: tuple[str, ...]
    off_flags: tuple[str, ...]
    minimum: int | None
    maximum: int | None
    multiple: int
    power_of_two: bool

    @property
    def required(self) -> bool:
        return self.default is ...

    @property
    def long_flags(self) -> tuple[str, ...]:
        """``--max-size``, and ``--max_size`` for those who come from ublksrv."""
        return tuple(dict.fromkeys((f"--{self.name.replace('_', '-')}", f"--{self.name}")))

    def parse(self, raw: object) -> Any:
        """The value that ``raw`` stands for, or ValueError with the reason."""
        return self.check(self._each(self.kind.parse, raw), raw)

    def load(self, raw: object) -> Any:
        """The value that ``Configurable.dump`` wrote as ``raw``, or ValueError with the reason."""
        return self.check(self._each(self.kind.load or self.kind.parse, raw), raw)

    def dump(self, value: Any) -> object:
        """A plain value for ``load``."""
        return [self.kind.dump(one) for one in value] if self.kind.several else self.kind.dump(value)

    def _each(self, parse: Callable[[object], Any], raw: object) -> Any:
        if not self.kind.several:
            return parse(raw)
        if not isinstance(raw, list | tuple):
            raise ValueError(f"{raw!r} is not a list, such as [{self.kind.metavar.lower()}]")
        return tuple(parse(one) for one in raw)

    def check(self, value: Any, raw: object) -> Any:
        """The value itself, or ValueError if it is out of the option's bounds. ``raw`` is what people wrote."""
        low, high = self.minimum, self.maximum
        if self.kind.several:
            if not (low or 0) <= len(value) <= (high or len(value)):
                bounds = f"{low or 0} to {high}" if high else f"{low} or more"
                raise ValueError(f"{self.name} are {len(value)}, and have to be {bounds}")
            return value
        if (low is not None and value < low) or (high is not None and value > high):
            ends = [self.kind.show(end) for end in (low, high) if end is not None]
            bounds = " to ".join(ends) if len(ends) == 2 else f"{ends[0]} or {'less' if low is None else 'more'}"
            raise ValueError(f"{raw} is out of range: {bounds}")
        if self.multiple > 1 and value % self.multiple:
            raise ValueError(f"{raw} is not a multiple of {self.multiple}")
        if self.power_of_two and value & (value - 1):
            raise ValueError(f"{raw} is not a power of two")
        return value


@dataclass(frozen=True)
class _Declaration:
    default: Any
    flags: tuple[str, ...]
    off_flags: tuple[str, ...]
    help: str
    minimum: int | None
    maximum: int | None
    multiple: int
    power_of_two: bool


def option(
    default: Any,
    *flags: str,
    help: str,
    off_flags: tuple[str, ...] = (),
    minimum: int | None = None,
    maximum: int | None = None,
    multiple: int = 1,
    power_of_two: bool = False,
) -> Any:
    """Declare an option: the value of a class attribute with a type, see above.

    ``default`` is written as people write the value ("64M"), ``...`` makes it required. ``--name`` is always a flag
    (with "-" for "_"); ``flags`` are further ones, and ``off_flags`` those that set a bool to False. ``minimum``,
    ``maximum`` and ``multiple`` are in the unit of the value: bytes, for a ``Size`` or an ``Offset``, nanoseconds, for
    a ``Duration``; of a tuple, ``minimum`` is the least number of values. ``help`` is one line.

    What people give is checked against all this before ``Target.open``: ConfigError, with the place in their file.
    KeyError at the class if its type is none of those above.
    """
    return _Declaration(default, flags, off_flags, help, minimum, maximum, multiple, power_of_two)


class Configurable:
    """Base of everything that has options: turns declarations into ``options`` and checked attributes."""

    options: ClassVar[dict[str, Option]] = {}
    """The declared options by name, those of the class itself first."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        hints = get_type_hints(cls)
        declared = {name: value for name, value in vars(cls).items() if isinstance(value, _Declaration)}
        for name in declared.keys() - hints.keys():
            raise TypeError(f"option {name} of {cls.__name__} needs a type, as in {name}: Size = option(...)")
        inherited = next(base.options for base in cls.__mro__[1:] if issubclass(base, Configurable))
        for name in declared.keys() - inherited.keys():
            if any(name in vars(base) or name in get_annotations(base) for base in cls.__mro__[1:]):
                raise TypeError(f"option {name} of {cls.__name__} would hide what else is called {name}: rename it")
        own = {name: _make_option(name, hints[name], declaration) for name, declaration in declared.items()}
        cls.options = own | inherited | own  # in this order, and an own one replaces that of the base

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        """Take parsed ``values``; what is missing gets its default. ValueError for a required one, and for one that
        there is not."""
        values = values or {}
        for name in values.keys() - self.options.keys():
            raise ValueError(f"{name} is no option of {type(self).__name__}; it has {', '.join(self.options)}")
        for name, opt in self.options.items():
            if name in values:
                value = values[name]
            elif opt.required:
                raise ValueError(f"{name} is missing")
            else:
                value = None if opt.default is None else opt.parse(opt.default)
            setattr(self, name, value)

    def dump(self) -> dict[str, object]:
        """All options that have a value, as plain values for JSON that ``Option.load`` takes back; sizes in bytes."""
        values = {name: getattr(self, name) for name in self.options}
        return {name: self.options[name].dump(value) for name, value in values.items() if value is not None}


def parse_size(raw: object) -> int:
    """Bytes from "64k", "1.5G", "8s" (sectors) or a number; ValueError with the reason."""
    if isinstance(raw, bool) or not isinstance(raw, int | str):
        raise ValueError(f"{raw!r} is not a size such as 4096, 64k or 1G")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgtpe])(?:i?b)?|([bs]?))", str(raw).strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"{raw!r} is not a size such as 4096, 64k or 1G")
    size = Fraction(match[1]) * _UNITS[(match[2] or match[3]).lower()]
    if size.denominator != 1:
        raise ValueError(f"{raw!r} is not a whole number of bytes")
    return _limited(int(size), raw)


def _limited(size: int, raw: object) -> int:
    if size > MAX_BYTES:
        raise ValueError(f"{raw} is too large: at most {MAX_BYTES} bytes, one sector less than 8E")
    return size


def format_size(size: int) -> str:
    """A size for people: "1G", "1.5G"; with two decimal places it is rounded down.

    Never up: an image that lacks a sector must not look whole. So 10 MiB are "10M", a sector less is "9.99M"
    and a sector more "10.00M".
    """
    power = max(0, min((size.bit_length() - 1) // 10, len(_SHOWN_UNITS) - 1))
    letter, unit = _SHOWN_UNITS[power], 1024**power
    whole, rest = divmod(size, unit)
    if rest * 10 % unit:
        return f"{whole}.{rest * 100 // unit:02}{letter}"
    return f"{whole}.{rest * 10 // unit}".removesuffix(".0") + letter


def exact_size(size: int) -> str:
    """The same to compare sizes by: with the number of bytes where it is rounded."""
    text = format_size(size)
    return f"{text} ({size} bytes)" if re.search(r"\.\d\d", text) else text


def _parse_offset(raw: object) -> int:
    bare = isinstance(raw, int) or (isinstance(raw, str) and raw.strip().isdigit())
    return _limited(parse_size(raw) * (SECTOR if bare else 1), raw)


def _parse_duration(raw: object) -> int:
    match = None if isinstance(raw, bool) else re.fullmatch(r"(\d+(?:\.\d+)?)\s*([num]?s|)", str(raw).strip())
    if not match:
        raise ValueError(f"{raw!r} is not a time such as 100us, 2ms or 1.5s")
    return round(Fraction(match[1]) * _TIMES[match[2]])


def format_duration(duration: int) -> str:
    """A time as people write it: "1.5s", "20us"."""
    unit = next((unit for unit in ("s", "ms", "us") if duration >= _TIMES[unit]), "ns")
    return f"{duration / _TIMES[unit]:g}{unit}"


def _parse_range(raw: object) -> Range:
    match = re.fullmatch(r"([^+-]+)([+-])([^+-]+)", raw) if isinstance(raw, str) else None
    if not match:
        raise ValueError(f"{raw!r} is not a range such as 1M-2M or 1M+64k")
    start, length = parse_size(match[1]), parse_size(match[3])
    end = _limited(start + length, raw) if match[2] == "+" else length
    if end <= start:
        raise ValueError(f"{raw!r} has no bytes in it: it ends where it begins, or before")
    return Range(start, end)


def _parse_errno(raw: object) -> int:
    name = raw.strip().upper() if isinstance(raw, str) else ""
    known: dict[str, int] = {one: number for one, number in vars(errno).items() if one.startswith("E")}
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    if name[:1] == "E" and close:
        raise ValueError(f"there is no errno {raw}: did you mean {close[0]}?")
    try:
        number = _parse_int(raw)
    except ValueError:
        number = 0
    if not 0 < number <= _MAX_ERRNO:
        raise ValueError(f"{raw!r} is no errno: a name such as ENOSPC, or a number from 1 to {_MAX_ERRNO}")
    return number


def _parse_rate(raw: object) -> float:
    match = None if isinstance(raw, bool) else re.fullmatch(r"(\d+(?:\.\d+)?(?:e-\d+)?)\s*(%?)", str(raw).strip())
    value = float(match[1]) / (100 if match[2] else 1) if match else 2.0
    if value > 1:
        raise ValueError(f"{raw!r} is not a share such as 0.1 or 10%")
    return value


def _parse_bool(raw: object) -> bool:
    if not isinstance(raw, bool):
        raise ValueError(f"{raw!r} is neither true nor false")
    return raw


def _parse_int(raw: object) -> int:
    if isinstance(raw, str) and re.fullmatch(r"[+-]?\d+", raw.strip()):
        raw = int(raw)
    if isinstance(raw, bool) or not isinstance(raw, int):
        raise ValueError(f"{raw!r} is not a whole number")
    return raw


def _parse_str(raw: object) -> str:
    if not isinstance(raw, str) or not raw:
        raise ValueError(f"{raw!r} is not a text" + ("" if raw in ("", None) else "; put it in quotes"))
    return raw


def parse_path(raw: object) -> Path:
    text = _parse_str(raw)
    if "\0" in text:
        raise ValueError("a path cannot have a null byte in it")
    return Path(text)


def _parse_argument(raw: object) -> str:
    if not isinstance(raw, str) or not ARGUMENT.match(raw):
        raise ValueError(f"{raw!r} is not of the form key=value")
    return raw


def _choice(choices: tuple[str, ...]) -> Kind:
    def parse(raw: object) -> str:
        if raw not in choices:
            raise ValueError(f"{raw!r} is not one of: {', '.join(choices)}")
        return str(raw)

    return Kind("CHOICE", parse, choices=choices)


ARGUMENT = re.compile(r"[A-Za-z][\w.-]*=")
"""How an argument begins."""

CODE = Kind("PATH", parse_path, str, is_path=True)
ARGUMENTS = Kind("KEY=VALUE", _parse_argument, several=True)
BOOL = Kind("BOOL", _parse_bool)
KINDS: dict[object, Kind] = {  # and what ublkpy.tgt.nested adds
    Size: Kind("SIZE", parse_size),
    Offset: Kind("SECTORS", _parse_offset, load=parse_size),
    Duration: Kind("TIME", _parse_duration, load=_parse_int, show=format_duration),
    Rate: Kind("RATE", _parse_rate),
    Range: Kind("RANGE", _parse_range, str),
    Errno: Kind("ERRNO", _parse_errno),
    Path: Kind("PATH", parse_path, str, is_path=True),
    Code: CODE,
    Arguments: ARGUMENTS,
    bool: BOOL,
    int: Kind("N", _parse_int),
    str: Kind("TEXT", _parse_str),
}


def _kind(name: str, hint: Any) -> Kind:
    if hint in KINDS:
        return KINDS[hint]
    if get_origin(hint) in (Union, types.UnionType):
        return _kind(name, next(arg for arg in get_args(hint) if arg is not type(None)))
    if get_origin(hint) is tuple and get_args(hint)[1:] == (...,):
        return replace(_kind(name, get_args(hint)[0]), several=True)
    if get_origin(hint) is Literal:
        return _choice(get_args(hint))
    known = ", ".join(getattr(one, "__name__", str(one)) for one in KINDS)
    raise TypeError(
        f"option {name}: {hint} is no type of options, which are {known}, Literal[...] and tuple[..., ...] of these"
    )


def _make_option(name: str, hint: Any, declared: _Declaration) -> Option:
    return Option(
        name,
        _kind(name, hint),
        declared.default,
        declared.help,
        declared.flags,
        declared.off_flags,
        declared.minimum,
        declared.maximum,
        declared.multiple,
        declared.power_of_two,
    )
