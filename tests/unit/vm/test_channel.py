"""The command's output and the marks around it, however the stream is cut into pieces."""

import pytest

from tests.vm.channel import Channel

STREAM = b"BIOS chatter\n\0tok3n started\nhello\0\0tok\n\0\0tok3n exited 7\nafterwards"
PRINTED = b"hello\0\0tok\n\0"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 1000])
def test_any_cut_gives_the_same(size: int) -> None:
    channel = Channel("tok3n")
    printed = b"".join(channel.feed(STREAM[i : i + size]) for i in range(0, len(STREAM), size))
    assert printed == PRINTED
    assert channel.started
    assert channel.status == 7


def test_output_is_passed_on_before_the_end() -> None:
    channel = Channel("tok3n")
    assert channel.feed(b"\0tok3n started\nfirst") == b"first"
    assert channel.feed(b" second") == b" second"
    assert channel.status is None


def test_nothing_before_the_start() -> None:
    channel = Channel("tok3n")
    assert channel.feed(b"boot loader\n") == b""
    assert not channel.started


def test_another_token_is_just_output() -> None:
    channel = Channel("tok3n")
    assert channel.feed(b"\0tok3n started\n\0forged exited 0\n") == b"\0forged exited 0\n"
    assert channel.status is None
