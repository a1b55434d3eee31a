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
from ublkpy.cli_options import (
    DEVICE_ID,
    FILE,
    SWITCH,
    TARGET,
    Add,
    CpuSetType,
    Declared,
    SizeType,
    complete_ids,
    complete_targets,
    id_option,
    json_option,
    several,
    split_words,
    take_arguments,
)
from ublkpy.cli_target import target_group
from ublkpy.device import Device
from ublkpy.errors import ConfigError, ExitCode, NoDeviceError, UblkError
from ublkpy.tgt.base import Progress
from ublkpy.uring.mode import MODES

log = logging.getLogger(__name__)


def main(target: str | None = None) -> None:
    """Entry point: run the command and turn errors into messages and exit codes. With ``target``, it is ``add`` of that
    one.
    """
    _fill_standard_streams()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.basicConfig(format="ublk: %(message)s", level=logging.INFO)
    try:
        args = None if target is None else ["add", target, *sys.argv[1:]]
        status = cli.main(args, standalone_mode=False, obj=target)
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
    target = ctx.meta.get(TARGET) if ctx else None
    shows_help = f"ublk help -t {target}" if target else f"{ctx.command_path if ctx else 'ublk'} --help"
    return UblkError(e.format_message().rstrip("."), f"see: {shows_help}")


def _complete_commands(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in cli.commands if name.startswith(incomplete)]


