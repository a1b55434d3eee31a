"""The command line."""

import argparse
import asyncio
import os
import re
import shlex
import signal
import sys
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import host, kernels, nbdkit
from .accel import choose
from .errors import SetupError
from .guest import PRIVATE
from .machine import INSTRUCTION_CLOCK
from .run import CRASHED, KERNEL_WARNED, TIMED_OUT, Job, Run, all_of

_SETUP_FAILED = 2
_JOBS = len(os.sched_getaffinity(0))
_AND = "--and"
_USAGE = (
    "python3 -m tests.vm [OPTIONS] (-- COMMAND... | --pytest PATH [ARGUMENTS...] | --fetch [SERIES...])"
    f" [{_AND} [OPTIONS] ...]"
)
_EPILOG = f"""\
One COMMAND word is shell text, several are a program and its arguments. It runs as root in the current folder, sees
this machine's files (what it writes is gone afterwards, but for -w and --out), and finds ublk_drv loaded, modules to
insmod (loop, nbd, null_blk, xfs...) in $UBLKPY_MODULES, the kernel series in $UBLKPY_KERNEL and the first of the series
that it is run on in $UBLKPY_FIRST_KERNEL. /run, /mnt and /dev/shm are its own, in memory. Of the environment it gets
PATH, HOME, TERM, COLUMNS, CI, PYTEST_ADDOPTS and UBLKPY_*.

What follows {_AND} is another command with options of its own, for which the machines take turns: -j, -i and --on
are those of the first.

Exit status: the command's, or else {_SETUP_FAILED} the machine could not be set up, {KERNEL_WARNED} the kernel
complained though the command succeeded, {TIMED_OUT} time was up, {CRASHED} the guest crashed. Of several, the first
that failed.
"""
_PASSED_ON = re.compile(r"PATH|HOME|TERM|COLUMNS|CI|PYTEST_ADDOPTS|UBLKPY_\w+")


def main() -> int:
    parser = _parser()
    arguments = [parser.parse_args(words) for words in _parts(sys.argv[1:])]
    if len(arguments) > 1 and any(part.fetch is not None for part in arguments):
        parser.error(f"--fetch and {_AND} exclude each other")
    try:
        return asyncio.run(_interruptible(_main(arguments)))
    except SetupError as error:
        print(f"tests.vm: {error}", file=sys.stderr)
        return _SETUP_FAILED
    except BrokenPipeError:
        # nobody reads what we print; point stdout elsewhere so that Python does not stumble over it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


async def _main(parts: Sequence[argparse.Namespace]) -> int:
    first = parts[0]
    if first.fetch is not None:
        for kernel in await kernels.provide(_all_known(first.fetch or kernels.SERIES)):
            print(f"{kernel.series}\t{kernel.release}\t{kernel.folder}")
        await nbdkit.provide()
        return 0
    jobs = [_job(part, os.environ) for part in parts]
    if _on_host(first.on, os.environ):
        return await _here(jobs)
    series = [_all_known(re.split(r"[\s,]+", part.kernels.strip())) for part in parts]
    runs = [run for job, wanted in zip(jobs, series, strict=True) for run in await _runs(job, wanted)]
    accelerator = INSTRUCTION_CLOCK if first.instruction_clock else await choose(runs[0].kernel)
    outcomes = await all_of(runs, accelerator, first.jobs)
    failed = [outcome for outcome in outcomes if outcome.status]
    if failed and len(runs) > 1:
        print("tests.vm: failed on", *failed, sep="\n  ", file=sys.stderr)
    return failed[0].status if failed else 0


async def _here(jobs: Sequence[Job]) -> int:
    """On this machine, as far as all goes well."""
    for job in jobs:
        if job.systemd:
            raise SetupError("--systemd is about how a machine boots, so it cannot be this one", "Leave --on host out.")
        if status := await host.run(job):
            return status
    return 0


