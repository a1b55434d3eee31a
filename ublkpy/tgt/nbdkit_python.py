"""nbdkit-python: a plugin for nbdkit, written in Python, as a block device.

What the plugin's functions become::

    command      load, config, config_complete, thread_model, get_ready,
                 then preconnect, open, get_size, can_... and close
    daemon       after_fork
    first queue  preconnect, open, get_size, can_...
    each queue   pread, pwrite, flush, trim, zero
    last queue   close
    daemon       cleanup

There is one handle. Where requests come one by one, as is nbdkit's way unless the
plugin says otherwise, it is opened in the thread that serves them: with nbdkit, too,
that is one thread, and what plugins keep in a handle may depend on it.
"""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

from ublkpy.errors import UblkError
from ublkpy.tgt import nbdkit_calls
from ublkpy.tgt import nbdkit_module as nbdkit
from ublkpy.tgt.base import Geometry, Target
from ublkpy.tgt.nbdkit_script import Ability, Script
from ublkpy.tgt.options import Arguments, Code, option

_MAX_RANGE = 64 << 20
"""Bytes of a request to trim or zero: there are plugins that make so many zeroes in memory."""


class NbdkitPythonTarget(Target):
    """A plugin for nbdkit, written in Python, as a block device."""

    name = "nbdkit-python"
    script: Code = option(..., help="file of the plugin")
    args: Arguments | None = option(
        None, help="what the plugin is configured with; on the command line also without the flag"
    )

    _methods = frozenset(["read"])  # at least; the rest is known once it is open

    def open(self) -> Geometry:
        self._lock = threading.Lock()
        self._threads = 0  # of queues, that began and have not ended
        script = self._script = Script(self.script)
        script.configure(self.args or ())
        model = script.thread_model()
        self.blocking = model == nbdkit.THREAD_MODEL_PARALLEL
        # Options of the device, which are more than those of its disk.
        self._alone = getattr(self.disk, "queues", 1) * getattr(self.disk, "threads_per_queue", 1) == 1
        if model == nbdkit.THREAD_MODEL_SERIALIZE_CONNECTIONS and not self._alone:
            raise UblkError(
                f"{self.script} wants all its requests from one thread: SERIALIZE_CONNECTIONS",
                "leave queues and threads_per_queue out",
            )
        script.call("get_ready")
        handle = script.open(self.disk.read_only)
        try:
            self._ability = script.ability(handle)
            self._methods = frozenset(self._calls(handle))
        finally:
            script.call("close", handle)
        return self._geometry(self._ability)

    def paths(self) -> list[Path]:
        values = (argument.partition("=")[2] for argument in self.args or ())
        found = (value for value in values if value.startswith("/") and os.path.exists(value))  # noqa: PTH110
        return [*super().paths(), *map(Path, found)]

    def _geometry(self, found: Ability) -> Geometry:
        block = self.block_size(found.minimum)
        preferred = max(found.preferred, block)
        return Geometry(
            found.size,
            logical_block=block,
            physical_block=max(4096, block),
            io_min=max(4096, preferred),
            io_opt=max(4096, preferred),
            rotational=found.rotational,
            max_discard_bytes=_MAX_RANGE,
            max_write_zeroes_bytes=_MAX_RANGE,
        )

    def methods(self) -> frozenset[str]:
        return self._methods

    def start(self) -> None:
        self._script.call("after_fork")
        nbdkit._begin(self.end_device)

    def start_thread(self) -> None:
        with self._lock:
            self._threads += 1
            if self._threads > 1:
                return
            self._handle = self._script.open(self.disk.read_only)
            found = self._script.ability(self._handle)
            if found != self._ability:
                self._script.call("close", self._handle)
                raise UblkError(
                    f"{self.script} has another disk each time that it is opened: {self._ability}, and then {found}",
                    "a block device needs one that stays as it is",
                )
            calls = self._calls(self._handle)
            vars(self).update(calls if self.blocking or self._alone else nbdkit_calls.one_at_a_time(calls))

    def _calls(self, handle: object) -> dict[str, nbdkit_calls.Method]:
        ability = self._ability
        if self.disk.read_only:
            ability = replace(ability, write=False)
        # Without a flush, nothing but FUA makes a write durable.
        through = self.disk.write_cache is False or (ability.fua and not ability.flush)
        return nbdkit_calls.methods(self._script, ability, handle, through=through)

    def stop_thread(self) -> None:
        with self._lock:
            self._threads -= 1
            if self._threads == 0:
                self._script.call("close", self._handle)

    def stop(self) -> None:
        nbdkit._end(self.end_device)
        self._script.call("cleanup")

    def backing(self) -> str:
        return str(self.script)
