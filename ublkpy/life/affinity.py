"""``ublk set-affinity``: the CPUs that the threads of a queue run on."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from ublkpy.driver import inspect
from ublkpy.errors import ConfigError, UblkError


def set_affinity(dev_id: int, q_id: int, cpus: Collection[int]) -> None:
    """Have the threads of queue ``q_id`` run on ``cpus``, for as long as the daemon lives. Raises UblkError."""
    device = inspect.status(dev_id)
    if not device.known:
        raise UblkError(f"device {dev_id} is served by another program", "use the tool that added it")
    pid = device.pid
    if pid is None:
        raise UblkError(f"nobody serves device {dev_id}", device.advice)
    threads = [queue.tid for queue in device.known.queues if queue.q_id == q_id]
    if not threads:
        raise ConfigError(f"device {dev_id} has no queue {q_id}", f"it has {device.info.nr_hw_queues}, from 0 on")
    for tid in threads:
        if not Path(f"/proc/{pid}/task/{tid}").exists():
            raise UblkError(f"the thread of queue {q_id} has ended", f"see: ublk list -n {dev_id}")
        try:
            os.sched_setaffinity(tid, cpus)
        except OSError as e:
            wanted = ", ".join(map(str, sorted(cpus)))
            raise UblkError(
                f"cannot have queue {q_id} run on CPUs {wanted}: {os.strerror(e.errno or 0)}",
                "are they online (lscpu), and in the cpuset of the daemon's cgroup?",
            ) from e
