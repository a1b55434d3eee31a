"""From YAML and command-line options to one checked device configuration.

The options themselves are declared where they belong: those of every device
below, those of a target in its class. Errors in YAML name file, line and key,
and show the line.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import yaml

from ublkpy import tgt
from ublkpy.errors import ConfigError, UblkError
from ublkpy.tgt import handlers, limits, load
from ublkpy.tgt.base import Geometry, Target
from ublkpy.tgt.disk import DiskOptions
from ublkpy.tgt.options import CODE, SECTOR, Option, Size, option
from ublkpy.uring import mode
from ublkpy.uring.uapi import IO_DESC_SIZE, MAX_QUEUE_DEPTH

ModeName = Literal["auto", mode.Name]
Recovery = Literal["none", "queue", "reissue", "fail"]


class DeviceOptions(DiskOptions):
    """What can be said about any device, whatever its target. Sizes in bytes."""

    @property
    def is_recoverable(self) -> bool:
        return self.recovery != "none"

    id: int = option(-1, "-n", "--number", help="device id; -1: the lowest free one", minimum=-1, maximum=2**20 - 1)
    queues: int = option(1, "-q", help="hardware queues", minimum=1, maximum=4096)
    depth: int = option(128, "-d", help="requests in flight per queue", minimum=1, maximum=MAX_QUEUE_DEPTH)
    threads_per_queue: int = option(
        1, "-T", help="threads that serve each queue, at most its depth", minimum=1, maximum=MAX_QUEUE_DEPTH
    )
    max_io_buf_bytes: Size = option(
        "512k", help="largest request, and buffer per request", minimum=4096, maximum=32 << 20, multiple=4096
    )
    max_sectors: int | None = option(
        None,
        help="largest request in 512-byte sectors; default: as large as the buffer",
        minimum=4096 // SECTOR,
        maximum=(32 << 20) // SECTOR,
        multiple=4096 // SECTOR,
    )
    io_desc_size: int = option(
        IO_DESC_SIZE,
        help="bytes of a request's descriptor; more than the smallest needs Linux 7.3",
        minimum=IO_DESC_SIZE,
        maximum=256,
        multiple=8,
    )
    mode: ModeName = option(
        "auto",
        help="how data travels between driver and daemon; auto: the way that costs this kernel least per request",
    )
    recovery: Recovery = option(
        "none",
        help="when the daemon dies: none removes the device; queue holds new requests for ublk recover; reissue"
        " also sends those in flight again; fail answers with errors until then",
    )
    supervise: bool = option(False, help="have a process bring the device back when its daemon dies; needs recovery")
    unprivileged: bool = option(
        False, help="a device of your own, for a user without privilege: docs/unprivileged.md says what it cannot do"
    )
    shmem_zc: bool = option(False, help="serve requests in memory that clients share, without a copy: docs/shmem.md")
    htlb: Path | None = option(None, help="share this hugetlbfs file from the start; needs shmem_zc")
    rdonly_shmem_buf: bool = option(
        False, help="map shared memory to be read only: only writes go without a copy; needs shmem_zc"
    )
    part_scan: bool | None = option(
        None,
        off_flags=("--no-part-scan", "--no_part_scan", "--no-auto-part-scan", "--no_auto_part_scan"),
        help="have the kernel look for partitions at start; not to needs Linux 7.0; default: unless the target keeps"
        " no data",
    )
    name: str | None = option(
        None,
        help="what commands may call it instead of its id; with --foreground, serve the device of this name again whose"
        " daemon died",
    )
    log: Path | None = option(
        None,
        help="append the daemon's log to this file; default: the journal, else /var/log/ublkpy.log, or"
        " ~/.local/state/ublkpy/ublkpy.log if you are not root",
    )


@dataclass(frozen=True)
class DeviceConfig:
    """A whole device: its own options, and its target with the target's; ConfigError if they do not go together."""

    device: DeviceOptions
    target: Target

    def __post_init__(self) -> None:
        _check(self.device, self.target)
        self.target.disk = self.device

    def open(self) -> Geometry:
        """Open the target: what the device looks like. Raises UblkError, and leaves nothing open then."""
        found = handlers.open_target(self.target)
        try:
            return limits.settle(self.device, handlers.fit(self.target, found))
        except BaseException:
            self.target.close()
            raise

    def dump(self) -> dict[str, Any]:
        """The configuration as plain values, for the state file; ``from_dump`` takes it back."""
        return {
            "device": self.device.dump(),
            "target": load.dump(self.target),
        }


