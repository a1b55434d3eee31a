"""The ``ublk`` command: parse, call, render."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from ublkpy import __version__, config, render, tgt
from ublkpy.errors import ConfigError, ExitCode, NoDeviceError, UblkError
from ublkpy.tgt.options import BOOL, Option
from ublkpy.uring.mode import MODES

log = logging.getLogger(__name__)


def main() -> None:
    """Entry point: run the command and turn errors into messages and exit codes."""
    _fill_standard_streams()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.basicConfig(format="ublk: %(message)s", level=logging.INFO)
    try:
        status = cli.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as e:
        e.show()
        status = e.exit_code
    except click.ClickException as e:
        show_error(_in_our_words(e))
        status = e.exit_code
    except UblkError as e:
        show_error(e)
        status = e.exit_code
    except OSError as e:
        if not _came_from_echo(e):
            raise
        _discard_stdout()
        show_error(UblkError(f"cannot write to stdout: {e.strerror}"))
        status = ExitCode.FAILED
    except (click.Abort, KeyboardInterrupt):
        click.echo("ublk: interrupted", err=True)
        status = ExitCode.INTERRUPTED
    sys.exit(status)


def _fill_standard_streams() -> None:
    """A stream that the caller closed must not become a pipe or a device of ours."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


def _came_from_echo(e: OSError) -> bool:
    """Whether it is about the output, ours or click's, and not a bug."""
    return any(frame.f_code is click.echo.__code__ for frame, _ in traceback.walk_tb(e.__traceback__))


def _discard_stdout() -> None:
    """What is left in the buffer must not fail once more at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def show_error(e: UblkError) -> None:
    """Message and cure on stderr."""
    click.echo(f"ublk: error: {e.message}", err=True)
    if e.hint:
        click.echo(f"  hint: {e.hint}", err=True)


def _in_our_words(e: click.ClickException) -> UblkError:
    """An error of click's, with the help that belongs to it."""
    # There is no context where an option lacks its value.
    ctx = e.ctx if isinstance(e, click.UsageError) else None
    target = ctx.meta.get(_TARGET) if ctx else None
    shows_help = f"ublk help -t {target}" if target else f"{ctx.command_path if ctx else 'ublk'} --help"
    return UblkError(e.format_message().rstrip("."), f"see: {shows_help}")


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
        )


class _Declared(click.ParamType[Any]):
    def __init__(self, declared: Option) -> None:
        self._declared = declared
        self.name = declared.kind.metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return config.absolute(self._declared, self._declared.parse(value), Path.cwd())
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
        target = ctx.meta.get(_TARGET)
        own, (help_option,) = super().get_params(ctx)[:-1], super().get_params(ctx)[-1:]
        return [*own, *(_options_of(target) if target else ()), help_option]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            ctx.meta[_TARGET] = self._named_target(ctx, args)
        except UblkError:
            if not ctx.resilient_parsing:  # completion must not talk
                raise
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as e:
            if ctx.meta.get(_TARGET):
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
        for target in tgt.names():
            for param in _options_of(target):
                param.add_to_parser(parser, lenient)
        said, _, _ = parser.parse_args(list(args))
        name, file = said.get("target_type"), said.get("file")
        if file:
            # Read once: it may be a pipe.
            ctx.meta[_FILE] = config.read_yaml(Path(file))
        if name:
            return tgt.find(name).name
        return ctx.meta[_FILE].target_type if file else None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        target = ctx.meta.get(_TARGET)
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            mine = isinstance(param, Declared) and param.section == "target"
            if record:
                groups.setdefault(f"Options of target {target}" if mine else "Options", []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)
        if not target:
            formatter.write_paragraph()
            formatter.write_text(f"Targets: {', '.join(tgt.names())}. Their options: ublk help -t TARGET")


# In click's meta: the named target, and the values of the file of -c.
_TARGET = "ublkpy.target"
_FILE = "ublkpy.file"


def _options_of(target: str) -> list[Declared]:
    return [Declared(opt, "target") for opt in tgt.find(target).options.values()]


