"""One device's life in its daemon, from ADD_DEV to the last request.

::

    create ──▶ bring up ──▶ START_DEV ──▶ serve ──▶ close
      │           │             │           │
      └───────────┴─────────────┘        SIGTERM: another process
         on failure: delete              stops and deletes

A device in use (mounted, swapped on, held by another) outlives SIGTERM, for
at shutdown that may come before its file system is unmounted; a second one
ends it all the same.

A process that waits for STOP_DEV of its own device can end up waiting for
itself where not even SIGKILL helps: the command holds the process, the process
holds the requests that the command waits for. So who serves never sends it,
but has another process do it (end.py).

Nothing here takes the process for its own: what depends on that is in host.py.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import operator
import os
import signal
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from inspect import iscoroutinefunction
from typing import Any

from ublkpy.daemon import cdev, resize, resync
from ublkpy.daemon.channel import KEEP, UPGRADE, Channel, Orders
from ublkpy.daemon.ending import DEADLINE as HELPER_DEADLINE
from ublkpy.daemon.ending import Ending
from ublkpy.daemon.forks import taking
from ublkpy.daemon.host import Daemon, Host
from ublkpy.daemon.memory import HugeFile
from ublkpy.daemon.notify import Manager
from ublkpy.daemon.plan import Plan
from ublkpy.daemon.pulse import PERIOD, Pulse
from ublkpy.daemon.shmem import DEADLINE as SHMEM_DEADLINE
from ublkpy.daemon.shmem import Sharing
from ublkpy.daemon.worker import Worker
from ublkpy.driver import inspect, state, udev
from ublkpy.driver.ctrl import AUTO_ID, START_DEADLINE, Control
from ublkpy.errors import InterruptedByUser, UblkError
from ublkpy.system.spawn import wait_end
from ublkpy.system.wait import readable
from ublkpy.tgt import handlers
from ublkpy.uring import libc
from ublkpy.uring.map import Map
from ublkpy.uring.mode import Mode, names
from ublkpy.uring.queue import Memory
from ublkpy.uring.uapi import DevInfo, Feature, State

_log = logging.getLogger(__name__)

_END = signal.SIGTERM
_RETRY = 2.0

BRING_UP_DEADLINE = udev.OWNED_DEADLINE + cdev.DEADLINE + 3 * START_DEADLINE + 2 * SHMEM_DEADLINE + HELPER_DEADLINE
"""Seconds after which a daemon serves, or has said why not: all that it waits for, and then taking it back."""


class Server:
    """Serves one device; all of it runs in one thread, a daemon's main thread, but for what says otherwise.

    ``failure`` is what a queue could not be served for any more.
    """

    def __init__(self, plan: Plan, manager: Manager | None = None, host: Host | None = None) -> None:
        """UblkError when what the device shares cannot be opened."""
        self.failure: BaseException | None = None
        self._plan = plan
        self._old_segments = plan.config.target.segments()
        self._workers: list[Worker] = []
        self._memories: list[Memory] = []
        self._map: Map | None = None
        self._sharing: Sharing | None = None
        device = plan.config.device
        self._htlb = HugeFile.open(device.htlb, read_only=device.rdonly_shmem_buf) if device.htlb else None
        self._helper: Ending | None = None
        self._cdev_fd = -1
        self._refused = False
        self._created = False
        self._started = False
        self._saving = threading.Lock()
        self._channel: Channel | None = None
        self._manager = manager or Manager()
        self._host = host or Daemon()
        self._is_cut = False
        self._is_open = True  # the target
        self._is_serving = self._has_changed = False
        # Signals and threads that end write a byte here and so wake the main thread.
        self._wake_r, self._wake_w = socket.socketpair()
        self._wake_r.setblocking(False)
        self._wake_w.setblocking(False)

    def wake_fd(self) -> int:
        """Where the byte of a signal goes; those of SIGTERM and SIGINT are a wish to end."""
        return self._wake_w.fileno()

    def end(self) -> None:
        """Have it deleted, unless it is in use; said again, all the same. Any thread."""
        self._wake(bytes([_END]))

    def cut(self) -> None:
        """End the queues with their requests unanswered: those then fail. Any thread."""
        self._is_cut = True
        for worker in self._workers:
            worker.cut()

    def is_waiting(self) -> bool:
        """Whether it has requests that are not answered yet. Any thread."""
        return any(worker.is_waiting() for worker in self._workers)

    def silence(self) -> float:
        """For how many seconds there were requests and none was answered, when that was last looked at. Any thread."""
        return self._pulse.seconds

    def files(self) -> list[int]:
        """What a forked child must close, or the device could not go before it. In that child, too."""
        channel = [self._channel.fileno()] if self._channel else []
        return [fd for fd in (self._cdev_fd, *channel, *(worker.fileno() for worker in self._workers)) if fd >= 0]

    def close(self) -> bool:
        """Let go of what is left. After ``create`` has failed, or ``serve`` has returned.

        False if the target could not be closed, because one of its methods has not returned; again then, or never.
        """
        self._close()
        for worker in self._workers:
            if not worker.serving:
                worker.join()  # it wakes us yet
        if not any(worker.serving for worker in self._workers):
            self._wake_r.close()
            self._wake_w.close()
        return not self._is_open

    def create(self) -> DevInfo:
        """ADD_DEV and all up to START_DEV. On failure nothing is left. Raises UblkError."""
        options = self._plan.config.device
        wanted = DevInfo(
            dev_id=AUTO_ID if options.id < 0 else options.id,
            nr_hw_queues=options.queues,
            queue_depth=options.depth,
            max_io_buf_bytes=options.max_io_buf_bytes,
            flags=Feature(0),
            ublksrv_flags=self._plan.cookie,
            io_desc_size=options.io_desc_size,
        )
        with Control() as control:
            mode, needed = self._plan.demand(control.features())
            info = control.add(replace(wanted, flags=functools.reduce(operator.or_, needed.values())))
            try:
                for what, flags in needed.items():
                    if flags & ~info.flags:
                        raise UblkError(
                            f"the driver did not give the device {names(flags & ~info.flags)}",
                            f"it is needed for {what}",
                        )
                if options.unprivileged:
                    udev.wait_owned(info.dev_id)
                control.set_params(info.dev_id, self._plan.params(info.max_io_buf_bytes, mode))
                state.remove(info.dev_id)  # that of a device which went without us, as when the driver was unloaded
                self._bring_up(control, info, mode)
                control.start(info.dev_id, self._wake_r.fileno())
                if self._sharing:
                    self._sharing.begin(self._htlb)
            except BaseException as e:
                self.abandon(info.dev_id)
                self._drop_segments()
                raise self._cause(e) from e
        self._created = True
        return info

    def take_over(self, info: DevInfo, mode: Mode) -> None:
        """Serve a device whose daemon died, after START_USER_RECOVERY. Raises UblkError."""
        with Control() as control:
            try:
                self._bring_up(control, info, mode)
                control.end_recovery(info.dev_id, self._wake_r.fileno())
            except BaseException as e:
                if info.dev_id not in inspect.device_ids():  # deleted meanwhile, and our state file after that
                    state.remove(info.dev_id, self._plan.cookie)
                raise self._cause(e) from e
        if self._sharing:
            try:
                self._sharing.begin(self._htlb, self._plan.stale_buffers)
            except UblkError as e:  # all else works again
                _log.error("%s", e.message)

    def unheard(self) -> None:
        """The command that waited for us was killed: nobody knows of a device that is new, so it ends."""
        _log.warning("the command that waited for this device was killed")
        if self._created:
            self.end()

    def serve(self, info: DevInfo) -> int:
        """Until the driver has taken the device back. Returns the exit status: 1 if the device goes on without anybody.

        With a service manager, a device in use is tried again until it is free, and never ended by force: it asks
        a second time without having been told to.
        """
        manager = self._manager
        _log.info("serving /dev/ublkb%d", info.dev_id)
        asked = told_to_end = False
        self._is_serving = True
        while any(worker.serving for worker in self._workers):
            self._check_change()
            again = manager and self._refused
            timeout = _RETRY if again else min(PERIOD, manager.period or PERIOD)
            asked = self._woken(timeout) or asked  # also what is said while the helper runs
            told_to_end |= asked
            manager.alive()
            self._pulse.look()
            self._check_holders(info)
            self._check_helper()
            if (asked or again) and self._helper is None:
                manager.stopping(f"waiting for the end of /dev/ublkb{info.dev_id}")
                force = self._refused and not manager
                asked = False
                _log.info("asked to end: deleting /dev/ublkb%d%s", info.dev_id, " by force" if force else "")
                self._start_helper(info.dev_id, force=force)
            self._check_workers()
        self._check_workers()
        successor = self._channel.holder(UPGRADE) if self._channel else None
        held = bool(successor) or self._is_held()
        stays = self._stays(info, held)
        self._hang_up()
        # Before the character device is closed: then the id, and the file with it, can be another's.
        if stays:
            self._save(kept=held)
        else:
            state.remove(info.dev_id, self._plan.cookie)
        self._close()
        self._wait_helper()
        if stays and successor and not self._hand_over(info, successor, told_to_end):
            held = False
            self._save(kept=False)
        if stays and not held:
            _log.error("/dev/ublkb%d waits for another daemon, and nobody is about to start one", info.dev_id)
            return 1
        if not successor:
            _log.info("/dev/ublkb%d has ended", info.dev_id)
        return 0

    # -- bring-up --------------------------------------------------------------------------

    def _bring_up(self, control: Control, info: DevInfo, mode: Mode) -> None:
        """Open the character device, start the queues, write the state file."""
        cdev.open_cdev(info.dev_id, self._take_cdev)
        handlers.start(self._plan.config.target, self.end, self._note_change)
        self._started = True
        self._map = handlers.make_map(self._plan.config.target, self._plan.geometry.size)
        options = self._plan.config.device
        if options.shmem_zc:
            self._sharing = Sharing(
                info.dev_id, self._plan.cookie, read_only=options.rdonly_shmem_buf, save=self._save_buffers
            )
        shared = self._sharing.buffers if self._sharing else None
        threads = options.threads_per_queue
        cpus = [control.affinity(info.dev_id, q_id) for q_id in range(info.nr_hw_queues)]
        for q_id in range(info.nr_hw_queues):
            self._memories.append(
                Memory(self._cdev_fd, q_id, info.queue_depth, info.max_io_buf_bytes, threads, info.io_desc_size),
            )
        # In batch mode the first thread of a queue tells the driver the tags that all of them then fetch.
        for group in (range(1), range(1, threads)):
            self._start_workers(
                Worker(
                    memory,
                    thread,
                    mode,
                    self._plan.config.target,
                    self._map,
                    cpus[memory.q_id],
                    info.dev_id + thread,  # devices with one queue are spread, and the threads of one
                    self._wake,
                    shared,
                )
                for memory in self._memories
                for thread in group
            )
        config, target = self._plan.config, self._plan.config.target
        self._state = state.DeviceState(
            dev_id=info.dev_id,
            cookie=self._plan.cookie,
            pid=os.getpid(),
            start_time=state.process_start_time(os.getpid()) or 0,
            mode=mode.name,
            queues=sorted((worker.state() for worker in self._workers), key=lambda thread: thread.q_id),
            config=config.dump(),
            target=self._described(self._plan.geometry.size),
            backing=handlers.backing(target),
            segments=target.segments(),
            within=self._host.within,
        )
        self._save_buffers(self._plan.stale_buffers)
        self._pulse = Pulse(info.dev_id, self.is_waiting)
        orders: Orders = {
            "resize": self._resize,
            "service": self._manager.to_dict,
            "pulse": self._pulse.to_dict,
            **resync.orders(target, self._check_change),
        }
        self._channel = Channel(info.dev_id, orders)

    def _take_cdev(self, fd: int) -> None:
        self._cdev_fd = fd

    def _save_buffers(self, indices: Sequence[int]) -> None:
        """Write the state file, with the shared buffers that the driver knows. Raises UblkError."""
        self._save(shmem=list(indices))

    def _described(self, size: int) -> dict[str, Any]:
        """The target, in ublksrv's terms."""
        target = self._plan.config.target
        return {"name": target.name, "type": 0, "dev_size": size, **handlers.status(target)}

    def _note_change(self) -> None:
        """Of the target: it is told otherwise from now on. Any thread."""
        self._has_changed = True
        if self._is_serving:  # before that, it would end the wait for START_DEV
            self._wake()

    def _check_change(self) -> None:
        if self._has_changed:
            self._has_changed = False
            target, size = self._plan.config.target, self._state.target["dev_size"]
            self._save(target=self._described(size), backing=handlers.backing(target))

    def _save(self, **changes: Any) -> None:
        with self._saving:  # main thread, and that of shared memory
            self._state = replace(self._state, **changes)
            state.write(self._state)

    # -- orders ----------------------------------------------------------------------------

    def _resize(self, size: int, done: bool) -> dict[str, Any]:
        assert self._map
        config = self._plan.config
        resize.follow(self._state.dev_id, config.target, self._map, size, done=done)
        described = self._state.target | {"dev_size": self._map.size}
        self._save(config=config.dump(), target=described)
        return {}

    def _start_workers(self, workers: Iterable[Worker]) -> None:
        """Start them, and wait until each is ready."""
        started = []
        for worker in workers:
            try:
                with taking:
                    worker.start()
                    self._workers.append(worker)
            except RuntimeError as e:
                raise UblkError(
                    f"cannot start a thread for queue {worker.q_id}: the system allows no more",
                    "use fewer queues or threads, or raise the limit (ulimit -u, pids.max of the cgroup)",
                ) from e
            started.append(worker)
        deadline = time.monotonic() + START_DEADLINE
        for worker in started:
            if not worker.ready.wait(deadline - time.monotonic()):
                for late in started:
                    late.give_up()
                target = self._plan.config.target
                where = "start_thread() or start()" if iscoroutinefunction(target.start) else "start_thread()"
                raise UblkError(
                    f"queue {worker.q_id} did not get ready within {START_DEADLINE:g} s: target {target.name} has not"
                    f" returned from {where}",
                    "give what it waits for there a timeout of its own",
                )
            if worker.error:
                raise worker.error

    def _cause(self, e: BaseException) -> BaseException:
        """What to tell the user: rather than the interruption, what caused it."""
        for worker in self._workers:
            if isinstance(e, InterruptedByUser) and worker.error:
                e = worker.error
        if isinstance(e, InterruptedByUser) and not self._woken(timeout=0):
            return UblkError("the device was stopped by another process while it was set up", "try again")
        if isinstance(e, OSError):
            hint = {
                errno.ENOMEM: "use a smaller depth, fewer queues or smaller buffers (max_io_buf_bytes); a user who is"
                " not root may need a higher limit of locked memory (ulimit -l)",
                errno.EMFILE: "use fewer queues or threads, or raise the limit of open files (ulimit -n)",
            }.get(e.errno or 0, "the kernel log (dmesg) may say why")
            return UblkError(f"cannot serve the device: {e.strerror}", hint)
        return e

    def abandon(self, dev_id: int) -> None:
        """Delete a device that nobody has heard of yet, and end its queues."""
        self._start_helper(dev_id, force=True)
        deadline = time.monotonic() + (HELPER_DEADLINE if self._helper else 0)
        for worker in self._workers:
            worker.join(max(0, deadline - time.monotonic()))
            if not worker.serving:
                worker.release()
        self._close()
        self._wait_helper()

    def _drop_segments(self) -> None:
        """Those that the target made for a device that nobody gets."""
        for segment in set(self._plan.config.target.segments()).difference(self._old_segments):
            libc.shm_remove(segment)

    # -- the end ---------------------------------------------------------------------------

    def _wake(self, what: bytes = b"\0") -> None:
        # Full of bytes already: the main thread wakes all the same.
        with contextlib.suppress(BlockingIOError):
            self._wake_w.send(what)

    def _woken(self, timeout: float | None) -> bool:
        """Sleep until something happens; True if it was a wish to end."""
        channel, helper = self._channel, self._helper
        files = [self._wake_r.fileno()] + ([channel.fileno()] if channel else [])
        files += [helper.fileno()] if helper and helper.status() is None else []
        ready = readable(files, timeout)
        if channel and channel.fileno() in ready:
            channel.answer()
        try:
            events = self._wake_r.recv(4096)
        except BlockingIOError:
            return False
        return any(number in events for number in (_END, signal.SIGINT))

    def _start_helper(self, dev_id: int, *, force: bool) -> None:
        """Have another process stop and delete the device; with ``force``, it kills a daemon that hangs."""
        try:
            self._helper = Ending(dev_id, self._plan.cookie, force=force, report=self._host.within)
        except OSError as e:
            _log.error("cannot start the process that deletes the device: %s", e)

    def _check_helper(self) -> None:
        """After a deletion that failed, the next signal tries again, with force, or we do without."""
        if self._helper and self._helper.status():
            then = " until it is free" if self._manager else "; another signal ends it by force"
            _log.warning("the device stays%s", then)
            self._helper, self._refused = None, True

    def _wait_helper(self) -> None:
        if self._helper:
            try:
                self._helper.wait(HELPER_DEADLINE)
            except UblkError as e:
                _log.error("%s", e.message)
            except TimeoutError:
                _log.error("deleting the device takes more than %g s", HELPER_DEADLINE)

    def _check_workers(self) -> None:
        """A queue that failed cannot be served any more, and with it the device."""
        for worker in self._workers:
            if worker.error and not self._is_cut:
                _log.critical("queue %d failed: giving the device up", worker.q_id, exc_info=worker.error)
                self.failure = worker.error
                self._host.give_up(self)

    def _is_held(self) -> bool:
        """Whether somebody is about to go on with the device."""
        return self._channel is not None and bool(self._channel.holder(KEEP) or self._channel.holder(UPGRADE))

    def _check_holders(self, info: DevInfo) -> None:
        """Who quiesces a device and dies leaves it without some of its tags: new requests would wait for ever.

        When those that we have are answered, only our end brings it any further. A device that is stopped loses its
        tags, too, but is DEAD before that.
        """
        if self._is_held() or self._channel is None or not self._channel.has_lost_holder:
            return
        if not any(worker.has_lost_tags() for worker in self._workers):
            return
        if not self.is_waiting() and self._stays(info, held=False):
            _log.critical("who was about to go on with the device is gone: giving it up")
            self._host.give_up(self)

    def _stays(self, info: DevInfo, held: bool) -> bool:
        """Whether the device that we served goes on: it waits for another daemon, or who stopped it holds it."""
        if not held and Feature.QUIESCE not in info.flags:
            return False
        try:
            with Control() as control:
                now = control.info(info.dev_id)
        except UblkError:
            return False
        return now.ublksrv_flags == self._plan.cookie and (held or now.state != State.DEAD)

    def _hand_over(self, info: DevInfo, successor: int, told_to_end: bool) -> bool:
        """Have the service manager know who goes on, and that one what we were told; False if it has died.

        As the last thing: until then it is us who are looked after.
        """
        _log.info("/dev/ublkb%d goes on with process %d", info.dev_id, successor)
        if self._manager and not self._manager.main_process(successor):
            _log.error("the service manager does not know that; see: journalctl -u init.scope")
        with contextlib.suppress(ProcessLookupError):
            if self._manager and told_to_end:  # else a signal that was refused counts no more
                os.kill(successor, signal.SIGTERM)
        return not wait_end(successor, 0)

    def _hang_up(self) -> None:
        if channel := self._channel:
            self._channel = None  # first, as a child that is forked now looks here: files()
            channel.close()
        if self._sharing:
            self._sharing.close()  # before the id, and so the path of its socket, can be another's
            self._sharing = None

    def _close(self) -> None:
        self._hang_up()
        if any(worker.serving for worker in self._workers):
            return  # all that follows is in use, and goes with the process
        for worker in self._workers:
            worker.release()
        if self._cdev_fd >= 0:
            with taking:
                fd, self._cdev_fd = self._cdev_fd, -1
                os.close(fd)
        cut_off = self._is_cut or any(worker.error for worker in self._workers)
        for memory in self._memories:
            memory.close(leave_buffers=cut_off)
        if any(worker.is_inside() for worker in self._workers):
            return  # what follows is in use, and the device is not
        if self._started:  # with threads of its own, it may change the map until then
            handlers.stop(self._plan.config.target, was_cut=cut_off)
            self._started = False
        if self._map:
            self._map.close()
        if self._htlb:
            self._htlb.close()
            self._htlb = None
        if self._is_open:
            self._plan.config.target.close()
            self._is_open = False