class _Group(click.Group):
    """The commands in the order in which one meets them; set_affinity, as ublksrv writes it, is one as well."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, cmd_name.replace("_", "-"))

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "-v", "--version", prog_name="ublk", message="%(prog)s %(version)s")
def cli() -> None:
    """Block devices in user space: /dev/ublkbN, served by a daemon of your choice."""


def _of_device(command: Callable[..., Any]) -> Callable[..., Any]:
    """What describes a device that there is not yet, but for its options."""
    for decorate in (
        click.option(
            "-c", "--config", "file", type=click.Path(path_type=Path), help="YAML file; other options win over it"
        ),
        click.option("-t", "--type", "target_type", metavar="TARGET", help="the same", shell_complete=complete_targets),
        click.argument("words", nargs=-1, metavar="[TARGET] [KEY=VALUE]...", shell_complete=complete_targets),
    ):
        command = decorate(command)
    return command


@cli.command(cls=Add)
@_of_device
@click.option("--foreground", is_flag=True, help="stay attached, log to stderr, end with SIGINT or SIGTERM")
@json_option
@click.option("-r", "--user_recovery", "r", type=SWITCH, metavar="0|1", help="as ublksrv: --recovery queue")
@click.option("-i", "--user_recovery_reissue", "i", type=SWITCH, metavar="0|1", help="as ublksrv: --recovery reissue")
@click.option("-e", "--user_recovery_fail_io", "e", type=SWITCH, metavar="0|1", help="as ublksrv: --recovery fail")
@click.option("-u", "--uring_comp", type=SWITCH, metavar="0|1", help="as ublksrv; the driver always does it")
@click.option("-z", "--zerocopy", is_flag=True, help="as ublksrv: --mode auto-buf")
@click.option("--usercopy", "--user_copy", "usercopy", is_flag=True, help="as ublksrv: --mode user-copy")
@click.option("-g", "--need_get_data", type=SWITCH, metavar="0|1", help="as ublksrv: --mode get-data")
@click.option(
    "-b", "--batch-io", "batch", is_flag=True, help="as ublksrv: batch+copy, or batch+ the mode that is said besides"
)
@click.pass_context
def add(
    ctx: click.Context,
    /,
    words: tuple[str, ...],
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
    """Add a device and print its node, /dev/ublkbN, once it can be used.

    TARGET is the name of one, or ./FILE.py[:CLASS], or MODULE:CLASS. KEY=VALUE is for targets that run programs of
    others.
    """
    from ublkpy.life.foreground import serve

    said, described = _said(ctx, words, target_type, values)
    _recovery_as_ublksrv(said, r, i, e)
    _mode_as_ublksrv(said, described.device.get("mode", "auto"), zerocopy, usercopy, need_get_data, batch)
    wanted = config.build(said, described)
    if foreground and wanted.device.supervise:
        raise ConfigError(
            "--foreground excludes supervise: who started the command sees it end", "leave one of the two out"
        )
    if foreground:
        return serve(wanted, lambda dev_id: _show_added(dev_id, as_json))

    def show(dev_id: int) -> None:
        # Too late for Ctrl-C: who has read the node has the device.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        _show_added(dev_id, as_json)

    Device.add(wanted, show)
    return ExitCode.OK


def _said(
    ctx: click.Context, words: tuple[str, ...], target_type: str | None, values: dict[str, Any]
) -> tuple[config.Draft, config.Draft]:
    """What the command line says of a device, and what the file does that it names."""
    targets, arguments = split_words(words)
    targets += [target_type] if target_type else []
    if len(targets) > 1:
        raise ConfigError(f"two targets: {targets[0]} and {targets[1]}", "leave one of the two out")
    said = config.Draft(target_type=ctx.meta[TARGET] if targets else None)
    for param in ctx.command.get_params(ctx):
        if isinstance(param, Declared) and values[param.name or ""] is not None:
            section = said.device if param.section == "device" else said.target
            section[param.declared.name] = values[param.name or ""]
    take_arguments(said, ctx.meta.get(TARGET), arguments)
    return said, ctx.meta.get(FILE) or config.Draft()


def _show_added(dev_id: int, as_json: bool) -> None:
    """Print the device; UblkError if that fails, because a device that nobody knows of must not stay."""
    from ublkpy.driver import inspect

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


@cli.command("del")
@click.argument("ids", type=DEVICE_ID, nargs=-1, shell_complete=complete_ids)
@click.option("-n", "--number", "numbers", type=DEVICE_ID, multiple=True, help="device id or name; repeatable")
@click.option(
    "-a",
    "--all",
    "every",
    is_flag=True,
    help="all devices, those of other servers included; if you are not root, yours",
)
@click.option("--dead", is_flag=True, help="what crashes left: devices without a server, files without a device")
@click.option("--force", is_flag=True, help="also if in use; kills a daemon that does not answer")
@click.option("--async", "no_wait", is_flag=True, help="do not wait until the id is free")
def delete(ids: tuple[int, ...], numbers: tuple[int, ...], every: bool, dead: bool, force: bool, no_wait: bool) -> int:
    """Stop and delete devices."""
    from ublkpy.driver import ctrl, inspect
    from ublkpy.driver.delete import delete_each
    from ublkpy.life import leftovers

    if [every, dead, bool(ids or numbers)].count(True) != 1:
        raise click.UsageError("name the devices, or say -a for all of them (not both), or --dead")
    if every or dead:
        ctrl.require_driver()  # without it there is no device to ask for
    if dead:
        return _status_of(leftovers.clear())
    dev_ids = inspect.reachable_ids() if every else list(dict.fromkeys((*numbers, *ids)))
    errors = delete_each(dev_ids, force=force, wait=not no_wait)
    if every:  # others may delete, too, and then it is done
        errors = [e for e in errors if not isinstance(e, NoDeviceError)]
    return _status_of(errors)


def _status_of(errors: list[UblkError]) -> int:
    """Show what failed; the exit code is that of the first."""
    for e in errors:
        show_error(e)
    return errors[0].exit_code if errors else ExitCode.OK


@cli.command("list")
@click.option("-n", "--number", "dev_id", type=DEVICE_ID, help="details of one device", shell_complete=complete_ids)
@json_option
def list_(dev_id: int | None, as_json: bool) -> None:
    """Show the devices."""
    from ublkpy.daemon import pulse
    from ublkpy.driver import inspect
    from ublkpy.life import leftovers

    if dev_id is not None:
        device = inspect.status(dev_id)
        troubles = pulse.troubles([device])
        if as_json:
            click.echo(render.to_json({"device": render.device_dict(device, troubles)}))
        else:
            click.echo(render.ublksrv_dump(device))
            for trouble in troubles.values():
                log.warning("%s: %s", device.node, trouble)
        return
    found = inspect.list_devices()
    troubles = pulse.troubles(found)
    hidden = inspect.not_listed()
    for line in hidden:
        log.info("%s", line)
    if as_json:
        click.echo(render.devices_json(found, troubles))
    elif found:
        click.echo(render.devices(found, troubles))
    elif not hidden:
        click.echo("no ublk devices; one comes with: ublk add -t null", err=True)
    if stale := leftovers.stale_files():
        log.warning("left by devices that are gone: %s; ublk del --dead removes it", ", ".join(map(str, stale)))


@cli.command()
@several
def recover(ids: tuple[int, ...], numbers: tuple[int, ...], every: bool) -> int:
    """Start a new daemon for devices whose daemon died."""
    from ublkpy.driver import inspect

    def waiting() -> list[int]:
        return [device.info.dev_id for device in inspect.list_devices() if device.is_waiting]

    def recover_one(device: Device) -> None:
        device.recover()
        _say(device.node)

    return _for_each(ids, numbers, waiting if every else None, recover_one)


@cli.command()
@several
def upgrade(ids: tuple[int, ...], numbers: tuple[int, ...], every: bool) -> int:
    """Replace the daemons of devices by new ones of this version, without a failed request."""
    from ublkpy.life.upgrade import candidates

    def upgrade_one(device: Device) -> None:
        stall = device.upgrade()
        how = "by its systemd unit" if stall is None else f"requests waited {stall * 1000:.0f} ms"
        _say(f"{device.node}: upgraded; {how}")

    return _for_each(ids, numbers, candidates if every else None, upgrade_one)


@cli.command()
@id_option
@click.option("--safe", is_flag=True, help="not if anybody has it open; needs Linux 7.0")
@click.option("--force", is_flag=True, help="also if in use; kills a daemon that does not answer")
def stop(dev_id: int, safe: bool, force: bool) -> None:
    """Take a block device away; its id stays, for start."""
    if safe and force:
        raise click.UsageError("--safe and --force exclude each other")
    Device(dev_id).stop(safe=safe, force=force)


@cli.command()
@id_option
def start(dev_id: int) -> None:
    """Serve a stopped or dead device again, as it was added."""
    Device(dev_id).start()
    _say(Device(dev_id).node)


@cli.command()
@id_option
def quiesce(dev_id: int) -> None:
    """End a device's daemon and have its requests wait, for recover."""
    Device(dev_id).quiesce()


