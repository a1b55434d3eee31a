"""Servers of the NBD protocol, each behind the kernel's nbd driver and a Unix socket; one connection a queue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import DISKS, SIZE_BYTES, Place, Served
from .run import ServerError, module, process, run, until

_NODE = Path("/dev/nbd0")


@contextmanager
def nbdkit_memory(place: Place) -> Iterator[Served]:
    with _nbdkit(place, "memory", str(SIZE_BYTES)) as served:
        yield served


@contextmanager
def nbdkit_file(place: Place) -> Iterator[Served]:
    with _nbdkit(place, "file", str(place.file)) as served:
        yield served


@contextmanager
def nbdkit_python(place: Place) -> Iterator[Served]:
    with _nbdkit(place, "python", str(DISKS / "ram_plugin.py"), f"size={SIZE_BYTES}") as served:
        yield served


@contextmanager
def qemu_nbd_raw(place: Place) -> Iterator[Served]:
    with _qemu_nbd(place, "raw", place.file) as served:
        yield served


@contextmanager
def qemu_nbd_qcow2(place: Place) -> Iterator[Served]:
    """All clusters are allocated."""
    image = place.folder / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=full", image, str(SIZE_BYTES))
    try:
        with _qemu_nbd(place, "qcow2", image) as served:
            yield served
    finally:
        image.unlink()


@contextmanager
def _nbdkit(place: Place, *plugin: str) -> Iterator[Served]:
    socket = place.folder / "nbd.sock"
    with _connected(place, socket, "nbdkit", "--foreground", "--unix", str(socket), *plugin) as served:
        yield served


# --aio=native: the fastest of its three here
@contextmanager
def _qemu_nbd(place: Place, form: str, image: Path) -> Iterator[Served]:
    socket = place.folder / "nbd.sock"
    options = (f"--socket={socket}", f"--format={form}", "--cache=none", "--aio=native", f"--shared={place.queues}")
    with _connected(place, socket, "qemu-nbd", "--persistent", *options, str(image)) as served:
        yield served


@contextmanager
def _connected(place: Place, socket: Path, *server: str) -> Iterator[Served]:
    with module(place, "nbd", "nbds_max=1", "max_part=0"), process(place, *server) as running:
        until(lambda: socket.exists() or running.poll() is not None, f"{server[0]} to listen")
        if running.returncode is not None:
            raise ServerError(f"{server[0]} ended with exit status {running.returncode}")
        try:
            run("nbd-client", "-unix", socket, _NODE, "-connections", str(place.queues))
            until(lambda: Path("/sys/block/nbd0/size").read_text().strip() != "0", f"{_NODE}")
            try:
                yield Served(_NODE, running.pid)
            finally:
                run("nbd-client", "-d", _NODE)
        finally:
            socket.unlink(missing_ok=True)
