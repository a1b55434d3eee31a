"""The border between the two sides of the machine."""

from pathlib import Path

import pytest

from bench import memory
from bench.guest import Order, parse
from bench.result import Memory, Point, Result, from_line


@pytest.mark.parametrize("peer", [None, Path("/a b/kublk")])
def test_the_command_line_says_all_of_the_order(peer: Path | None) -> None:
    order = Order(["null_blk", "null"], ["randread"], peer, 300)
    assert parse(order.words(Path("/tmp/results"))) == (order, Path("/tmp/results"))


@pytest.mark.parametrize(
    "result",
    [
        Result("null", {"randread": Point(1000, 0.25, 4000.0, 16384000.0)}, Memory(4096, 2048), Memory(8192, 4096)),
        Result("loop", error="no such\nfile"),
    ],
)
def test_a_result_is_a_line(result: Result) -> None:
    assert "\n" not in result.line()
    assert from_line(result.line()) == result


def test_memory_of_a_process() -> None:
    text = "55d0-7ffe ---p 00000000 00:00 0    [rollup]\nRss:     34808 kB\nPss:     12345 kB\nPss_Anon:    9 kB\n"
    assert memory.parse(text) == Memory(rss_bytes=34808 * 1024, pss_bytes=12345 * 1024)
