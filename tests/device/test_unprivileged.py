"""Devices of ordinary users: their own, and nobody else's."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ublkpy import shmem
from ublkpy.driver import inspect, state, udev
from ublkpy.driver.ctrl import CONTROL
from ublkpy.errors import ExitCode
from ublkpy.uring.uapi import Feature, State

from . import disk, people, program
from .devices import MIB, Devices, until
from .kernel import run
from .people import User
from .program import Result

ALICE, BOB, CAROL = User("alice"), User("bob"), User("carol")


@pytest.fixture(scope="module", autouse=True)
def machine(driver: None) -> Iterator[None]:
    """alice and bob may add devices, carol may not."""
    with people.logged_in("alice", "bob", "carol"), people.udevd():
        people.join_group("alice")
        people.join_group("bob")
        yield


@pytest.fixture(autouse=True)
def nothing_of_theirs_left(nothing_left: None) -> Iterator[None]:
    yield
    if inspect.device_ids():
        program.ublk("del", "-a")
    until(lambda: not [*Path("/run/user").glob("*/ublkpy/*")], "the users' state files and sockets are gone")


def add(user: User, *args: str) -> int:
    """A device of this user's; its id."""
    done = user.ublk("add", "--unprivileged", *args)
    assert (done.status, done.err) == (0, ""), done.err
    return int(done.out.removeprefix("/dev/ublkb"))


def image(user: User) -> Path:
    path = disk.image(user.folder / "disk.img", 16 * MIB)
    os.chown(path, user.uid, user.gid)
    return path


def expect_refusal(done: Result, status: int, *words: str) -> None:
    assert (done.status, done.out) == (status, ""), done.err
    for word in words:
        assert word in done.err


def owner_and_mode(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)


# -- what their owners can do -----------------------------------------------------------------


def test_control_is_open_to_the_group_alone() -> None:
    assert CONTROL.group() == udev.GROUP
    assert owner_and_mode(CONTROL)[2] == 0o660
    assert ALICE.ublk("features").out == program.ublk("features").out
    for args in (["features"], ["list"], ["add", "-t", "null", "--unprivileged"]):
        expect_refusal(CAROL.ublk(*args), ExitCode.NO_DRIVER, f"no permission to open {CONTROL}", "ublk udev install")


def test_a_life() -> None:
    """add, the data, list, and what all the others see of it, del."""
    file = image(ALICE)
    dev_id = add(ALICE, "-t", "loop", "-f", str(file))
    node, char = Path(f"/dev/ublkb{dev_id}"), Path(f"/dev/ublkc{dev_id}")
    assert owner_and_mode(node) == owner_and_mode(char) == (ALICE.uid, ALICE.gid, 0o600)

    data = disk.pattern(MIB)
    assert ALICE.does(lambda: disk.write(node, 4096, data)) == ""
    assert file.read_bytes()[4096 : 4096 + MIB] == data
    assert ALICE.does(lambda: _same(disk.read(node, 4096, MIB), data)) == ""

    (listed,) = json.loads(ALICE.ublk("list", "--json").out)["devices"]
    assert (listed["server"], listed["state"], listed["backing"]) == ("ublkpy", "LIVE", str(file))
    assert listed["owner"] == {"uid": ALICE.uid, "gid": ALICE.gid}
    assert listed["mode"] in ("copy", "batch+copy")
    assert f"owner: {ALICE.uid}:{ALICE.gid}" in ALICE.ublk("list", "-n", str(dev_id)).out

    # Its files are hers alone.
    assert owner_and_mode(ALICE.run_dir / f"{dev_id}.json") == (ALICE.uid, ALICE.gid, 0o600)
    assert owner_and_mode(ALICE.log) == (ALICE.uid, ALICE.gid, 0o600)

    # udev does not look into it.
    known = run("udevadm", "info", "--query=property", node)
    assert "UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG=1" in known
    assert "UDISKS_IGNORE=1" in known
    assert "ID_FS_" not in known

    # bob
    expect_refusal(BOB.ublk("list"), 0, f"not shown: {dev_id}, of alice")
    assert json.loads(BOB.ublk("list", "--json").out)["devices"] == []
    for command in ("list", "del", "recover"):
        expect_refusal(BOB.ublk(command, "-n", str(dev_id)), ExitCode.NO_DRIVER, f"device {dev_id} belongs to alice")
    expect_refusal(BOB.ublk("del", "-a"), 0)
    assert BOB.does(lambda: os.open(node, os.O_RDONLY)) == "PermissionError"
    # Whoever gives the node away: the driver asks for the user.
    node.chmod(0o666)
    assert BOB.does(lambda: os.open(node, os.O_RDONLY)) == "PermissionError"

    # root
    shown = program.ublk("list").out.splitlines()[1]
    assert "(of alice)" in shown
    assert Feature.UNPRIVILEGED_DEV in inspect.status(dev_id).info.flags

    expect_refusal(ALICE.ublk("add", "-t", "null", "--unprivileged", "-n", str(dev_id)), ExitCode.BUSY, "is in use")
    assert ALICE.ublk("del", "-n", str(dev_id)).status == 0
    assert inspect.device_ids() == []
    assert ALICE.ublk("list").err == "no ublk devices; one comes with: ublk add -t null\n"


