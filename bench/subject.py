"""What is measured, one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .servers import Server

Family = Literal["null", "file"]
"""What is behind the device: nothing (or the server's own memory), or a file. Only within one are figures compared."""


@dataclass(frozen=True)
class Subject:
    """A server in one configuration; `ours` must not fail."""

    name: str
    family: Family
    serve: Server
    ours: bool = False
