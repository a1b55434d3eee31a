"""Where a daemon's words go: the journal, a file, or the terminal. Never nowhere."""

from __future__ import annotations

import logging
import os
import socket
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from ublkpy.errors import UblkError
from ublkpy.folders import log_file, open_log
from ublkpy.system import process

JOURNAL = Path("/run/systemd/journal/stdout")

# syslog(3)'s numbers, which journald reads from a <N> at the start of a line
_PRIORITY = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}


def to_terminal() -> None:
    """Log to stderr as it is, for a daemon in the foreground: that may be the journal, under systemd."""
    _set_up(_Formatter("journal" if _is_journal(2) else "terminal"))


def style() -> str:
    """What the log is, for a process that is to join it with ``join``."""
    return next(h.formatter.style for h in logging.getLogger().handlers if isinstance(h.formatter, _Formatter))


def join(style: str, dev_id: int) -> None:
    """Log to the stderr that a daemon passed on, as it does."""
    _set_up(_Formatter(style))
    name_device(dev_id)


def detach(file: Path | None) -> None:
    """Point stdin and stdout at nothing and stderr at the log.

    stderr itself, not only ``logging``: a crash of the interpreter, too, must leave a trace. UblkError when
    the log cannot be opened.
    """
    path = file or log_file()
    try:
        fd, style = (None if file else _open_journal()), "journal"
        if fd is None:
            if not file:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd, style = open_log(path), "file"
    except (OSError, UblkError) as e:
        why = os.strerror(e.errno or 0) if isinstance(e, OSError) else e.message
        raise UblkError(f"cannot open the log {path}: {why}", "name another one with --log FILE") from e
    process.redirect_streams(fd)
    os.close(fd)
    _set_up(_Formatter(style))


def name_device(dev_id: int) -> None:
    """From now on each line carries the device's name."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, _Formatter):
            handler.formatter.device = f"ublkb{dev_id}"


class _Formatter(logging.Formatter):
    """Puts a prefix before each line, those of tracebacks included: devices may share a log."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        self.device = "ublk"

    def format(self, record: logging.LogRecord) -> str:
        prefix = _PREFIXES[self.style](self, record)
        return "\n".join(prefix + line for line in super().format(record).splitlines())


def _for_terminal(formatter: _Formatter, record: logging.LogRecord) -> str:
    return f"{formatter.device}: {record.levelname}: "


def _for_file(formatter: _Formatter, record: logging.LogRecord) -> str:
    when = formatter.formatTime(record)
    return f"{when} {formatter.device}[{record.process}]: {record.levelname}: "


def _for_journal(formatter: _Formatter, record: logging.LogRecord) -> str:
    return f"<{_PRIORITY.get(record.levelno, 6)}>{formatter.device}: "


_PREFIXES: dict[str, Callable[[_Formatter, logging.LogRecord], str]] = {
    "terminal": _for_terminal,
    "file": _for_file,
    "journal": _for_journal,
}


def _set_up(formatter: logging.Formatter) -> None:
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    handler.addFilter(_is_ours)
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)


def hear(module: str) -> None:
    """What this module of an installed package and its like say in passing is of interest, too: a target's."""
    _heard.add(module.partition(".")[0])


_heard = {"ublkpy"}
_STDLIB = sysconfig.get_path("stdlib") + os.sep


def _is_ours(record: logging.LogRecord) -> bool:
    """Libraries, which tell of each of their requests, are heard from WARNING on."""
    path = record.pathname
    is_library = path.startswith(_STDLIB) or "/site-packages/" in path or "/dist-packages/" in path
    return record.levelno >= logging.WARNING or not is_library or record.name.partition(".")[0] in _heard


def _is_journal(fd: int) -> bool:
    """Whether systemd connected this stream to the journal; it says which one that was (systemd.exec(5))."""
    stream = os.fstat(fd)
    return os.environ.get("JOURNAL_STREAM") == f"{stream.st_dev}:{stream.st_ino}"


def _open_journal() -> int | None:
    """A stream to journald (systemd's stream protocol): a header of seven lines, then text. None without it."""
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        stream.connect(str(JOURNAL))
    except OSError:
        stream.close()
        return None
    stream.sendall(b"ublkpy\n\n6\n1\n0\n0\n0\n")
    return stream.detach()
