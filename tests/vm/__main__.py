"""The command line."""

import argparse
import asyncio
import os
import re
import shlex
import signal
import sys
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import host, kernels
from .accel import choose
from .errors import SetupError
from .guest import PRIVATE
from .machine import INSTRUCTION_CLOCK
from .run import CRASHED, KERNEL_WARNED, TIMED_OUT, Job, on_each

_SETUP_FAILED = 2
_JOBS = len(os.sched_getaffinity(0))
_USAGE = "python3 -m tests.vm [OPTIONS] (-- COMMAND... | --pytest PATH [ARGUMENTS...] | --fetch [SERIES...])"
_EPILOG = f"""\
One COMMAND word is shell text, several are a program and its arguments. It runs as root in the current folder, sees
this machine's files (what it writes is gone afterwards, but for -w and --out), and finds ublk_drv loaded, modules to
insmod (loop, nbd, null_blk, xfs...) in $UBLKPY_MODULES and the kernel series in $UBLKPY_KERNEL. /run, /mnt and
/dev/shm are its own, in memory. Of the environment it gets PATH, HOME, TERM, COLUMNS, CI, PYTEST_ADDOPTS and UBLKPY_*.

Exit status: the command's, or else {_SETUP_FAILED} the machine could not be set up, {KERNEL_WARNED} the kernel
complained though the command succeeded, {TIMED_OUT} time was up, {CRASHED} the guest crashed. Of several kernels, the
first that failed.
"""
_PASSED_ON = re.compile(r"PATH|HOME|TERM|COLUMNS|CI|PYTEST_ADDOPTS|UBLKPY_\w+")


def main() -> int:
    arguments = _parser().parse_args()
    try:
        return asyncio.run(_interruptible(_main(arguments)))
    except SetupError as error:
        print(f"tests.vm: {error}", file=sys.stderr)
        return _SETUP_FAILED
    except BrokenPipeError:
        # nobody reads what we print; point stdout elsewhere so that Python does not stumble over it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


async def _main(arguments: argparse.Namespace) -> int:
    if arguments.fetch is not None:
        for kernel in await kernels.provide(_all_known(arguments.fetch or kernels.SERIES)):
            print(f"{kernel.series}\t{kernel.release}\t{kernel.folder}")
        return 0
    job = _job(arguments, os.environ)
    if job.systemd and job.write_through:
        raise SetupError("--systemd changes files in /etc, and with -w they would be this machine's", "Leave -w out.")
    if _on_host(arguments.on, os.environ):
        if job.systemd:
            raise SetupError("--systemd is about how a machine boots, so it cannot be this one", "Leave --on host out.")
        return await host.run(job)
    for folder in filter(None, (job.folder, job.out)):
        _visible_in_guest(folder)
    chosen = await kernels.provide(_all_known(re.split(r"[\s,]+", arguments.kernels.strip())))
    accelerator = INSTRUCTION_CLOCK if arguments.instruction_clock else await choose(chosen[0])
    statuses = await on_each(job, chosen, accelerator, arguments.jobs)
    failed = [f"{kernel.series} ({status})" for kernel, status in zip(chosen, statuses, strict=True) if status]
    if failed and len(chosen) > 1:
        print(f"tests.vm: failed on {', '.join(failed)}", file=sys.stderr)
    return next(filter(None, statuses), 0)


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
    what.add_argument("--fetch", metavar="SERIES", nargs="*", help="only fetch kernels into the cache, and list them")
    what.add_argument("command", metavar="COMMAND", nargs="*", default=[], help="the command")
    return parser


def _job(arguments: argparse.Namespace, environment: Mapping[str, str]) -> Job:
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
