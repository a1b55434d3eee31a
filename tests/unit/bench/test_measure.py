"""Measuring one subject."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench import measure
from bench.servers import Place, Served
from bench.servers.run import ServerError
from bench.subject import Subject
from bench.workloads import ALL


@contextmanager
def broken(place: Place) -> Iterator[Served]:
    try:
        raise ServerError(f"no device with {place.queues} queues")
        yield
    finally:
        raise ServerError("nothing to delete")


def test_its_failure_is_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SIZE_BYTES", 1 << 20)
    place = Place(tmp_path, tmp_path / "disk.img", tmp_path, queues=1)
    said: list[str] = []
    result = measure.measure(Subject("broken", "null", broken), ALL, place, 1, said.append)
    assert (result.subject, dict(result.points), result.idle) == ("broken", {}, None)
    assert result.error == "no device with 1 queues; then: nothing to delete"
    assert said == [f"failed: {result.error}"]
    assert not place.file.exists()


@pytest.mark.parametrize(
    ("counts", "median"), [([1000, 1001], 1001), ([1000, 940, 1001], 1000), ([940, 1001, 1000], 1000)]
)
def test_a_count_that_is_off_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: list[float], median: float
) -> None:
    """fio says what it is told to: that one of its counts is off cannot be brought about."""

    @contextmanager
    def nothing(place: Place) -> Iterator[Served]:
        yield Served(Path("/dev/none"))

    def fio(*argv: str | Path) -> str:
        ios = counts.pop(0) if "--time_based" in argv else 1
        way = {"total_ios": 9, "runtime": 9, "iops": ios, "bw_bytes": 9}
        return json.dumps({"jobs": [{"error": 0, "read": way, "write": way}]})

    monkeypatch.setattr(measure, "SIZE_BYTES", 1 << 20)
    monkeypatch.setattr(measure, "run", fio)
    place = Place(tmp_path, tmp_path / "disk.img", tmp_path, queues=1)
    result = measure.measure(Subject("steady", "null", nothing), ALL[:1], place, 1, lambda _: None)
    assert result.points["randread"].iops == median
    assert not counts
