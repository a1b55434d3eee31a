"""Children never outlive the block that they were started in."""

import asyncio
import signal
import subprocess
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest

from tests.vm.errors import SetupError
from tests.vm.process import output_of, spawn


def test_killed_at_the_end_of_the_block() -> None:
    async def scenario() -> int | None:
        async with spawn(["sleep", "60"]) as process:
            pass
        return process.returncode

    assert asyncio.run(scenario()) == -signal.SIGKILL


def test_killed_with_the_harness() -> None:
    script = """if True:
        import asyncio, os, signal
        from tests.vm.process import spawn
        async def scenario():
            async with spawn(["sleep", "60"], stdout=None):
                await asyncio.sleep(0.5)
                os.kill(os.getpid(), signal.SIGKILL)
        asyncio.run(scenario())"""
    root = Path(__file__).parents[3]
    # the orphan holds stdout: this returns when it is gone
    result = subprocess.run([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, timeout=20)
    assert result.returncode == -signal.SIGKILL


def test_output() -> None:
    assert asyncio.run(output_of("echo", "a", "b", seconds=10, cure="-")) == "a b\n"


def test_failure_shows_the_end_of_the_output_and_the_cure() -> None:
    with pytest.raises(SetupError, match=r"(?s)exit status 4.*last words.*try this"):
        asyncio.run(output_of("sh", "-c", "echo last words >&2; exit 4", seconds=10, cure="try this"))


def test_too_slow() -> None:
    with pytest.raises(SetupError, match="did not finish"):
        asyncio.run(output_of("sleep", "60", seconds=0.3, cure="-"))


def test_pipes_are_the_callers() -> None:
    async def scenario() -> bytes:
        async with spawn(["echo", "x"], stdout=PIPE) as process:
            assert process.stdout
            return await process.stdout.read()

    assert asyncio.run(scenario()) == b"x\n"
