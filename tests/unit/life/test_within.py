"""What a program may ask for that serves a device itself, as far as no driver is needed."""

from __future__ import annotations

import asyncio
import itertools
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.device.targets import Ram
from ublkpy import Device
from ublkpy.config import DeviceOptions, parse_options
from ublkpy.driver.ctrl import CONTROL
from ublkpy.errors import ConfigError, DriverError, NoDeviceError, UblkError
from ublkpy.life import within


@pytest.mark.parametrize(
    ("said", "message", "hint"),
    [
        ({"recovery": "queue"}, "goes with the program that serves it", r"Device\.add\(\)"),
        ({"supervise": True}, "no daemon to look after", r"Device\.add\(\)"),
        ({"log": "disk.log"}, "goes to this program's own logging", r"getLogger"),
        ({"queue": 2}, "no device has an option queue", r"did you mean queues\?"),
        ({"zzz": 2}, "no device has an option zzz", "there are: .*queues"),
        ({"queues": 0}, "queues: 0 is out of range: 1 to 4096", "hardware queues"),
        ({"mode": "fast"}, "mode: 'fast' is not one of: auto, ", "how data travels"),
        ({"depth": 1, "mode": "batch+copy"}, "needs a depth of 2", "raise the depth"),
        ({"name": "7"}, "could be taken for an id", "disk7"),
    ],
)
def test_options_that_make_no_sense(said: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Device(Ram(), **said)
    assert re.search(hint, caught.value.hint)


def test_options_as_in_yaml_or_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = parse_options({"max_io_buf_bytes": "64k", "io_min": 4096, "htlb": Path("huge"), "name": None})
    assert (options.max_io_buf_bytes, options.io_min, options.htlb) == (64 << 10, 4096, tmp_path / "huge")
    assert parse_options({}).dump() == DeviceOptions().dump()


@pytest.mark.parametrize("what", ["disk.yaml", Ram, None])
def test_what_is_no_target(what: Any) -> None:
    with pytest.raises(ConfigError, match="is not a target") as caught:
        Device(what)
    assert "Device.add()" in caught.value.hint


def test_a_device_by_its_id() -> None:
    assert Device(3) == Device(3) != Device(4)
    assert {Device(3), Device(3)} == {Device(3)}
    assert sorted([Device(4), Device(3)]) == [Device(3), Device(4)]
    assert (repr(Device(3)), Device(3).node, Device(3).target) == ("Device(3)", "/dev/ublkb3", None)
    with pytest.raises(ConfigError, match="it takes no queues"):
        Device(3, queues=2)
    with pytest.raises(ConfigError, match="no target to serve it with"):
        Device(3).serve()


def test_a_device_of_a_target_before_it_is_served() -> None:
    target = Ram()
    device = Device(target, queues=2)
    assert device == device != Device(target)
    assert repr(device) == "<Device of target ram>"
    assert device.target is target
    assert not device.exists()
    for action in (lambda: device.node, device.status, device.stop, device.params):
        with pytest.raises(NoDeviceError, match="no device of target ram is served yet"):
            action()
    device.delete()


@pytest.mark.skipif(CONTROL.exists(), reason="there is a driver")
def test_without_a_driver() -> None:
    """Nothing is left, and the target is closed, or was not opened."""
    device = Device(Ram())
    with pytest.raises(DriverError), device:
        pytest.fail("nothing serves it")

    async def main() -> None:
        async with device:
            pytest.fail("nothing serves it")

    with pytest.raises(DriverError):
        asyncio.run(main())
    assert not within._sessions
    assert threading.active_count() == 1


def test_options_beside_a_file() -> None:
    with pytest.raises(UblkError, match="options are for a target"):
        Device.add("disk.yaml", queues=2)


# -- the end -----------------------------------------------------------------------------------


class Serving:
    """What a session sees of its server: one with requests, of which none was answered for ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.over = threading.Event()
        self.is_cut = False

    def silence(self) -> float:
        return self._seconds

    def is_waiting(self) -> bool:
        return True

    def cut(self) -> None:
        self.is_cut = True
        self.over.set()


class SlowEnding:
    """The process that deletes the device: it takes too long, until the third one or the cut."""

    made = 0
    server: Serving

    def __init__(self, *_args: object, **_options: object) -> None:
        type(self).made += 1

    def wait(self, _timeout: float) -> None:
        if self.made < 3 and not self.server.is_cut:
            raise TimeoutError
        self.server.over.set()


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> type[SlowEnding]:
    class Fresh(SlowEnding):
        pass

    monkeypatch.setattr(within, "Ending", Fresh)
    return Fresh


def session(server: Serving) -> within.Session:
    """One whose device is served by that."""
    made: Any = within.Session(Ram(), {})
    made._server, made._info = server, SimpleNamespace(dev_id=7)
    made._thread = threading.Thread(target=server.over.wait)
    made._thread.start()
    found: within.Session = made
    return found


def test_a_deletion_that_takes_too_long_says_so(ending: type[SlowEnding]) -> None:
    server = ending.server = Serving(0)
    with pytest.raises(UblkError, match=r"^deleting /dev/ublkb7 takes more than 120 s$"):
        session(server)._delete("/dev/ublkb7", force=False)
    assert not server.is_cut
    server.over.set()


def test_requests_that_are_answered_are_not_cut_off(
    ending: type[SlowEnding], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answered = itertools.count()
    monkeypatch.setattr(within, "completed", lambda dev_id: (next(answered),))
    server = ending.server = Serving(0)
    session(server)._delete("/dev/ublkb7", force=True)
    assert (ending.made, server.is_cut) == (3, False)
    assert "its requests are being answered: waiting on" in caplog.text


def test_requests_that_nobody_answers_are_cut_off(
    ending: type[SlowEnding], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(within, "completed", lambda dev_id: (5,))
    server = ending.server = Serving(60)
    session(server)._delete("/dev/ublkb7", force=True)
    assert (ending.made, server.is_cut) == (2, True)
    assert "its requests fail now" in caplog.text
