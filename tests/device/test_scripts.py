"""What scripts written for ublksrv rely on: the place of a word in `list -n`, exit codes, names of features, tasks."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ublkpy.driver import inspect
from ublkpy.uring.uapi import Feature

from . import disk, program
from .devices import MIB, Devices

# As ublksrv's own tests do it: an id that they choose, words by their number in a line, polling with kill and recover.
_SCRIPT = r"""
set -u
fail() { echo "FAILED: $*"; exit 1; }
word() { "$UBLK" list -n 7 | grep "$1" | awk "{print \$$2}"; }

"$UBLK" add -t loop -f "$FILE" -q 2 -d 64 -u 1 -g 0 -r 1 -i 1 -n 7 > /dev/null 2>&1 || fail "add: $?"
[ -b /dev/ublkb7 ] || fail "no node"
pid=$(word pid 7)
[ "$pid" -gt 0 ] || fail "pid '$pid'"
[ "$(word state 9)" = LIVE ] || fail "state '$(word state 9)'"
tid=$(word 'queue 1' 4)
[ -d "/proc/$pid/task/$tid" ] || fail "tid '$tid' is no task of $pid"

fio --name=load --filename=/dev/ublkb7 --ioengine=libaio --direct=1 --rw=randrw --bs=4k --iodepth=64 \
	--iodepth_batch_submit=16 --iodepth_batch_complete_min=16 --time_based --runtime=150 > /dev/null 2>&1 &
fio=$!
state=LIVE
for _ in $(seq 40); do
	[ "$state" != QUIESCED ] || break
	kill -9 "$pid" 2> /dev/null
	sleep 0.5
	state=$(word state 9)
done
[ "$state" = QUIESCED ] || fail "not quiesced but '$state'"
for _ in $(seq 15); do
	"$UBLK" recover -n 7 > /dev/null 2>&1
	state=$(word state 9)
	[ "$state" != LIVE ] || break
	sleep 1
done
[ "$state" = LIVE ] || fail "not recovered but '$state'"
kill -0 $fio || fail "fio has ended"
timeout 60 "$UBLK" del -n 7 > /dev/null 2>&1 || fail "del while fio runs: $?"
wait $fio
[ ! -e /dev/ublkb7 ] || fail "the node is still there"
! "$UBLK" list -n 7 > /dev/null 2>&1 || fail "list of no device"
! "$UBLK" add -t loop -f /none -n 7 > /dev/null 2>&1 || fail "add of no file"
"$UBLK" del -a || fail "del -a of nothing: $?"
"$UBLK" features
"""


@pytest.mark.any_kernel
@pytest.mark.timeout(180)
def test_a_script_for_ublksrv(devices: Devices, scratch: Path) -> None:
    file = disk.image(scratch / "image", 16 * MIB)
    environment = {"UBLK": program.executable(), "FILE": str(file), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    done = subprocess.run(["bash", "-c", _SCRIPT], capture_output=True, text=True, timeout=140, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()[1:]]
    assert names == [flag.name for flag in Feature if flag in inspect.features()]


def test_the_loop_device_of_a_description(devices: Devices, scratch: Path) -> None:
    """The target's JSON, whose keys ublksrv sorts."""
    file = disk.image(scratch / "image", 16 * MIB)
    device = devices.loop(file)
    line = program.ublk("list", "-n", str(device.id)).out.splitlines()[-1]
    assert line.startswith(
        f'\ttarget {{"backing_file":"{file}","dev_size":{16 * MIB},"direct_io":1,"name":"loop","offset":0'
    )