def _same(got: bytes, wanted: bytes) -> None:
    assert got == wanted


def test_get_data_and_a_daemon_that_is_killed() -> None:
    file = image(ALICE)
    dev_id = add(ALICE, "-t", "loop", "-f", str(file), "--mode", "get-data", "-q", "2")
    data = disk.pattern(64 << 10, seed=1)
    assert ALICE.does(lambda: disk.write(Path(f"/dev/ublkb{dev_id}"), 0, data)) == ""
    assert file.read_bytes()[: len(data)] == data
    daemon = inspect.status(dev_id).pid
    assert daemon
    assert BOB.does(lambda: os.kill(daemon, signal.SIGKILL)) == "PermissionError"
    os.kill(daemon, signal.SIGKILL)
    until(lambda: inspect.status(dev_id).info.state == State.DEAD, "the driver has noticed", 60)
    assert f"no daemon; run: ublk start -n {dev_id}" in ALICE.ublk("list").out
    expect_refusal(ALICE.ublk("recover", "-n", str(dev_id)), ExitCode.FAILED, "was added without recovery")
    assert ALICE.ublk("del", "--async", "-n", str(dev_id)).status == 0
    until(lambda: not inspect.device_ids(), "the device is gone")


def test_root_deletes_a_users_device() -> None:
    dev_id = add(ALICE, "-t", "null")
    assert inspect.status(dev_id).info.owner_uid == ALICE.uid
    assert program.ublk("del", "-n", str(dev_id)).status == 0
    assert inspect.device_ids() == []
    until(lambda: not [*ALICE.run_dir.iterdir()], "the daemon has removed its state file")


def test_little_memory_may_be_locked() -> None:
    """Linux 6.18 counts the memory of io_uring, 6.12 and 7.3 do not.

    The daemon ends by a signal here, and has another process delete the device.
    """

    def limit(kib: int) -> Callable[[], object]:
        return lambda: resource.setrlimit(resource.RLIMIT_MEMLOCK, (kib << 10, kib << 10))

    add_null = ["add", "-t", "null", "--unprivileged", "-d", "16"]
    done = ALICE.ublk(*add_null, prepare=limit(0))
    if done.status == 0:
        assert ALICE.ublk("del", "-n", "0").status == 0
    else:
        expect_refusal(done, ExitCode.NO_DRIVER, "Cannot allocate memory", "ulimit -l")
    done = ALICE.ublk(*add_null, prepare=limit(64))
    assert (done.status, done.err) == (0, "")
    assert "locking memory: not available: the limit is 64 KiB (ulimit -l)" in ALICE.log.read_text()
    daemon = inspect.status(0).pid
    assert daemon
    assert ALICE.does(lambda: os.kill(daemon, signal.SIGTERM)) == ""
    until(lambda: not inspect.device_ids(), "the device is gone")


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--mode", "user-copy"], "mode user-copy is not for unprivileged devices"),
        (["--mode", "batch+auto-buf"], "mode batch+auto-buf is not for unprivileged devices"),
        (["-z"], "mode auto-buf is not for unprivileged devices"),
        (["--recovery", "queue"], "the driver has no recovery for them"),
        (["--metadata-size", "8"], "unprivileged devices cannot have metadata"),
    ],
)
def test_what_the_driver_does_not_give_to_users(args: list[str], words: str) -> None:
    expect_refusal(ALICE.ublk("add", "-t", "null", "--unprivileged", *args), ExitCode.USAGE, words)


def test_who_adds_what(devices: Devices) -> None:
    expect_refusal(ALICE.ublk("add", "-t", "null"), ExitCode.NO_DRIVER, "lacks CAP_SYS_ADMIN", "--unprivileged")
    expect_refusal(program.ublk("add", "-t", "null", "--unprivileged"), ExitCode.NO_DRIVER, "leave --unprivileged out")
    device = devices.null()
    assert device.node.stat().st_uid == Path(f"/dev/ublkc{device.id}").stat().st_uid == 0
    for command in ("list", "del", "recover"):
        expect_refusal(ALICE.ublk(command, "-n", str(device.id)), ExitCode.NO_DRIVER, "belongs to root")
    expect_refusal(ALICE.ublk("list", "-n", "9"), ExitCode.NO_DEVICE, "there is no ublk device 9")


