"""``python -m ublkpy`` is the ``ublk`` command."""

from ublkpy.cli import main

main()
