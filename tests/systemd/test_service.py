"""ublk@.service: from boot to a mounted file system, and what happens to its daemon after that."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.device import disk as blocks
from tests.device.devices import held_open, until
from tests.device.kernel import run
from ublkpy.driver import inspect
from ublkpy.uring.uapi import Feature, State

from .units import Unit

DATA = Path("/data")


@pytest.fixture
def can_quiesce() -> None:
    if Feature.QUIESCE not in inspect.features():
        pytest.skip("this driver has no UBLK_F_QUIESCE (Linux 6.16)")


def test_fstab_has_a_file_system_mounted_at_boot(disk: Unit) -> None:
    """This is the first thing that runs after local-fs.target."""
    assert run("findmnt", "-n", "-o", "SOURCE,FSTYPE", DATA).split() == ["/dev/ublkb0", "ext4"]
    assert run("systemctl", "--failed", "--no-legend", "--plain") == ""
    assert disk.show("StatusText") == f"/dev/ublkb0: loop on /srv/disk.img, 1G, {disk.mode}"
    assert disk.pid == disk.device.pid
    assert "/dev/ublkb0: loop on /srv/disk.img, 1G" in disk.status()
    (DATA / "file").write_text("from a mounted disk")
    run("sync", "-f", DATA)


def test_the_unit_file_is_good(disk: Unit) -> None:
    done = subprocess.run(["systemd-analyze", "verify", disk.full_name], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_daemon_is_as_hard_as_one_in_the_background(disk: Unit) -> None:
    process = Path(f"/proc/{disk.pid}")
    assert (process / "oom_score_adj").read_text() == "-1000\n"
    assert re.search(r"^VmLck:\s+[1-9]", (process / "status").read_text(), re.MULTILINE)
    assert "not available" not in disk.journal()
    assert DATA not in [Path(line.split()[4]) for line in (process / "mountinfo").read_text().splitlines()]


def test_the_journal_has_priorities_and_the_unit(disk: Unit) -> None:
    lines = run("journalctl", "-b", "-o", "verbose", "-t", "ublkpy", "-u", disk.full_name)
    assert re.search(r"PRIORITY=6\n(?s:.*)MESSAGE=ublkb0: serving /dev/ublkb0\n", lines), lines


def test_a_daemon_killed_under_load_is_replaced_without_an_error(disk: Unit) -> None:
    pid = disk.pid
    with _load(disk):
        os.kill(pid, signal.SIGKILL)
        disk.until_restarted(pid)
    assert disk.device.pid == disk.pid
    assert "taking up /dev/ublkb0 again" in disk.journal()


@pytest.mark.parametrize("ask", [("systemctl", "reload", "ublk@disk"), ("ublk", "upgrade", "disk")])
def test_a_reload_is_an_upgrade(can_quiesce: None, disk: Unit, ask: tuple[str, ...]) -> None:
    """Whoever asks for it, the new daemon is the unit's, and the unit goes on as with the old one."""
    pid, restarts = disk.pid, disk.show("NRestarts")
    with _load(disk):
        run(*ask)
        assert disk.pid == disk.device.pid != pid
    assert not Path(f"/proc/{pid}").exists()
    assert (disk.show("ActiveState"), disk.show("SubState")) == ("active", "running")
    assert disk.show("StatusText") == f"/dev/ublkb0: loop on /srv/disk.img, 1G, {disk.mode}"
    assert (disk.show("NRestarts"), disk.show("Result")) == (restarts, "success")
    assert disk.full_name in Path(f"/proc/{disk.pid}/cgroup").read_text()
    lines = run("journalctl", "-b", "-o", "cat", "-t", "ublkpy", "-u", disk.full_name, f"_PID={disk.pid}")
    assert "serving /dev/ublkb0" in lines


def test_the_next_daemon_is_watched_and_restarted_too(can_quiesce: None, hangs: Unit) -> None:
    hangs.systemctl("reload")
    device, pid, told = hangs.device, hangs.pid, int(hangs.show("WatchdogTimestampMonotonic"))
    until(lambda: int(hangs.show("WatchdogTimestampMonotonic")) > told + 12_000_000, "it was told for 12 s", 30)
    os.kill(pid, signal.SIGSTOP)
    hangs.until_restarted(pid)
    assert hangs.device == device
    assert hangs.device.pid == hangs.pid


