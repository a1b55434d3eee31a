"""What the guest's kernel complained about on its console."""

import re
from collections.abc import Sequence

_HEADLINE = re.compile(
    r"kernel BUG|BUG:|WARNING:|blocked for more than|general protection|KASAN|UBSAN"
    r"|rcu:.*(?:stall|starved)|rcu_\w+ (?:self-)?detected"
)
# these belong to a report, but sometimes are all that is seen of one
_DETAIL = re.compile(r"Oops|Call Trace")
_END = re.compile(r"</TASK>|---\[ end ")


def reports(console: str) -> list[str]:
    """The kernel's complaints: each from its headline to the end of its trace, or else to the next headline."""
    found: list[list[str]] = []
    inside = False
    for line in console.splitlines():
        if _HEADLINE.search(line) or (not inside and _DETAIL.search(line)):
            found.append([])
            inside = True
        if inside:
            found[-1].append(line)
            inside = not _END.search(line)
    return ["\n".join(lines) for lines in found]


def unexpected(console: str, allowed: Sequence[re.Pattern[str]]) -> list[str]:
    """The complaints that match none of the `allowed` patterns anywhere in their text."""
    return [report for report in reports(console) if not any(pattern.search(report) for pattern in allowed)]


def before(console: str, *marks: str) -> str:
    """The lines before the first that has one of `marks` in it."""
    lines = console.splitlines()
    end = next((i for i, line in enumerate(lines) if any(mark in line for mark in marks)), len(lines))
    return "\n".join(lines[:end])


def excerpt(text: str, lines: int) -> str:
    """The first `lines` lines, indented."""
    return _indented(text.splitlines()[:lines])


def tail(text: str, lines: int) -> str:
    """The last `lines` lines, indented."""
    return _indented(text.splitlines()[-lines:])


def _indented(lines: Sequence[str]) -> str:
    return "".join(f"  {line}\n" for line in lines)
