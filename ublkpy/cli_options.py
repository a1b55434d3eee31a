"""What the command line is made of: options from declared ones, ids of devices, and what a shell completes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from ublkpy import config, tgt
from ublkpy.errors import ConfigError, UblkError
from ublkpy.tgt import load
from ublkpy.tgt.options import ARGUMENT, ARGUMENTS, BOOL, Option, parse_size


class Declared(click.Option):
    """A command-line option made from a declared one; its value is parsed like the YAML key's."""

    def __init__(self, declared: Option, section: str) -> None:
        self.declared = declared
        self.section = section
        flags = [*declared.flags, *declared.long_flags]
        default = "" if declared.default in (None, ..., False) else f"  [default: {declared.default}]"
        needed = "  [required]" if declared.required else ""
        super().__init__(
            [f"{section}_{declared.name}", *_with_off(flags, declared.off_flags)],
            type=None if declared.kind is BOOL else _Declared(declared),
            metavar="|".join(declared.kind.choices) or None,
            is_flag=declared.kind is BOOL,
            default=None,
            help=f"{declared.help}{default}{needed}",
            multiple=declared.kind.several,
            callback=self._all if declared.kind.several else None,
        )

    def _all(self, ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        """The values of several, together."""
        if not value:
            return None
        try:
            return self.declared.check(value, value)
        except ValueError as e:
            raise click.BadParameter(str(e), ctx, param) from e


class _Declared(click.ParamType[Any]):
    def __init__(self, declared: Option) -> None:
        self._declared = declared
        self.name = declared.kind.metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        # click calls this for each of several
        parse = self._declared.kind.parse if self._declared.kind.several else self._declared.parse
        try:
            return config.absolute(self._declared, parse(value), Path.cwd())
        except ValueError as e:
            self.fail(str(e), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        kind = self._declared.kind
        if kind.metavar == "PATH":
            return [CompletionItem(incomplete, type="file")]
        return [CompletionItem(choice) for choice in kind.choices if choice.startswith(incomplete)]


def _with_off(flags: list[str], off_flags: tuple[str, ...]) -> list[str]:
    """click's notation for flags that unset: --direct/--buffered_io, and " /--more" for those without a partner."""
    if not off_flags:
        return flags
    return [*flags[:-1], f"{flags[-1]}/{off_flags[0]}", *(f" /{off}" for off in off_flags[1:])]


class Add(click.Command):
    """``add``: which options there are depends on the target that is named."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        target = ctx.meta.get(TARGET)
        *own, help_option = super().get_params(ctx)
        return [*own, *(_without_others(options_of(target), own) if target else ()), help_option]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            ctx.meta[TARGET] = self._named_target(ctx, args)
        except UblkError:
            if not ctx.resilient_parsing:  # completion must not talk
                raise
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as e:
            if ctx.meta.get(TARGET):
                raise
            raise ConfigError(
                f"no target given, and {e.option_name} is no option of every device",
                f"add -t with one of: {', '.join(tgt.names())}",
            ) from e

    def _named_target(self, ctx: click.Context, args: list[str]) -> str | None:
        """The target that ``-t`` or the file of ``-c`` names, before the rest can be parsed."""
        # With the options of all targets: what looks like -t or -c may be the value of one of them.
        lenient = click.Context(self, parent=ctx, resilient_parsing=True, ignore_unknown_options=True)
        parser = self.make_parser(lenient)
        for target in load.BUILT_IN:
            for param in options_of(target):
                param.add_to_parser(parser, lenient)
        said, _, _ = parser.parse_args(list(args))
        words = said.get("words")  # without any, it is a mark of click's
        named, _ = split_words(words if isinstance(words, list | tuple) else ())
        names = [said.get("target_type"), *named]
        name = next((name for name in names if isinstance(name, str)), None)
        file = said.get("file")
        if file:
            # Read once: it may be a pipe.
            ctx.meta[FILE] = config.read_yaml(Path(file))
        if name:
            return load.reference(load.find(name))
        return ctx.meta[FILE].target_type if file else None

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if ctx.obj:  # the program of one target
            formatter.write_usage(ctx.find_root().command_path, "[OPTIONS]")
        else:
            super().format_usage(ctx, formatter)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if ctx.obj:
            formatter.write_paragraph()
            with formatter.indentation():
                formatter.write_text(tgt.find(ctx.obj).text())
        else:
            super().format_help_text(ctx, formatter)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        target: str | None = ctx.meta.get(TARGET)
        of_target = f"Options of target {tgt.find(target).name}" if target else ""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            mine = isinstance(param, Declared) and param.section == "target"
            is_said = ctx.obj and param.name in _OF_PROGRAM
            if record and isinstance(param, click.Option) and not is_said:
                groups.setdefault(of_target if mine else "Options", []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)
        if not target:
            formatter.write_paragraph()
            formatter.write_text(f"Targets: {', '.join(tgt.names())}. Their options: ublk help -t TARGET")


def _without_others(options: list[Declared], others: Iterable[click.Parameter]) -> list[Declared]:
    """The options of a target, if none has a flag that is taken. UblkError if one has: it would never be seen."""
    taken = {flag for other in others for flag in (*other.opts, *other.secondary_opts)}
    for opt in options:
        for flag in (*opt.opts, *opt.secondary_opts):
            if flag in taken:
                raise UblkError(
                    f"option {opt.declared.name} of the target has the flag {flag}, which any device has",
                    "give it another name, or other flags",
                )
    return options


def split_words(words: Iterable[str]) -> tuple[list[str], tuple[str, ...]]:
    """Names of targets, and arguments of the form key=value."""
    words = list(words)
    arguments = tuple(word for word in words if ARGUMENT.match(word))
    return [word for word in words if word not in arguments], arguments


def take_arguments(said: config.Draft, target: str | None, arguments: tuple[str, ...]) -> None:
    """Put them to those that the target's option for that has already. ConfigError if it has none."""
    if not arguments:
        return
    options = tgt.find(target).options.values() if target else ()
    name = next((opt.name for opt in options if opt.kind is ARGUMENTS), None)
    if name is None:
        raise ConfigError(
            f"{arguments[0]}: " + (f"target {target} takes no key=value" if target else "no target given"),
            f"ublk help -t {target}" if target else f"add -t with one of: {', '.join(tgt.names())}",
        )
    said.target[name] = (*said.target.get(name, ()), *arguments)


_OF_PROGRAM = ("words", "target_type", "file")
"""What the program of a target leaves nobody to say."""

# In click's meta: the named target, and the values of the file of -c.
TARGET = "ublkpy.target"
FILE = "ublkpy.file"


def options_of(target: str) -> list[Declared]:
    return [Declared(opt, "target") for opt in tgt.find(target).options.values()]


def complete_ids(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from ublkpy.driver import inspect

    return [CompletionItem(str(n)) for n in inspect.device_ids() if str(n).startswith(incomplete)]


def complete_targets(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in tgt.names() if name.startswith(incomplete)]


_IDS: click.ParamType[Any] = click.IntRange(0, 2**20 - 1)


class _DeviceId(click.ParamType[int]):
    """The id of a device, its node, or the name that it was added with."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).removeprefix("/dev/ublkb")
        if re.fullmatch(r"[+-]?\d+", text):
            dev_id: int = _IDS.convert(text, param, ctx)
            return dev_id
        if ctx and ctx.resilient_parsing:  # completion must not talk
            return -1
        from ublkpy.life.named import find

        return find(text).info.dev_id


DEVICE_ID = _DeviceId()
id_option: Callable[[Any], Any] = click.option(
    "-n", "--number", "dev_id", type=DEVICE_ID, required=True, help="device id or name", shell_complete=complete_ids
)
SWITCH = click.Choice([0, 1])
json_option: Callable[[Any], Any] = click.option("--json", "as_json", is_flag=True, help="print JSON")


class SizeType(click.ParamType[int]):
    """A number of bytes, written as in a YAML file."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(value)
        except ValueError as e:
            self.fail(str(e), param, ctx)


class CpuSetType(click.ParamType[frozenset[int]]):
    """CPUs as taskset has them, ``0-3,5``, and as ublksrv has them, ``[0,1]``."""

    name = "cpuset"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> frozenset[int]:
        cpus: set[int] = set()
        for part in str(value).removeprefix("[").removesuffix("]").split(","):
            match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
            if not match or int(match[2] or match[1]) < int(match[1]):
                self.fail(f"{value!r} is not a set of CPUs such as 0-3,5", param, ctx)
            cpus |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
        return frozenset(cpus)


def several(command: Callable[..., Any]) -> Callable[..., Any]:
    """Devices by their ids, ``-n 0 -n 1`` or ``0 1``, as the command's ``ids`` and ``numbers``, or ``every`` one."""
    for decorate in (
        click.option("-a", "--all", "every", is_flag=True, help="all devices for which that makes sense"),
        click.option("-n", "--number", "numbers", type=DEVICE_ID, multiple=True, help="device id or name; repeatable"),
        click.argument("ids", type=DEVICE_ID, nargs=-1, shell_complete=complete_ids),
    ):
        command = decorate(command)
    return command
