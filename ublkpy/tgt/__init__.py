"""The targets, by name."""

from __future__ import annotations

import difflib
from importlib import import_module

from ublkpy.errors import ConfigError
from ublkpy.tgt.base import Target

# Imported on use, so that help and completion stay fast.
_BUILT_IN = {
    "loop": "ublkpy.tgt.loop:LoopTarget",
    "null": "ublkpy.tgt.null:NullTarget",
}


def names() -> list[str]:
    """The names of all targets."""
    return sorted(_BUILT_IN)


def find(name: str) -> type[Target]:
    """The class of the target ``name``; ConfigError when there is none."""
    if name not in _BUILT_IN:
        close = difflib.get_close_matches(name, _BUILT_IN, n=1)
        hint = f"did you mean {close[0]}?" if close else f"targets are: {', '.join(names())}"
        raise ConfigError(f"there is no target {name!r}", hint)
    module, _, cls = _BUILT_IN[name].partition(":")
    found: type[Target] = getattr(import_module(module), cls)
    return found
