"""What is measured, and what of it was chosen."""

from pathlib import Path

import pytest

from bench import subjects, workloads
from bench.subjects import FLOOR, ChoiceError

PEER = Path("/somewhere/kublk")


def chosen(*patterns: str, peer: Path | None = None) -> list[str]:
    return [subject.name for subject in subjects.choose_subjects(patterns, subjects.known(peer))]


@pytest.mark.parametrize("peer", [None, PEER])
def test_names_are_unique(peer: Path | None) -> None:
    names = [subject.name for subject in subjects.known(peer)]
    assert len(names) == len(set(names))


def test_all_without_a_word() -> None:
    assert chosen() == [subject.name for subject in subjects.known(None)]
    assert subjects.choose_workloads([]) == list(workloads.ALL)


def test_the_floor_is_always_measured_and_first() -> None:
    assert chosen("loop", "null") == [FLOOR, "null", "loop"]


def test_patterns() -> None:
    assert chosen("qemu-*") == [FLOOR, "qemu-nbd-raw", "qemu-nbd-qcow2"]
    assert [workload.name for workload in subjects.choose_workloads(["*-128k"])] == ["read-128k", "write-128k"]


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(
        ChoiceError, match=r"no subject floppy; there are: null_blk, null, null-copy, .*, loop, loop-copy"
    ):
        chosen("null", "floppy")
    with pytest.raises(ChoiceError, match=r"no workload trim; there are: randread"):
        subjects.choose_workloads(["trim"])


def test_a_peer_brings_its_modes() -> None:
    assert {"kublk-null", "kublk-loop", "kublk-null-batch+copy"} <= set(chosen("kublk-*", peer=PEER))


def test_a_peer_that_nobody_can_drive() -> None:
    with pytest.raises(ChoiceError, match=r"no adapter for a server called vhost; there are: kublk"):
        subjects.known(Path("/bin/vhost"))


@pytest.mark.parametrize(
    ("names", "peer", "wanted", "bases"),
    [
        ([], None, [], {"null": FLOOR, "file": "kernel-loop"}),
        ([], PEER, [], {"null": "kublk-null", "file": "kublk-loop"}),
        (["loop"], None, [], {"null": FLOOR, "file": FLOOR}),
        ([], None, ["loop"], {"null": FLOOR, "file": "loop"}),
    ],
)
def test_bases(names: list[str], peer: Path | None, wanted: list[str], bases: dict[str, str]) -> None:
    assert subjects.choose_bases(wanted, subjects.choose_subjects(names, subjects.known(peer))) == bases


def test_a_base_that_is_not_measured() -> None:
    with pytest.raises(ChoiceError, match="the base loop is not among"):
        subjects.choose_bases(["loop"], subjects.choose_subjects(["null"], subjects.known(None)))
