"""The settings, as the guest's shells read them."""

import subprocess
from pathlib import Path

from tests.vm.guest import Guest

AWKWARD = "echo 'single' \"double\" $HOME; x=`id` \\ \n!"


def shell(settings: str, word: str) -> str:
    script = f'{settings}\nprintf %s "{word}"'
    return subprocess.run(["sh", "-c", script], check=True, timeout=10, capture_output=True, text=True).stdout


def test_values_survive_the_shell() -> None:
    guest = Guest(
        token="t", root="overlay", command=AWKWARD, folder=Path("/a b"), environment={"UBLKPY_X": "it's $HOME"}
    )
    assert shell(guest.settings(), "$command") == AWKWARD
    assert shell(guest.settings(), "$folder") == "/a b"
    assert shell(guest.settings(), "$(printenv UBLKPY_X)") == "it's $HOME"
    assert shell(guest.settings(), "[$out]") == "[]"


def test_the_watchdog_barks_before_time_is_up() -> None:
    assert shell(Guest(token="t", root="overlay", seconds=600).settings(), "$patience") == "580.0"
    assert shell(Guest(token="t", root="overlay", seconds=8).settings(), "$patience") == "6.0"


def test_only_the_environment_is_exported() -> None:
    guest = Guest(token="t", root="overlay", command="true", environment={"CI": "1"})
    assert shell(guest.settings(), "$(printenv command CI)") == "1"
