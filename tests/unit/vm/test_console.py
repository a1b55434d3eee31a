"""What counts as a complaint of the kernel."""

import re

import pytest

from tests.vm.console import before, reports, unexpected

WARNING = """\
[   11.1] ------------[ cut here ]------------
[   11.1] WARNING: CPU: 0 PID: 99 at drivers/block/ublk_drv.c:1 ublk_uring_cmd_cancel_fn+0x1/0x2 [ublk_drv]
[   11.2] Call Trace:
[   11.2]  <TASK>
[   11.3]  io_uring_try_cancel_requests+0x1/0x2
[   11.4]  </TASK>
[   11.5] ---[ end trace 0000000000000000 ]---"""
HUNG = """\
[   20.1] INFO: task dd:7 blocked for more than 120 seconds.
[   20.2] Call Trace:
[   20.3]  schedule+0x1/0x2"""
QUIET = """\
[    0.5] mtrr: your CPUs had inconsistent fixed MTRR settings
[    1.0] EXT4-fs (ublkb0): warning: mounting unchecked fs, running e2fsck is recommended"""


def test_each_complaint_once() -> None:
    found = reports("\n".join([QUIET, WARNING, QUIET, HUNG, WARNING]))
    assert [report.splitlines()[0].split("]", 1)[1].split()[0] for report in found] == ["WARNING:", "INFO:", "WARNING:"]
    assert "mtrr" not in found[0]
    assert "schedule" in found[1]


@pytest.mark.parametrize(
    "line",
    [
        "kernel BUG at fs/inode.c:1!",
        "BUG: kernel NULL pointer dereference, address: 0000000000000010",
        "watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [python3:99]",
        "Oops: general protection fault, probably for non-canonical address 0x1: 0000 [#1] SMP",
        "Oops: int3: 0000 [#1] PREEMPT SMP NOPTI",
        "BUG: KASAN: slab-use-after-free in ublk_ch_release+0x1/0x2",
        "UBSAN: array-index-out-of-bounds in drivers/block/ublk_drv.c:1:2",
        "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
        "rcu: INFO: rcu_preempt self-detected stall on CPU",
        "Call Trace:",
    ],
)
def test_words_of_complaint(line: str) -> None:
    assert reports(f"{QUIET}\n[    2.0] {line}\n") == [f"[    2.0] {line}"]


def test_an_ordinary_console_is_quiet() -> None:
    assert reports(QUIET) == []


def test_allowed_by_any_line_of_it_and_only_it() -> None:
    console = f"{WARNING}\n{HUNG}"
    assert unexpected(console, [re.compile("io_uring_try_cancel")]) == [HUNG]
    assert unexpected(console, [re.compile("ublk_drv.c"), re.compile("task dd")]) == []
    assert len(unexpected(console, [re.compile("nothing like it")])) == 2


def test_what_comes_after_a_mark_is_left_out() -> None:
    assert before(f"{QUIET}\n[ 1.1] == over ==\n{WARNING}", "over", "watchdog") == QUIET
    assert before(QUIET, "over") == QUIET