@dataclass
class Draft:
    """Values said so far, parsed but not complete: a YAML file's, or the command line's."""

    device: dict[str, Any] = field(default_factory=dict)
    target_type: str | None = None
    target: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    """Where a file says them, and what the target is, to begin a message with."""


def build(said: Draft, file: Draft | None = None) -> DeviceConfig:
    """One configuration from the command line and a file; the command line wins. Raises ConfigError."""
    file = file or Draft()
    target_type = said.target_type or file.target_type
    if target_type is None:
        raise ConfigError(
            "no target given",
            f"name a file of yours, such as ./disk.py, or add -t with one of: {', '.join(tgt.names())}",
        )
    if file.target_type not in (None, target_type):
        raise ConfigError(f"the file is for a {file.target_type} target, not {target_type}", "leave -t out, or -c")
    cls = tgt.find(target_type)
    values = file.target | said.target
    for opt in cls.options.values():
        if opt.required and opt.name not in values:
            flags = " or ".join((*opt.flags, opt.long_flags[0]))
            raise ConfigError(
                f"{file.places.get('target', '')}no {opt.name} given: target {target_type} needs {flags}, {opt.help}",
                f"ublk help -t {target_type}",
            )
    device = DeviceOptions(file.device | said.device)
    try:
        target = cls(values)
    except TypeError as e:
        raise UblkError(
            f"target {cls.name} cannot be made: {e}",
            "its __init__ has to take what that of Target takes; open() is the place to set things up",
        ) from e
    try:
        return DeviceConfig(device, target)
    except ConfigError as e:
        in_file = [key for key in e.keys if key in file.places and key not in said.device and key not in said.target]
        place = file.places[in_file[0]] if in_file else ""
        raise ConfigError(f"{place}{e.message}", e.hint) from e


def _check(device: DeviceOptions, target: Target) -> None:
    """ConfigError for options that do not go together."""
    limits.check(device, getattr(target, "size", None))
    if device.recovery != "none" and not load.is_found_again(type(target)):
        raise ConfigError(
            f"a next daemon could not find target {target.name}: its class is not at the top of a file",
            f"define {type(target).__qualname__} there, or do without recovery",
            ["recovery"],
        )
    if device.recovery != "none" and not target.outlives_daemon:
        raise ConfigError(
            f"recovery {device.recovery}: what a disk of target {target.name} has in memory goes with its daemon",
            "keep it in a file or folder, or do without recovery",
            ["recovery"],
        )
    if device.name is not None and re.fullmatch(r"|[/+-].*|\d+", device.name):
        raise ConfigError(
            f"name {device.name!r} could be taken for an id, a path or an option",
            f"choose one with a letter in front, such as disk{device.name.strip('/+-')}",
            ["name"],
        )
    if device.shmem_zc:
        mode.check_sharing(device.mode, device.recovery != "none")
    else:
        for name, value in (("htlb", device.htlb), ("rdonly_shmem_buf", device.rdonly_shmem_buf)):
            if value:
                raise ConfigError(f"{name} is about shared memory, which is off", "turn shmem_zc on, too", [name])
    if device.threads_per_queue > device.depth:
        raise ConfigError(
            f"{device.threads_per_queue} threads per queue need a depth of {device.threads_per_queue} or more,"
            f" not {device.depth}",
            "lower threads_per_queue, or raise the depth",
            ["threads_per_queue", "depth"],
        )
    if device.supervise and device.recovery == "none":
        raise ConfigError(
            "supervise: without recovery there is nothing left of a device whose daemon died",
            "choose a recovery, too: queue, reissue or fail",
            ["supervise", "recovery"],
        )
    if (device.max_sectors or 0) * SECTOR > device.max_io_buf_bytes:
        raise ConfigError(
            f"max_sectors {device.max_sectors} is more than the {device.max_io_buf_bytes // SECTOR} that fit into the"
            " buffer of a request",
            "lower it, or raise max_io_buf_bytes",
            ["max_sectors", "max_io_buf_bytes"],
        )
    mode.check_depth(device.mode, device.depth)
    if device.unprivileged:
        _check_unprivileged(device, target)
    if target.has_metadata:
        mode.check_metadata(device.mode)
        if device.shmem_zc:
            raise ConfigError(
                "memory shared by clients does not go with metadata",
                "leave one of the two out",
                ["shmem_zc", "metadata_size"],
            )


