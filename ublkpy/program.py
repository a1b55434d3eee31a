"""A target's file as a program of its own: ``python3 disk.py --size 1G``."""

from __future__ import annotations

from ublkpy import cli
from ublkpy.tgt import load
from ublkpy.tgt.base import Target


def main(target: type[Target]) -> None:
    """``ublk add`` with this target: all its options, and those of every device, from ``sys.argv``.

    For ``if __name__ == "__main__"`` in the target's file. Ends the process with an exit code of ``ublk``.
    """
    reference = load.reference(target)
    load.find(reference)  # what was run as __main__ is found again under its file's name
    cli.main(reference)
