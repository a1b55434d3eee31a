"""What a forked child must close (``Server.files``) is written down before anybody can fork.

Between a file's opening and that, ``taking`` is held, and so it is from before it is forgotten to its closing.
"""

from __future__ import annotations

import os
import threading

taking = threading.RLock()

os.register_at_fork(before=taking.acquire, after_in_parent=taking.release, after_in_child=taking.release)