def test_nobody_logged_in() -> None:
    """su and cron give no folder for run-time files."""
    folder = ALICE.run_dir.parent
    aside = folder.rename(folder.with_name("aside"))
    try:
        done = ALICE.ublk("add", "-t", "null", "--unprivileged")
    finally:
        aside.rename(folder)
    expect_refusal(done, ExitCode.FAILED, "there is no folder for state files", "loginctl enable-linger alice")


def test_udev_without_the_rules() -> None:
    text = udev.RULES.read_text()
    udev.RULES.unlink()
    try:
        done = ALICE.ublk("add", "-t", "null", "--unprivileged")
    finally:
        udev.RULES.write_text(text)
    expect_refusal(done, ExitCode.NO_DRIVER, "udev has no rules that give a user his devices", "ublk udev install")


def test_udev_that_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(udev, "OWNED_DEADLINE", 1.0)
    run("udevadm", "control", "--stop-exec-queue")
    try:
        done = ALICE.ublk("add", "-t", "null", "--unprivileged")
    finally:
        run("udevadm", "control", "--start-exec-queue")
    expect_refusal(done, ExitCode.FAILED, "udev did not give /dev/ublkc0 to alice within 1 s", "ublk del -n 0")
    assert program.ublk("del", "-n", "0").status == 0


# -- what others plant, and where they listen -------------------------------------------------


def test_roots_state_files(devices: Devices) -> None:
    """``recover`` has root open, and serve, what they say; so they must be root's."""
    device = devices.null(recovery="queue")
    folder, file = state.RUN_DIR, state.RUN_DIR / f"{device.id}.json"
    assert owner_and_mode(file) == (0, 0, 0o600)
    assert BOB.does(file.read_text) == "PermissionError"
    assert BOB.does(file.unlink) == "PermissionError"
    assert BOB.does((folder / "9.json").touch) == "PermissionError"

    device.kill_daemon()
    recover = ["recover", "-n", str(device.id)]
    folder.chmod(0o777)
    try:
        expect_refusal(program.ublk(*recover), ExitCode.FAILED, f"others can write in {folder}")
        expect_refusal(program.ublk("add", "-t", "null"), ExitCode.FAILED, f"others can write in {folder}")
    finally:
        folder.chmod(0o755)
    os.chown(file, BOB.uid, BOB.gid)
    expect_refusal(program.ublk(*recover), ExitCode.FAILED, "may have been written by another: it belongs to bob")
    (BOB.folder / "state").write_text(file.read_text())
    file.unlink()
    file.symlink_to(BOB.folder / "state")
    expect_refusal(program.ublk(*recover), ExitCode.FAILED, f"cannot read {file}: it is a link")
    assert device.state in (State.LIVE, State.QUIESCED)  # Linux 6.12 may not have noticed yet


def test_shared_memory_is_for_the_owner_alone() -> None:
    if Feature.SHMEM_ZC not in inspect.features():
        pytest.skip("this driver lacks SHMEM_ZC")
    dev_id = add(ALICE, "-t", "null", "--shmem_zc")
    path = ALICE.run_dir / f"ublkb{dev_id}.sock"
    assert owner_and_mode(path) == (ALICE.uid, ALICE.gid, 0o600)

    def share() -> None:
        fd = os.memfd_create("memory", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, MIB)
        assert shmem.register(dev_id, fd) == 0

    def connect() -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))

    assert BOB.does(connect) == "PermissionError"
    assert BOB.does(share) == "FileNotFoundError"
    # Where a mode lets him connect, the daemon still asks who he is.
    for folder in (path.parent, path.parent.parent):
        folder.chmod(0o711)
    path.chmod(0o666)
    assert BOB.does(lambda: _ask(path)) in ("ConnectionResetError", "BrokenPipeError")  # while he asks, or before
    path.parent.parent.chmod(0o700)
    assert ALICE.does(share) == ""


def _ask(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        fd = os.memfd_create("memory", os.MFD_ALLOW_SEALING)
        socket.send_fds(client, [b"\0"], [fd])
        if not client.recv(4):
            raise ConnectionResetError


# -- udev -------------------------------------------------------------------------------------


def test_install_again() -> None:
    before = udev.RULES.read_text()
    done = program.ublk("udev", "install")
    assert done.status == 0, done.err
    assert f"wrote {udev.RULES}" in done.out
    assert "made the group" not in done.out
    assert f"usermod -aG {udev.GROUP} NAME" in done.out
    udev.RULES.write_text(before)
    run("udevadm", "control", "--reload")
    expect_refusal(ALICE.ublk("udev", "install"), ExitCode.NO_DRIVER, "only root can set udev up")
