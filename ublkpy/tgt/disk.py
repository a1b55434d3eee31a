"""What can be said of the disk itself, whatever serves it: the options.

A target may look at them when it opens; ``limits.settle`` sees to the rest. So
they hold for every target, and a target need not know them.
"""

from __future__ import annotations

from ublkpy.tgt.options import Configurable, option


class DiskOptions(Configurable):
    """Properties of the block device. What is not said is as the target has it."""

    read_only: bool = option(False, "--ro", help="refuse writes; a target opens what is behind it read-only, too")