@cli.command()
@id_option
@click.argument("size", type=SizeType())
@click.option("--force", is_flag=True, help="also if a device in use loses its end")
def resize(dev_id: int, size: int, force: bool) -> None:
    """Give a device another SIZE, and its backing where that can."""
    Device(dev_id).resize(size, force=force)


@cli.command()
@id_option
@click.option("--force", is_flag=True, help="also onto files that hold something else, which is lost")
def resync(dev_id: int, force: bool) -> None:
    """Bring back legs of a mirror that had failed, while it is used.

    The daemon does it: to interrupt this command interrupts the waiting alone, and it can be given again.
    """
    with click.progressbar(length=1, label="copying", file=sys.stderr) as bar:

        def tell(progress: Progress) -> None:
            bar.length = max(1, progress.total)
            bar.update(progress.done - bar.pos)

        Device(dev_id).resync(force=force, tell=tell)
        bar.update((bar.length or 0) - bar.pos)


@cli.command("set-affinity")
@id_option
@click.option("-q", "--queue", "q_id", type=click.IntRange(0, 4095), required=True, help="queue, from 0 on")
@click.option("--cpuset", "cpus", type=CpuSetType(), required=True, help="CPUs, such as 0-3,5")
def set_affinity(dev_id: int, q_id: int, cpus: frozenset[int]) -> None:
    """Have a queue of a device run on some CPUs, for as long as its daemon lives."""
    Device(dev_id).set_affinity(q_id, cpus)


