"""Several runs at once, printed in turn."""

import pytest

from tests.vm.output import Lane


def test_kept_until_its_turn_and_live_from_then_on(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    lane = Lane()
    lane.out(b"early\n")
    lane.err("trouble\n")
    assert capfdbinary.readouterr() == (b"", b"")
    lane.go_live()
    assert capfdbinary.readouterr() == (b"early\n", b"tests.vm: trouble\n")
    lane.out(b"late")
    assert capfdbinary.readouterr() == (b"late", b"")


def test_all_of_it_to_stderr(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    lane = Lane(to_stderr=True)
    lane.go_live()
    lane.out(b"talk\n")
    assert capfdbinary.readouterr() == (b"", b"talk\n")


def test_what_pytest_says_failed_is_kept(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    lane = Lane()
    lane.go_live()
    lane.out(b"tests/test_a.py .F\r\nFAILED tests/te")
    lane.out(b"st_a.py::test_b - assert 1 == 2\r\nNOT FAILED\r\n")
    lane.out(b"ERROR tests/test_c.py\r\n= 1 failed, 1 passed =")
    assert lane.failures == ["FAILED tests/test_a.py::test_b - assert 1 == 2", "ERROR tests/test_c.py"]
    assert capfdbinary.readouterr().out.endswith(b"= 1 failed, 1 passed =")