def _complete_ids(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from ublkpy.daemon import inspect

    return [CompletionItem(str(n)) for n in inspect.device_ids() if str(n).startswith(incomplete)]


def _complete_targets(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in tgt.names() if name.startswith(incomplete)]


def _complete_commands(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in cli.commands if name.startswith(incomplete)]


class _DeviceId(click.IntRange):
    name = "device id"


_DEVICE_ID = _DeviceId(0, 2**20 - 1)
_id_option: Callable[[Any], Any] = click.option(
    "-n", "--number", "dev_id", type=_DEVICE_ID, required=True, help="device id", shell_complete=_complete_ids
)
_SWITCH = click.Choice([0, 1])
_json_option: Callable[[Any], Any] = click.option("--json", "as_json", is_flag=True, help="print JSON")


class _Group(click.Group):
    """The commands in the order in which one meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "-v", "--version", prog_name="ublk", message="%(prog)s %(version)s")
def cli() -> None:
    """Block devices in user space: /dev/ublkbN, served by a daemon of your choice."""


@cli.command(cls=Add)
@click.option("-t", "--type", "target_type", metavar="TARGET", help="target", shell_complete=_complete_targets)
@click.option("-c", "--config", "file", type=click.Path(path_type=Path), help="YAML file; other options win over it")
@click.option("--foreground", is_flag=True, help="stay attached, log to stderr, end with SIGINT or SIGTERM")
@_json_option
@click.option("-r", "--user_recovery", "r", type=_SWITCH, metavar="0|1", help="as ublksrv: --recovery queue")
@click.option("-i", "--user_recovery_reissue", "i", type=_SWITCH, metavar="0|1", help="as ublksrv: --recovery reissue")
@click.option("-e", "--user_recovery_fail_io", "e", type=_SWITCH, metavar="0|1", help="as ublksrv: --recovery fail")
@click.option("-u", "--uring_comp", type=_SWITCH, metavar="0|1", help="as ublksrv; the driver always does it")
@click.option("-z", "--zerocopy", is_flag=True, help="as ublksrv: --mode auto-buf")
@click.option("--usercopy", "--user_copy", "usercopy", is_flag=True, help="as ublksrv: --mode user-copy")
@click.option("-g", "--need_get_data", type=_SWITCH, metavar="0|1", help="as ublksrv: --mode get-data")
@click.option(
    "-b", "--batch-io", "batch", is_flag=True, help="as ublksrv: batch+copy, or batch+ the mode that is said besides"
)
@click.pass_context
def add(
    ctx: click.Context,
    /,
    target_type: str | None,
    file: Path | None,
    foreground: bool,
    as_json: bool,
    r: int | None,
    i: int | None,
    e: int | None,
    uring_comp: int | None,
    zerocopy: bool,
    usercopy: bool,
    need_get_data: int | None,
    batch: bool,
    **values: Any,
) -> int:
    """Add a device and print its node, /dev/ublkbN, once it can be used."""
    from ublkpy.daemon.add import add as add_device
    from ublkpy.daemon.add import add_in_foreground

    said = config.Draft(target_type=ctx.meta[_TARGET] if target_type else None)
    for param in ctx.command.get_params(ctx):
        if isinstance(param, Declared) and values[param.name or ""] is not None:
            section = said.device if param.section == "device" else said.target
            section[param.declared.name] = values[param.name or ""]
    _recovery_as_ublksrv(said, r, i, e)
    described = ctx.meta.get(_FILE) or config.Draft()
    _mode_as_ublksrv(said, described.device.get("mode", "auto"), zerocopy, usercopy, need_get_data, batch)
    wanted = config.build(said, described)
    if foreground:
        return add_in_foreground(wanted, lambda dev_id: _show_added(dev_id, as_json))

    def show(dev_id: int) -> None:
        # Too late for Ctrl-C: who has read the node has the device.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        _show_added(dev_id, as_json)

    add_device(wanted, show)
    return ExitCode.OK


def _show_added(dev_id: int, as_json: bool) -> None:
    """Print the device; UblkError if that fails, because a device that nobody knows of must not stay."""
    from ublkpy.daemon import inspect

    text = render.to_json({"device": inspect.status(dev_id).to_dict()}) if as_json else f"/dev/ublkb{dev_id}"
    try:
        click.echo(text)
    except OSError as e:
        _discard_stdout()
        raise UblkError(
            f"cannot print the name of the new device: {e.strerror}", "nothing was added; see where stdout goes"
        ) from e


def _recovery_as_ublksrv(said: config.Draft, r: int | None, i: int | None, e: int | None) -> None:
    """ublksrv's three switches as one choice."""
    on = [name for name, switch in (("queue", r), ("reissue", i), ("fail", e)) if switch]
    given = any(switch is not None for switch in (r, i, e))
    if not given:
        return
    if "recovery" in said.device or {"reissue", "fail"} <= set(on):
        raise ConfigError(
            "-r, -i and -e cannot be combined with --recovery, nor -i with -e",
            "say only: --recovery queue|reissue|fail",
        )
    said.device["recovery"] = on[-1] if on else "none"


def _mode_as_ublksrv(
    said: config.Draft, before: str, zerocopy: bool, usercopy: bool, need_get_data: int | None, batch: bool
) -> None:
    """ublksrv's switches as one choice; they change what a file has chosen ``before``."""
    asked = {"auto-buf": zerocopy, "user-copy": usercopy, "get-data": need_get_data}
    ways = "".join(way for way, switch in asked.items() if switch)
    undone = need_get_data == 0 and before == "get-data"
    if not (ways or batch or undone):
        return
    kept = "copy" if undone or before == "auto" else before.removeprefix("batch+")
    name = "batch+" * batch + (ways or kept)
    if "mode" in said.device or name not in MODES:
        raise ConfigError(
            "-z, --usercopy and -g exclude each other, -g excludes -b, and --mode excludes all of them",
            f"say only: --mode {'|'.join(MODES)}",
        )
    said.device["mode"] = name


for _opt in config.DeviceOptions.options.values():
    add.params.append(Declared(_opt, "device"))


@cli.command("del")
@click.argument("ids", type=_DEVICE_ID, nargs=-1, shell_complete=_complete_ids)
@click.option("-n", "--number", "numbers", type=_DEVICE_ID, multiple=True, help="device id; repeatable")
@click.option("-a", "--all", "every", is_flag=True, help="all devices, those of other servers included")
@click.option("--force", is_flag=True, help="also if in use; kills a daemon that does not answer")
@click.option("--async", "no_wait", is_flag=True, help="do not wait until the id is free")
def delete(ids: tuple[int, ...], numbers: tuple[int, ...], every: bool, force: bool, no_wait: bool) -> int:
    """Stop and delete devices."""
    from ublkpy.daemon import ctrl, inspect
    from ublkpy.daemon.delete import delete_each

    if every == bool(ids or numbers):
        raise click.UsageError("name the devices, or say -a for all of them (not both)")
    if every:
        ctrl.require_driver()  # without it there is no device to ask for
    dev_ids = inspect.device_ids() if every else list(dict.fromkeys((*numbers, *ids)))
    errors = delete_each(dev_ids, force=force, wait=not no_wait)
    if every:  # others may delete, too, and then it is done
        errors = [e for e in errors if not isinstance(e, NoDeviceError)]
    for e in errors:
        show_error(e)
    return errors[0].exit_code if errors else ExitCode.OK


@cli.command("list")
@click.option("-n", "--number", "dev_id", type=_DEVICE_ID, help="details of one device", shell_complete=_complete_ids)
@_json_option
def list_(dev_id: int | None, as_json: bool) -> None:
    """Show the devices."""
    from ublkpy.daemon import inspect

    if dev_id is not None:
        device = inspect.status(dev_id)
        shown = render.to_json({"device": device.to_dict()}) if as_json else render.ublksrv_dump(device)
        click.echo(shown)
        return
    found = inspect.list_devices()
    if as_json:
        click.echo(render.devices_json(found))
    elif found:
        click.echo(render.devices(found))
    else:
        click.echo("no ublk devices; one comes with: ublk add -t null", err=True)


@cli.command()
@_id_option
def recover(dev_id: int) -> None:
    """Start a new daemon for a device whose daemon died."""
    from ublkpy.daemon.recover import recover as recover_device

    recover_device(dev_id)
    try:
        click.echo(f"/dev/ublkb{dev_id}")
    except OSError as e:  # the device works again, whoever hears of it
        _discard_stdout()
        log.warning("cannot write to stdout: %s", e.strerror)


@cli.command()
@_json_option
def features(as_json: bool) -> None:
    """Show what this kernel's driver can do."""
    from ublkpy.daemon import inspect

    found = inspect.features()
    click.echo(render.features_json(found) if as_json else render.features(found))


@cli.command()
@click.option("-c", "--config", "file", type=click.Path(path_type=Path), required=True, help="YAML file")
def check(file: Path) -> None:
    """Validate a YAML file and its target, without the driver."""
    from ublkpy.tgt.options import format_size

    target = config.build(config.Draft(), config.read_yaml(file)).target
    geometry = target.open()
    target.close()
    backing = f" on {target.backing()}" if target.backing() else ""
    click.echo(f"{file}: {target.name}{backing}, {format_size(geometry.size)}: good")


@cli.command("help")
@click.option(
    "-t", "--type", "target_type", metavar="TARGET", help="the options of a target", shell_complete=_complete_targets
)
@click.argument("command", required=False, shell_complete=_complete_commands)
@click.pass_context
def help_(ctx: click.Context, target_type: str | None, command: str | None) -> None:
    """Show the help of a command or a target."""
    parent = ctx.parent
    assert parent is not None
    if target_type:
        cls = tgt.find(target_type)
        sub = click.Context(add, info_name=f"add -t {cls.name}", parent=parent)
        sub.meta[_TARGET] = cls.name
        click.echo(f"{cls.name}: {(cls.__doc__ or '').splitlines()[0]}\n\n{add.get_help(sub)}")
    elif command:
        _, found, _ = cli.resolve_command(parent, [command])
        assert found is not None  # a command that there is not raises, with what was perhaps meant
        click.echo(found.get_help(click.Context(found, info_name=command, parent=parent)))
    else:
        click.echo(cli.get_help(parent))