def _for_each(
    ids: tuple[int, ...],
    numbers: tuple[int, ...],
    every: Callable[[], list[int]] | None,
    action: Callable[[Device], None],
) -> int:
    """Do it for all that are named, or for ``every`` one that there is, and go on after what fails."""
    from ublkpy.driver import ctrl

    if bool(every) == bool(ids or numbers):
        raise click.UsageError("name the devices, or say -a for all of them (not both)")
    if every:
        ctrl.require_driver()  # without it there is no device to ask for
    dev_ids = every() if every else list(dict.fromkeys((*numbers, *ids)))
    errors = []
    for dev_id in dev_ids:
        try:
            action(Device(dev_id))
        except UblkError as e:
            errors.append(e)
    return _status_of(errors)


def _say(text: str) -> None:
    """What has been done stays done, whoever hears of it."""
    try:
        click.echo(text)
    except OSError as e:
        _discard_stdout()
        log.warning("cannot write to stdout: %s", e.strerror)


@cli.command()
@id_option
@json_option
def params(dev_id: int, as_json: bool) -> None:
    """Show what the driver knows of a device's disk: block sizes, limits, attributes."""
    found = Device(dev_id).params()
    click.echo(render.to_json({"id": dev_id, "params": found}) if as_json else render.params(found))


@cli.command()
@json_option
def features(as_json: bool) -> None:
    """Show what this kernel's driver can do; on a terminal, also what it cannot."""
    from ublkpy.driver import inspect

    found = inspect.features()
    click.echo(render.features_json(found) if as_json else render.features(found, every=sys.stdout.isatty()))


cli.add_command(target_group)


@cli.group("udev", cls=_Group)
def udev_() -> None:
    """Let users add devices of their own (docs/unprivileged.md)."""


@udev_.command("install")
def udev_install() -> None:
    """Make the group ublk and give udev the rules for unprivileged devices; as root, once."""
    from ublkpy.driver import udev

    click.echo("\n".join(udev.install()))


@udev_.command("remove")
def udev_remove() -> None:
    """Take the rules away again."""
    from ublkpy.driver import udev

    click.echo("\n".join(udev.remove()))


@cli.command(cls=Add)
@_of_device
@click.pass_context
def check(
    ctx: click.Context, /, words: tuple[str, ...], target_type: str | None, file: Path | None, **values: Any
) -> None:
    """Say whether a device could be added so, without the driver: opens its target, and closes it.

    TARGET, KEY=VALUE and all options are those of add.
    """
    from ublkpy.tgt import handlers
    from ublkpy.tgt.options import format_size

    wanted = config.build(*_said(ctx, words, target_type, values))
    target, geometry = wanted.target, wanted.open()
    target.close()
    backing = f" on {found}" if (found := handlers.backing(target)) else ""
    click.echo(f"{file or ctx.meta[TARGET]}: {target.name}{backing}, {format_size(geometry.size)}: good")


for _opt in config.DeviceOptions.options.values():
    for _command in (add, check):
        _command.params.append(Declared(_opt, "device"))


@cli.command("help")
@click.option(
    "-t", "--type", "target_type", metavar="TARGET", help="the options of a target", shell_complete=complete_targets
)
@click.argument("command", required=False, shell_complete=_complete_commands)
@click.pass_context
def help_(ctx: click.Context, target_type: str | None, command: str | None) -> None:
    """Show the help of a command or a target."""
    parent = ctx.parent
    assert parent is not None
    if target_type:
        cls = tgt.find(target_type)
        sub = click.Context(add, info_name=f"add {target_type}", parent=parent)
        sub.meta[TARGET] = target_type
        click.echo(f"{cls.name}: {cls.text().splitlines()[0]}\n\n{add.get_help(sub)}")
    elif command:
        _, found, _ = cli.resolve_command(parent, [command])
        assert found is not None  # a command that there is not raises, with what was perhaps meant
        click.echo(found.get_help(click.Context(found, info_name=command, parent=parent)))
    else:
        click.echo(cli.get_help(parent))
