"""A device with many extents: ``python scripts/extents.py FILE EXTENTS QUEUES DEPTH``. The benchmark measures look-ups.

Its 4 GiB lie in a sparse file on a tmpfs, which is made for it, each extent elsewhere than in the device. Of a million,
each is 4 KiB long. ``ublk del`` ends it.
"""

from __future__ import annotations

import os
import sys

from ublkpy.config import DeviceConfig, DeviceOptions
from ublkpy.life.add import add
from ublkpy.tgt.base import Geometry, Target
from ublkpy.uring.map import Extent, File, Map, Routing

_MOST = 4 << 30
_BLOCK = 4096


class Extents(Target):
    """The upper half of the file comes first."""

    name = "extents"

    def __init__(self, path: str, number: int) -> None:
        super().__init__({})
        self._number = number
        self._length = _MOST // number // _BLOCK * _BLOCK
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        os.ftruncate(self._fd, number * self._length)

    def open(self) -> Geometry:
        return Geometry(self._number * self._length)

    def map(self, target_map: Map) -> None:
        file = Routing.all(File(target_map.add_file(self._fd, in_memory=True)))
        length, places = self._length, [*range(self._number)]
        places = places[self._number // 2 :] + places[: self._number // 2]
        target_map.replace(Extent(n * length, length, file, place * length) for n, place in enumerate(places))


def main() -> None:
    path, *numbers = sys.argv[1:]
    extents, queues, depth = map(int, numbers)
    print(f"/dev/ublkb{add(DeviceConfig(DeviceOptions({'queues': queues, 'depth': depth}), Extents(path, extents)))}")


if __name__ == "__main__":
    main()
