"""Targets with ``async def``: an asyncio loop in the queue's thread, which the ring wakes."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections import deque
from collections.abc import Awaitable, Callable
from typing import cast

from ublkpy.tgt.base import Target
from ublkpy.tgt.handlers import told
from ublkpy.upcall.failure import Failures
from ublkpy.upcall.files import Files
from ublkpy.upcall.pool import executor
from ublkpy.upcall.steps import returned, serve_later
from ublkpy.uring.queue import LATER, Call, Event, IoError, Queue
from ublkpy.uring.uapi import Op

_READ, _WRITE = int(Op.READ), int(Op.WRITE)


Method = Callable[[int, memoryview], Awaitable[object] | None]


class Loop:
    """Tasks that stay take the requests, one after the other: a task for each would cost more than most of them.

    Before it begins one that may wait, a task has another one woken, if there are more; with the first of them that
    waits, that one goes on. What they answer goes to the driver together, at the end of a turn.
    """

    def __init__(self, queue: Queue, target: Target, tell: Callable[[IoError], None]) -> None:
        self._queue = queue
        self._target = target
        self._tell = tell
        self._read: Method = target.read
        self._write: Method = target.write
        self._failures = Failures(target.name)
        self._calls: deque[Call] = deque()
        self._tasks: set[asyncio.Task[None]] = set()  # asyncio does not hold on to them
        self._idle: list[asyncio.Future[None]] = []  # what wakes those that have nothing to do
        self._is_waking = False
        self._will_look = False

    async def run(self, ready: Callable[[], None]) -> None:
        """Until the driver has taken all tags back."""
        self._loop = asyncio.get_running_loop()
        self._loop.set_default_executor(executor(self._target.name))
        self._end = self._loop.create_future()
        self._files = Files(self._queue, self._look_soon)
        events = self._queue.listen()
        self._loop.add_reader(events, self._heard, events)
        try:
            has_started = await self._start()
            if has_started:
                ready()
                self._look()
            await self._end
            if has_started and inspect.iscoroutinefunction(self._target.stop):
                await cast("Awaitable[None]", self._target.stop())
            await self._end_tasks()
        finally:
            self._end.cancel()  # if it is not known yet: tasks are cancelled now, and end
            self._files.give_up()
            self._loop.remove_reader(events)

    async def _start(self) -> bool:
        """Of the target; False if the device has gone meanwhile. In this task, where its ``stop`` will run, too: there
        are libraries that want that.
        """
        if not inspect.iscoroutinefunction(self._target.start):
            return True
        task = cast("asyncio.Task[None]", asyncio.current_task())
        is_starting = True

        def cancel(_end: asyncio.Future[None]) -> None:
            if is_starting:
                task.cancel()

        self._end.add_done_callback(cancel)
        try:
            with told(self._target, "start"):
                await cast("Awaitable[None]", self._target.start())
        except asyncio.CancelledError:
            if not self._end.done():
                raise
            task.uncancel()
            return False
        finally:
            is_starting = False
        return True

    async def _end_tasks(self) -> None:
        """Ours, and what the target leaves: while they can still hear of their files."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _heard(self, events: int) -> None:
        os.eventfd_read(events)  # first: what comes after the look is told again
        self._look()

    def _look_soon(self) -> None:
        if not self._will_look:
            self._will_look = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        self._will_look = False
        try:
            while (event := self._queue.poll()) is not Event.NOTHING:
                if event is Event.UPCALLS:
                    self._calls.extend(self._queue.calls())
                    self._wake()
                elif event is Event.IO_ERROR:
                    self._tell(self._queue.error)
                elif event is Event.FILE_OPS:
                    self._files.end()
                elif event is Event.STOPPED:
                    if not self._end.done():
                        self._end.set_result(None)
                    return
        except OSError as e:
            if not self._end.done():
                self._end.set_exception(e)

    def _wake(self) -> None:
        """Have one more task look what there is to do."""
        if self._is_waking or not self._calls:
            return
        self._is_waking = True
        while self._idle:
            idle = self._idle.pop()
            if not idle.done():  # as one is whose task was cancelled
                idle.set_result(None)
                return
        task = self._loop.create_task(self._work())
        self._tasks.add(task)
        task.add_done_callback(self._lost)

    def _lost(self, task: asyncio.Task[None]) -> None:
        """One was cancelled before it began: another one is needed."""
        self._tasks.discard(task)
        if not self._end.done():
            self._is_waking = False
            self._wake()

    async def _work(self) -> None:
        """Every line in the loop counts: it is what a request costs."""
        calls, buffers, answer = self._calls, self._queue.buffers, self._queue.answer_here
        read, write = self._read, self._write
        while True:
            self._is_waking = False
            while calls:
                call = calls.popleft()
                if calls and not self._is_waking:
                    self._wake()
                offset, length, place, what, piece, _ = call
                result = 0
                try:
                    if what <= _WRITE:
                        with buffers[place : place + length] as buf:
                            later = read(offset, buf) if what == _READ else write(offset, buf)
                            if later is not None and await later is not None:
                                raise returned("read" if what == _READ else "write")
                    else:
                        result = await serve_later(self._queue, self._target, call)
                except BaseException as e:
                    if self._end.done():  # the queue has failed, and all tasks are cancelled
                        raise
                    result = self._failures.result(e)
                if result != LATER:
                    answer(piece, result)
                if not self._will_look:
                    self._look_soon()
            idle = self._loop.create_future()
            self._idle.append(idle)
            try:
                await idle
            except asyncio.CancelledError:  # by the target's code, which may cancel all tasks that it sees
                if self._end.done():
                    raise


def serve(queue: Queue, target: Target, tell: Callable[[IoError], None], ready: Callable[[], None]) -> None:
    """The whole life of the queue's thread."""
    asyncio.run(Loop(queue, target, tell).run(ready))