def _check_unprivileged(device: DeviceOptions, target: Target) -> None:
    """ConfigError for what the driver refuses to ordinary users, or drops silently (ublk_drv.c, ublk_ctrl_add_dev)."""
    mode.check_unprivileged(device.mode)
    if device.recovery != "none":
        raise ConfigError(
            "unprivileged devices go with their daemon: the driver has no recovery for them",
            "leave recovery out",
            ["recovery", "unprivileged"],
        )
    if target.has_metadata:
        raise ConfigError(
            "unprivileged devices cannot have metadata: only a daemon that may copy all data itself gets it",
            "leave one of the two out",
            ["unprivileged", "metadata_size"],
        )


def from_dump(data: Mapping[str, Any]) -> DeviceConfig:
    """The configuration that ``DeviceConfig.dump`` wrote."""
    return DeviceConfig(
        DeviceOptions({name: DeviceOptions.options[name].load(raw) for name, raw in data["device"].items()}),
        load.from_dump(data["target"]),
    )


def parse_options(said: Mapping[str, Any]) -> DeviceOptions:
    """Those of a device, as YAML writes them or parsed already; paths are from the working folder on. ConfigError."""
    values = {}
    for name, raw in said.items():
        opt = DeviceOptions.options.get(name)
        if opt is None:
            close = difflib.get_close_matches(name, DeviceOptions.options, n=1)
            raise ConfigError(
                f"no device has an option {name}",
                f"did you mean {close[0]}?" if close else f"there are: {', '.join(DeviceOptions.options)}",
            )
        if raw is None and opt.default is None:
            continue
        try:
            value = opt.parse(os.fspath(raw) if isinstance(raw, os.PathLike) else raw)
        except ValueError as e:
            raise ConfigError(f"{name}: {e}", f"it is: {opt.help}", [name]) from e
        values[name] = absolute(opt, value, Path.cwd())
    return DeviceOptions(values)


def absolute(opt: Option, value: Any, base: Path) -> Any:
    """``value`` with relative paths taken from ``base``: the daemon has another working folder."""
    if not opt.kind.is_path or value is None:
        return value
    if isinstance(value, tuple):
        return tuple(absolute(opt, one, base) for one in value)
    if isinstance(value, Target):
        return value
    return Path(os.path.abspath(base / value))  # noqa: PTH100 - resolve() would follow links


def read_yaml(path: Path) -> Draft:
    """The values of a YAML file, parsed. ConfigError lists everything that is wrong with it."""
    try:
        with path.open(encoding="utf-8") as file:
            _check_writers(path, file.fileno())
            text = file.read()
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {os.strerror(e.errno or 0)}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is not a text in UTF-8: {e.reason} at byte {e.start}") from e
    return _Reader(path, text).read()


