"""Targets by what people call them: of this package, of an installed one, of a module, of a file.

::

    null                    one of ours
    cloud-disk              an installed package's, by its entry point in the group ublkpy.targets
    package.module:Class    what Python can import
    ./disk.py               a file, with one target in it
    ./disk.py:Class         a file, with several

Nothing is imported before it is asked for, so that what is broken breaks nothing else.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import inspect
import os
import re
import stat
import sys
import traceback
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ublkpy.errors import ConfigError, UblkError
from ublkpy.tgt.base import Target

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "ublkpy.targets"
BUILT_IN = {
    "concat": "ublkpy.tgt.concat:ConcatTarget",
    "full": "ublkpy.tgt.full:FullTarget",
    "error": "ublkpy.tgt.error:ErrorTarget",
    "fault": "ublkpy.tgt.fault:FaultTarget",
    "loop": "ublkpy.tgt.loop:LoopTarget",
    "mirror": "ublkpy.tgt.mirror:MirrorTarget",
    "nbdkit-python": "ublkpy.tgt.nbdkit_python:NbdkitPythonTarget",
    "null": "ublkpy.tgt.null:NullTarget",
    "pattern": "ublkpy.tgt.pattern:PatternTarget",
    "ram": "ublkpy.tgt.ram:RamTarget",
    "stripe": "ublkpy.tgt.stripe:StripeTarget",
    "zero": "ublkpy.tgt.zero:ZeroTarget",
    "zoned": "ublkpy.tgt.zoned:ZonedTarget",
}
_WRITABLE = stat.S_IWGRP | stat.S_IWOTH


def names() -> list[str]:
    """The names of ours, and of those of installed packages."""
    return sorted({*BUILT_IN, *_installed()})


def find(reference: str, *, said_by_file: bool = False) -> type[Target]:
    """The class of a target. ConfigError when there is none, UblkError for one that cannot be loaded.

    ``said_by_file``: then root takes no file that others could have written, and it is the one behind all links.
    """
    if is_file(reference):
        path, _, name = reference.partition(":") if ":" in Path(reference).name else (reference, "", "")
        found = _of_file(without_links(path) if said_by_file else Path(path).absolute(), name, said_by_file)
    elif reference in BUILT_IN:
        found = _of_module(*BUILT_IN[reference].split(":"))
    elif reference in (installed := _installed()):
        found = _of_module(installed[reference].module, installed[reference].attr)
    elif re.fullmatch(r"[\w.]+:\w+", reference):
        found = _of_module(*reference.split(":"))
    else:
        close = difflib.get_close_matches(reference, names(), n=1)
        hint = f"did you mean {close[0]}?" if close else f"targets are: {', '.join(names())}; or ./FILE.py"
        raise ConfigError(f"there is no target {reference!r}", hint)
    return found


def is_file(reference: str) -> bool:
    """Whether that is the path of a file, not a name."""
    return "/" in reference or re.search(r"\.py(:\w*)?$", reference) is not None


def reference(cls: type[Target]) -> str:
    """What this class is called; ``find`` takes it, in another process too, if ``is_found_again``."""
    for name, place in BUILT_IN.items():
        if place == f"{cls.__module__}:{cls.__qualname__}":
            return name
    if cls.__module__.startswith(_OF_FILE) or cls.__module__ == "__main__":
        with contextlib.suppress(TypeError, OSError):  # typed into a shell or a notebook
            return f"{Path(inspect.getfile(cls)).absolute()}:{cls.__qualname__}"
    return f"{cls.__module__}:{cls.__qualname__}"


def dump(target: Target) -> dict[str, Any]:
    """A target as plain values, for the next daemon: ``from_dump`` takes it back."""
    segment = {} if target.segment is None else {"segment": target.segment}
    return {"type": reference(type(target)), **segment, **target.dump()}


def from_dump(data: Mapping[str, Any]) -> Target:
    """The target that ``dump`` wrote. ValueError, KeyError, TypeError for what it cannot have written."""
    values = dict(data)
    cls = find(values.pop("type"))
    segment = values.pop("segment", None)
    target = cls({name: cls.options[name].load(raw) for name, raw in values.items()})
    if segment is not None:
        target.segment = segment
    return target


def is_found_again(cls: type[Target]) -> bool:
    """Whether another process can find this class."""
    module = sys.modules.get(cls.__module__)
    return "<" not in reference(cls) and getattr(module, cls.__qualname__, None) is cls and hasattr(module, "__file__")


def package(name: str) -> str:
    """Of which installed package the target of this name is."""
    if name in BUILT_IN:
        return "ublkpy"
    dist = _installed()[name].dist
    return dist.name if dist else "?"


def template() -> Path:
    """The file that people begin theirs with."""
    return Path(__file__).with_name("template.py")


def _installed() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points  # slow

    return {point.name: point for point in entry_points(group=GROUP)}


_OF_FILE = "ublkpy_target_"
_versions: dict[str, tuple[int, int]] = {}
"""Of the files that are loaded, by the names of their modules."""


def _of_module(module: str, name: str) -> type[Target]:
    try:
        found = import_module(module)
    except ModuleNotFoundError as e:
        if e.name and module.startswith(e.name):
            raise ConfigError(f"there is no module {e.name}", "is its package installed beside ublkpy?") from e
        raise _broken(module, e) from e
    except Exception as e:
        raise _broken(module, e) from e
    return _class(found, name, module)


def _of_file(path: Path, name: str, said_by_file: bool) -> type[Target]:
    if not path.is_file():
        raise ConfigError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    if said_by_file:
        check_writers(path)
    # The digest tells my-disk.py from my_disk.py.
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    module_name = _OF_FILE + re.sub(r"\W", "_", path.stem) + f"_{digest}"
    module, version = sys.modules.get(module_name), _version(path)
    if module is None or _versions[module_name] != version:  # a notebook goes on while its files are edited
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None:
            raise ConfigError(f"{path} is not a Python file", "its name has to end with .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name], _versions[module_name] = module, version
        if str(path.parent) not in sys.path:  # what lies beside it, it can import
            sys.path.append(str(path.parent))
        try:
            spec.loader.exec_module(module)
        except BaseException as e:
            del sys.modules[module_name]
            raise _broken(str(path), e) from e
    return _class(module, name or _only(module, path), str(path))


def _version(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def _only(module: ModuleType, path: Path) -> str:
    """The name of the target that is defined there, if it is one; those that begin with _ are bases of others."""
    found = [
        cls.__name__
        for cls in vars(module).values()
        if isinstance(cls, type)
        and issubclass(cls, Target)
        and cls.__module__ == module.__name__
        and not cls.__name__.startswith("_")
        and not inspect.isabstract(cls)
    ]
    if len(found) == 1:
        return found[0]
    if not found:
        raise ConfigError(
            f"there is no target in {path}", "define a class of ublkpy.Target with an open method: ublk target new FILE"
        )
    raise ConfigError(
        f"{path} has several targets: {', '.join(found)}",
        f"name one: {path}:{found[0]}; or begin the names of those that are only bases of others with _",
    )


def _class(module: ModuleType, name: str, where: str) -> type[Target]:
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Target)):
        raise ConfigError(
            f"{where} has no target {name}" if found is None else f"{name} of {where} is not a target",
            "a target is a class of ublkpy.Target",
        )
    if inspect.isabstract(found):
        raise ConfigError(
            f"target {name} of {where} has no open method", "it opens what it needs and returns a Geometry"
        )
    return found


def _broken(where: str, error: BaseException) -> UblkError:
    """With the traceback, from the file itself on."""
    if isinstance(error, KeyboardInterrupt):
        raise error
    frames = traceback.TracebackException.from_exception(error)
    frames.stack[:] = [
        frame for frame in frames.stack if frame.filename != __file__ and "importlib" not in frame.filename
    ]
    if isinstance(error, ModuleNotFoundError) and error.name == "nbdkit":
        return UblkError(f"{where} is a plugin for nbdkit", f"ublk add -t nbdkit-python --script {where} KEY=VALUE...")
    return UblkError(f"{where} cannot be loaded", "".join(frames.format()).rstrip())


def without_links(path: Path | str) -> Path:
    """The place that is checked has to be the one that is used: a link may be another's, and so what lies beside it."""
    return Path(os.path.realpath(path))


def check_writers(path: Path) -> None:
    """Root runs no code that anybody else could have written. ``path`` is one ``without_links``."""
    if os.geteuid():
        return
    compiled = Path(importlib.util.cache_from_source(path))
    is_there = False
    for place in (compiled, compiled.parent, path, *path.parents):
        try:
            found = place.stat()
        except FileNotFoundError:
            is_there = False
            continue
        # Where only owners may rename, others may yet put in what is not there: what the file imports, its bytecode.
        sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
        is_kept = sticky and is_there and place != path.parent
        is_there = True
        if found.st_uid != 0 or (found.st_mode & _WRITABLE and not is_kept):
            cure = "" if sticky else f"chown root {place}; chmod go-w {place}; or "  # /tmp has to stay as it is
            raise UblkError(
                f"{path} is code that others than root can change: {place} can be written by them",
                f"{cure}put the file elsewhere",
            )