def test_a_reload_that_cannot_be_changes_nothing(plain: Unit) -> None:
    pid = plain.pid
    done = subprocess.run(["ublk", "upgrade", "plain"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "was added without recovery" in done.stderr
    assert subprocess.run(["systemctl", "reload", plain.full_name], timeout=60).returncode
    assert "was added without recovery" in plain.journal()
    assert (plain.pid, plain.device.pid, plain.show("ActiveState")) == (pid, pid, "active")


@pytest.mark.parametrize("before", ["_hold_up", "wait_end", "prepare"])
def test_a_next_daemon_that_dies(can_quiesce: None, hangs: Unit, drop_ins: Path, before: str) -> None:
    """The old one serves on, or the unit has another one take the device up."""
    dies = drop_ins / "dies.py"
    dies.write_text(
        "import os, signal\n"
        "from ublkpy import cli\n"
        "from ublkpy.life import upgrade\n"
        f"upgrade.{before} = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n"
        "cli.main()\n"
    )
    (drop_ins / "reload.conf").write_text(
        f"[Service]\nExecReload=\nExecReload=/opt/ublkpy/bin/python {dies} upgrade %i\n"
    )
    run("systemctl", "daemon-reload")
    device, pid, cookie = hangs.device, hangs.pid, hangs.device.status().info.ublksrv_flags
    taken_up = hangs.journal().count("taking up")
    assert subprocess.run(["systemctl", "reload", hangs.full_name], capture_output=True, timeout=60).returncode
    if before != "_hold_up":
        hangs.until_restarted(pid)
        assert hangs.journal().count("taking up") == taken_up + 1
    assert (hangs.show("ActiveState"), hangs.show("SubState")) == ("active", "running")
    assert hangs.device == device
    assert device.status().info.ublksrv_flags == cookie
    assert device.pid == hangs.pid
    assert (hangs.pid == pid) is (before == "_hold_up")


def test_a_hung_daemon_is_killed_and_replaced(hangs: Unit) -> None:
    device, pid = hangs.device, hangs.pid
    data = blocks.pattern(1 << 20)
    blocks.write(device.node, 0, data)
    os.kill(pid, signal.SIGSTOP)
    hangs.until_restarted(pid)
    assert hangs.device == device
    assert blocks.read(device.node, 0, 1 << 20) == data
    assert "Watchdog timeout" in hangs.journal()


def test_an_idle_daemon_keeps_the_watchdog_quiet(hangs: Unit) -> None:
    pid, told = hangs.pid, int(hangs.show("WatchdogTimestampMonotonic"))
    until(lambda: int(hangs.show("WatchdogTimestampMonotonic")) > told + 12_000_000, "it was told for 12 s", 30)
    assert hangs.pid == pid


def test_a_device_without_recovery_is_added_anew(plain: Unit) -> None:
    device, pid = plain.device, plain.pid
    os.kill(pid, signal.SIGKILL)
    plain.until_restarted(pid)
    assert plain.device == device
    assert "which the daemon of plain left behind" in plain.journal()
    blocks.read(device.node, 0, 4096)


def test_del_ends_the_service_in_good_order(plain: Unit) -> None:
    run("ublk", "del", "-n", str(plain.device.id))
    until(lambda: plain.show("ActiveState") == "inactive", "the service has ended")
    assert plain.show("Result") == "success"


def test_a_stop_waits_until_the_device_is_free(disk: Unit) -> None:
    device = disk.device
    with _stopping(disk) as stop:
        until(lambda: "mounted on /data" in disk.journal(), "the first try is refused", 60)
        (DATA / "file").write_text("still served")
        run("sync", "-f", DATA)
        assert stop.poll() is None
        run("umount", DATA)
        assert stop.wait(60) == 0
    assert not device.exists()
    assert disk.show("Result") == "success"
    run("systemctl", "start", disk.full_name, "data.mount")
    assert (DATA / "file").read_text() == "still served"


def test_a_stop_that_takes_too_long_ends_nothing_by_force() -> None:
    held = Unit("held")
    held.systemctl("start")
    device, pid = held.device, held.pid
    with held_open(device.node, os.O_RDONLY | os.O_EXCL):
        subprocess.run(["systemctl", "stop", held.full_name], capture_output=True, timeout=100)
        assert held.show("Result") == "timeout"
        assert (device.pid, device.state) == (pid, State.LIVE)
        blocks.read(device.node, 0, 4096)
    until(lambda: not device.exists(), "it is free, and ends", 60)


def test_the_mount_ends_before_its_device(disk: Unit) -> None:
    """When both are to end, as they are when the machine shuts down."""
    device, refused = disk.device, disk.journal().count("mounted on /data")
    run("systemctl", "stop", disk.full_name, "data.mount")
    assert not device.exists()
    assert disk.show("Result") == "success"
    assert disk.journal().count("mounted on /data") == refused
    run("systemctl", "start", disk.full_name, "data.mount")
    assert disk.device.pid == disk.pid


def test_a_mistake_in_the_file_is_shown_with_its_cure() -> None:
    unit = Unit("broken")
    done = subprocess.run(["systemctl", "start", unit.full_name], capture_output=True, text=True, timeout=60)
    assert done.returncode
    assert unit.show("ActiveState") == "failed"
    assert unit.show("NRestarts") == "0"
    for text in (unit.status(), unit.journal()):
        assert "ublk: error: /etc/ublk/broken.yaml:1: dept: unknown key; did you mean depth?" in text
    run("systemctl", "reset-failed", unit.full_name)


def test_a_backing_that_is_missing_is_the_status(plain: Unit) -> None:
    plain.systemctl("stop")
    image = Path("/srv/plain.img")
    image.rename("/srv/elsewhere.img")
    try:
        subprocess.run(["systemctl", "start", plain.full_name], capture_output=True, timeout=60)
        until(lambda: "/srv/plain.img" in plain.show("StatusText"), "its status is the error", 60)
        assert "  hint: " in plain.journal()
    finally:
        Path("/srv/elsewhere.img").rename(image)
    until(lambda: plain.show("ActiveState") == "active", "it is tried again", 60)


@pytest.mark.timeout(400)
def test_production_as_the_readme_has_it(can_quiesce: None, disk: Unit) -> None:
    """Its first commands made this machine what it is (see prepare); these are the others, with a newer version."""
    _, commands = re.findall(
        r"^```sh\n(.*?)^```$", Path("README.md").read_text().partition("## Run it in")[2], re.M | re.S
    )
    version = Path("ublkpy/version.py")
    version.write_text(re.sub(r'__version__ = ".*"', '__version__ = "99.1"', version.read_text()))
    packages = {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(Path(".venv/wheels").resolve()),
        "PIP_CONFIG_FILE": "/dev/null",
    }
    pid = disk.pid
    with _load(disk):
        done = subprocess.run(
            ["bash", "-ex"], input=commands, capture_output=True, text=True, timeout=350, env=os.environ | packages
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^0 +/dev/ublkb0 +loop +1G +LIVE ", done.stdout, re.M), done.stdout
    known = disk.device.status().known
    assert known
    assert (known.release, known.pid) == ("99.1", disk.pid)
    assert disk.pid != pid
    assert disk.show("NRestarts") != "0"


@pytest.fixture
def drop_ins(hangs: Unit) -> Iterator[Path]:
    """A folder of changes to its unit, until the end of the test."""
    folder = Path("/run/systemd/system", f"{hangs.full_name}.d")
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)
    run("systemctl", "daemon-reload")


@contextmanager
def _load(unit: Unit) -> Iterator[None]:
    """fio on the mounted file system meanwhile, which sees no error and finds all that it wrote."""
    device, before = unit.device, unit.device.completed("writes")
    argv = ["fio", "--name=load", f"--filename={DATA}/load", "--direct=1", "--ioengine=libaio", "--iodepth=16"]
    argv += ["--rw=randwrite", "--bs=4k", "--size=32M", "--verify=crc32c", "--verify_fatal=1", "--minimal"]
    argv += ["--verify_backlog=256", "--time_based", "--runtime=380"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as fio:
        until(lambda: fio.poll() is not None or device.completed("writes") > before + 100, "fio writes")
        assert fio.poll() is None
        yield
        assert fio.poll() is None
        fio.send_signal(signal.SIGINT)
        printed, _ = fio.communicate(timeout=120)
    assert fio.returncode in (0, 128), printed
    assert "error" not in printed.lower(), printed
    assert unit.device == device
    assert device.state == State.LIVE
    assert run("findmnt", "-n", "-o", "SOURCE", DATA) == "/dev/ublkb0\n"
    assert "I/O error" not in run("dmesg")


@contextmanager
def _stopping(unit: Unit) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["systemctl", "stop", unit.full_name]) as stop:
        try:
            yield stop
        finally:
            stop.kill()
