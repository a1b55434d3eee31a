"""Measuring a subject that fails."""

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
