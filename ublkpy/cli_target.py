"""``ublk target``: which targets there are, what they can do, and a new one."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import click

from ublkpy import render, tgt
from ublkpy.cli_options import complete_targets, json_option
from ublkpy.errors import ConfigError, UblkError
from ublkpy.tgt import load


@click.group("target")
def target_group() -> None:
    """See which targets there are, and write one (docs/write-a-target.md)."""


@target_group.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the targets of ublkpy, and those of installed packages."""
    found = [_entry(name) for name in tgt.names()]
    if as_json:
        click.echo(render.to_json({"targets": found}))
        return
    rows = [[entry["name"], entry["from"], entry.get("help") or f"broken: {entry['error']}"] for entry in found]
    click.echo(render.table([["NAME", "FROM", "WHAT IT IS"], *rows]))


def _entry(name: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "from": load.package(name)}
    try:
        return entry | {"help": load.find(name).text().splitlines()[0]}
    except UblkError as e:  # one that is broken must not hide the others
        return entry | {"error": e.message}


@target_group.command()
@click.argument("name", shell_complete=complete_targets)
@json_option
def show(name: str, as_json: bool) -> None:
    """Show what a target is, its options, and what its devices can do."""
    cls = load.find(name)
    options: list[dict[str, Any]] = [
        {
            "name": opt.name,
            "kind": "|".join(opt.kind.choices) or opt.kind.metavar,
            "default": None if opt.required else opt.default,
            "required": opt.required,
            "help": opt.help,
        }
        for opt in cls.options.values()
    ]
    if as_json:
        found = {"name": cls.name, "type": load.reference(cls), "doc": cls.text(), "options": options}
        click.echo(render.to_json({"target": found | {"methods": sorted(cls.own_methods())}}))
        return
    click.echo(f"{cls.name}: {cls.text()}\n")
    if methods := sorted(cls.own_methods()):
        click.echo(f"Methods: {', '.join(methods)}\n")
    rows = [[o["name"], o["kind"], "required" if o["required"] else _shown(o["default"]), o["help"]] for o in options]
    click.echo(render.table([["OPTION", "KIND", "DEFAULT", "WHAT IT IS"], *rows]) if rows else "It has no options.")
    click.echo(f"\nublk add {name}" + "".join(f" --{o['name']} {o['kind']}" for o in options if o["required"]))


def _shown(default: Any) -> str:
    return "-" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


@target_group.command()
@click.argument("file", type=click.Path(path_type=Path))
def new(file: Path) -> None:
    """Write a commented target to FILE, a disk in memory to begin with. It runs as it is."""
    if file.suffix != ".py":
        raise ConfigError(f"{file} does not end with .py", f"ublk target new {file}.py")
    try:
        with file.open("x", encoding="utf-8") as made, load.template().open(encoding="utf-8") as template:
            shutil.copyfileobj(template, made)
    except FileExistsError as e:
        raise ConfigError(f"{file} exists already", "choose another name") from e
    except OSError as e:
        raise UblkError(f"cannot write {file}: {e.strerror}") from e
    path = file if file.is_absolute() else f"./{file}"
    click.echo(f"wrote {file}; try it: ublk add {path}", err=not sys.stdout.isatty())