def _parts(words: Sequence[str]) -> list[list[str]]:
    """The words of each command."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == _AND:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


async def _runs(job: Job, series: Sequence[str]) -> list[Run]:
    """The job on each of its kernels; it is told which is the first."""
    for folder in filter(None, (job.folder, job.out)):
        _visible_in_guest(folder)
    told = replace(job, environment={**job.environment, "UBLKPY_FIRST_KERNEL": series[0]})
    return [Run(told, kernel) for kernel in await kernels.provide(series)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tests.vm",
        usage=_USAGE,
        description="Run a command on a real kernel with the ublk driver, in a small machine.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-k", "--kernels", metavar="SERIES", default="7.3", help=f"one or several of {' '.join(kernels.SERIES)} (7.3)")
    add("-j", "--jobs", metavar="N", type=_positive, default=_JOBS, help=f"run on so many kernels at once ({_JOBS})")
    add("-c", "--cpus", metavar="N", type=_positive, default=2, help="the machine's CPUs (2)")
    add("-m", "--memory", metavar="SIZE", default="2G", help="the machine's memory (2G)")
    add("-t", "--seconds", metavar="N", type=_positive, default=600, help="end a hung command after this (600)")
    add("-w", "--write-through", action="store_true", help="writes go to this machine's files and stay")
    add("--out", metavar="FOLDER", type=Path, help="writes below this folder go to this machine and stay")
    add("-i", "--instruction-clock", action="store_true", help="count time in instructions: slow, but figures repeat")
    add("--systemd", metavar="PREPARE", default="", help="boot with systemd as init, after this shell text has run")
    add("--allow-warning", metavar="REGEX", type=_pattern, action="append", default=[], help="accept such a complaint")
    add("--on", choices=("auto", "vm", "host"), default="auto", help="auto: host if UBLKPY_TEST_ON=host, else vm")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--pytest", metavar="...", nargs=argparse.REMAINDER, help="run .venv's pytest on these")
    what.add_argument(
        "--fetch",
        metavar="SERIES",
        nargs="*",
        help="only fetch what tests need into the cache, and list kernels",
    )
    what.add_argument("command", metavar="COMMAND", nargs="*", default=[], help="the command")
    return parser


def _job(arguments: argparse.Namespace, environment: Mapping[str, str]) -> Job:
    if arguments.systemd and arguments.write_through:
        raise SetupError("--systemd changes files in /etc, and with -w they would be this machine's", "Leave -w out.")
    return Job(
        command=_command(arguments),
        folder=Path.cwd(),
        seconds=arguments.seconds,
        environment={name: value for name, value in environment.items() if _PASSED_ON.fullmatch(name)},
        write_through=arguments.write_through,
        out=arguments.out and arguments.out.resolve(),
        cpus=arguments.cpus,
        memory=arguments.memory,
        allowed=tuple(arguments.allow_warning),
        systemd=arguments.systemd,
    )


def _command(arguments: argparse.Namespace) -> str:
    if arguments.pytest is not None:
        python = Path(".venv/bin/python")
        if not python.exists():
            raise SetupError(f"no {python} to run pytest with", "scripts/setup build")
        # at the end of a session, that plugin would import all of Hypothesis: ten seconds in emulation
        return shlex.join([str(python), "-m", "pytest", "-p", "no:hypothesispytest", *arguments.pytest])
    words: list[str] = arguments.command
    return words[0] if len(words) == 1 else shlex.join(words)


def _on_host(choice: str, environment: Mapping[str, str]) -> bool:
    wanted = environment.get("UBLKPY_TEST_ON", "vm") if choice == "auto" else choice
    if wanted not in ("vm", "host"):
        raise SetupError(f"UBLKPY_TEST_ON is {wanted!r}", "It can be vm or host.")
    return wanted == "host"


def _visible_in_guest(folder: Path) -> None:
    if not folder.is_dir():
        raise SetupError(f"{folder} is not a folder", "Make it first.")
    if any(folder.is_relative_to(private) for private in PRIVATE):
        raise SetupError(
            f"{folder} is not seen in the guest, which has its own {', '.join(PRIVATE)}", "Use another folder."
        )


def _all_known(wanted: Sequence[str]) -> Sequence[str]:
    for series in wanted:
        if series not in kernels.SERIES:
            raise SetupError(f"no kernel series {series!r}", f"There are {', '.join(kernels.SERIES)}.")
    return wanted


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from None


async def _interruptible(work: Coroutine[Any, Any, int]) -> int:
    """Turn Ctrl-C and polite kills into a cancellation, which ends every child and removes every temporary folder."""
    task = asyncio.current_task()
    assert task
    received: list[int] = []

    def stop(number: int) -> None:
        received.append(number)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    try:
        return await work
    except asyncio.CancelledError:
        return 128 + received[0]


if __name__ == "__main__":
    sys.exit(main())