def _check_writers(path: Path, fd: int) -> None:
    """ConfigError for a file from which anybody could have root open, share and append to what he likes."""
    found = os.fstat(fd)
    if os.geteuid() == 0 and stat.S_ISREG(found.st_mode) and found.st_mode & stat.S_IWOTH:
        raise ConfigError(f"{path} can be written by anybody, and says what root is to open", f"chmod o-w {path}")


class _Reader:
    """Walks the nodes of one YAML file and keeps the place of each mistake."""

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._lines = text.splitlines()
        self._text = text
        self._mistakes: list[tuple[int, str]] = []
        self._places: dict[str, str] = {}

    def read(self) -> Draft:
        draft = Draft(places=self._places)
        try:
            self._loader = yaml.SafeLoader(self._text)
            root = self._loader.get_single_node()
        except yaml.MarkedYAMLError as e:
            mark = e.problem_mark or e.context_mark
            what = ", ".join(filter(None, (e.context, e.problem)))
            raise ConfigError(self._describe(mark.line if mark else 0, "", what)) from e
        except yaml.reader.ReaderError as e:
            line = self._text.count("\n", 0, e.position)
            raise ConfigError(self._describe(line, "", f"character {e.character:#x} is not allowed in YAML")) from e
        except RecursionError as e:
            raise ConfigError(f"{self._path}: nested too deeply") from e
        if root is None or (isinstance(root, yaml.ScalarNode) and not root.value):
            raise ConfigError(f"{self._path} is empty", "conf/ has a commented example for each target")
        entries = self._mapping(root, "")
        target = entries.pop("target", None)
        draft.device = self._values(entries, DeviceOptions.options, "", extra=["target"])
        if target is None:
            self._mistake(root, "", "target is missing: say, for example, target: {type: null}")
        elif found := self._target(target[1], "target"):
            cls, draft.target = found
            draft.target_type = load.reference(cls)
            self._places["target"] = self._place(target[1].start_mark.line, "target")
        if self._mistakes:
            raise ConfigError("\n".join(text for _, text in sorted(self._mistakes, key=itemgetter(0))))
        return draft

    def _target(self, node: yaml.Node, path: str) -> tuple[type[Target], dict[str, Any]] | None:
        """The class of a target and its options; None if there is a mistake."""
        entries = self._mapping(node, path)
        if "type" not in entries:
            if isinstance(node, yaml.MappingNode):
                self._mistake(node, path, f"type is missing: one of {', '.join(tgt.names())}")
            return None
        type_node = entries.pop("type")[1]
        value = self._scalar(type_node, f"{path}.type")
        if value is _NOT_SCALAR:
            return None
        # YAML reads a bare null as "nothing"; as a target's type it is the target of that name.
        name = "null" if value is None and type_node.value else value
        if not isinstance(name, str):
            what = f"{type_node.value!r} is not the name of a target" if type_node.value else "has no value"
            self._mistake(type_node, f"{path}.type", f"{what}: one of {', '.join(tgt.names())}")
            return None
        if load.is_file(name):  # from where this file is
            name = os.path.join(self._path.absolute().parent, os.path.expanduser(name))  # noqa: PTH111, PTH118
        try:
            cls = load.find(name, said_by_file=True)
        except ConfigError as e:
            self._mistake(type_node, f"{path}.type", f"{e.message}; {e.hint}")
            return None
        return cls, self._values(entries, cls.options, f"{path}.", extra=["type"])

    def _part(self, node: yaml.Node, path: str) -> Any:
        """A target that is a value of an option."""
        before, places = len(self._mistakes), dict(self._places)
        found = self._target(node, path)
        self._places.clear()  # of its keys: others may have the same names
        self._places.update(places)
        if found is None or len(self._mistakes) > before:
            return _NOT_SCALAR
        cls, values = found
        if missing := [opt for opt in cls.options.values() if opt.required and opt.name not in values]:
            self._mistake(node, path, f"no {missing[0].name} given: target {cls.name} needs it, {missing[0].help}")
            return _NOT_SCALAR
        return cls(values)

    def _values(
        self,
        entries: dict[str, tuple[yaml.Node, yaml.Node]],
        options: Mapping[str, Option],
        prefix: str,
        extra: list[str],
    ) -> dict[str, Any]:
        values = {}
        for name, (key_node, node) in entries.items():
            if name not in options:
                known = [*options, *extra]
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
                if prefix and name in DeviceOptions.options:
                    hint = "it belongs to the device: write it beside target, not into it"
                self._mistake(key_node, f"{prefix}{name}", f"unknown key; {hint}")
                continue
            opt = options[name]
            self._places[name] = self._place(key_node.start_mark.line, f"{prefix}{name}")
            read = self._list if opt.kind.several else self._scalar
            raw = read(node, f"{prefix}{name}", opt.kind.is_target)
            if raw is _NOT_SCALAR:
                continue
            try:
                values[name] = absolute(opt, opt.parse(_expanded(opt, raw)), self._path.absolute().parent)
                if opt.kind is CODE:
                    values[name] = load.without_links(values[name])
                    load.check_writers(values[name])
            except ValueError as e:
                # The words of the file, not what YAML or Python makes of them: 'yes', not True.
                reason = str(e).replace(repr(raw), repr(node.value), 1) if raw is not None else "has no value"
                self._mistake(node, f"{prefix}{name}", reason)
        return values

    def _mapping(self, node: yaml.Node, path: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        if not isinstance(node, yaml.MappingNode):
            self._mistake(node, path, "expected keys and values here, such as type: loop")
            return {}
        entries: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._mistake(key, path, "a key must be a plain word")
            elif key.value in entries:
                self._mistake(key, f"{path}.{key.value}".strip("."), "given twice")
            else:
                entries[key.value] = (key, value)
        return entries

    def _scalar(self, node: yaml.Node, path: str, or_target: bool = False) -> Any:
        if or_target and isinstance(node, yaml.MappingNode):
            return self._part(node, path)
        if isinstance(node, yaml.ScalarNode):
            try:
                return self._loader.construct_object(node)
            except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError):
                self._mistake(node, path, f"{node.value!r} cannot be understood")
                return _NOT_SCALAR
        self._mistake(node, path, "expected a single value here")
        return _NOT_SCALAR

    def _list(self, node: yaml.Node, path: str, or_target: bool = False) -> Any:
        if not isinstance(node, yaml.SequenceNode):
            self._mistake(node, path, "expected a list here, such as [one, another]")
            return _NOT_SCALAR
        found = [
            self._scalar(one, f"{path}[{n}]" if or_target else path, or_target) for n, one in enumerate(node.value)
        ]
        return _NOT_SCALAR if _NOT_SCALAR in found else found

    def _mistake(self, node: yaml.Node, path: str, what: str) -> None:
        line = node.start_mark.line
        self._mistakes.append((line, self._describe(line, path, what)))

    def _place(self, line: int, path: str) -> str:
        return f"{self._path}:{line + 1}: " + (f"{path}: " if path else "")

    def _describe(self, line: int, path: str, what: str) -> str:
        source = self._lines[line].rstrip()[:_SHOWN] if line < len(self._lines) else ""
        source = "".join(c if c.isprintable() or c == "\t" else "\ufffd" for c in source)
        return f"{self._place(line, path)}{what}" + (f"\n    {source}" if source else "")


def _expanded(opt: Option, raw: Any) -> Any:
    """With the home folder in paths, as the shell puts it there on the command line."""
    if opt.kind.is_path and isinstance(raw, list):
        return [_expanded(opt, one) for one in raw]
    if opt.kind.is_path and isinstance(raw, str):
        return os.path.expanduser(raw)  # noqa: PTH111 - Path would make ~ of ./~
    return raw


_NOT_SCALAR: Any = object()
_SHOWN = 120  # characters of a line with a mistake
