"""Writes docs/commands.md: every command with its options, as the command line knows them.

python scripts/commands.py            # write it
python scripts/commands.py --check    # exit code 1 where it is not what they say
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import typer
from page import cell, main

from avsep.cli.app import build_app

HEAD = """# Commands

Every command of `avsep` with its arguments and options. `avsep COMMAND --help` shows the same in the terminal. A
mistake ends in one line and exit code 2.

This page is written by `scripts/commands.py`.
"""


def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """A command and all below it, with their full names."""
    yield name, command
    for below, one in getattr(command, "commands", {}).items():
        if not one.hidden:
            yield from commands(one, f"{name} {below}")


def default(parameter: Any) -> str:
    """What holds where an option is not given; nothing for a flag, or where its help says it."""
    value = parameter.default() if callable(parameter.default) else parameter.default
    if parameter.required:
        return "must be given"
    if value is None or value is False or value == () or value == [] or "Sentinel" in type(value).__name__:
        return ""
    if value is True:
        return "on"
    return f"`{','.join(map(str, value)) if isinstance(value, (tuple, list)) else value}`"


KINDS = {"Path": "PATH", "int": "INTEGER", "float": "NUMBER", "str": "TEXT"}


def values(command: Any) -> dict[str, str]:
    """What stands after each option, from the annotations: the same with every release of typer."""
    found: dict[str, str] = {}
    if command.callback is None:
        return found
    for name, hint in get_type_hints(inspect.unwrap(command.callback)).items():
        # list[str] has the name list, and only its text says of what
        text = str(hint) if get_args(hint) else getattr(hint, "__name__", str(hint))
        words = [KINDS[word] for word in re.findall(r"Path|int|float|str", text)]
        repeated = getattr(hint, "__origin__", None) is tuple
        found[name] = " ".join(words if repeated else words[:1])
    return found


def table(command: Any) -> list[str]:
    """The arguments and options of a command."""
    lines = []
    kinds = values(command)
    for parameter in command.params:
        if getattr(parameter, "hidden", False) or parameter.name in ("install_completion", "show_completion"):
            continue
        argument = parameter.param_type_name == "argument"
        names = (
            [(parameter.metavar or parameter.name).upper()]
            if argument
            else [*parameter.opts, *parameter.secondary_opts]
        )
        flag = argument or getattr(parameter, "is_flag", False)
        value = "" if flag else f" {parameter.metavar or kinds[parameter.name]}"
        text = cell(", ".join(f"`{name}{value}`" for name in names))
        about = cell(getattr(parameter, "help", None) or "")
        lines.append(f"| {text} | {about} | {default(parameter)} |")
    return ["| argument or option | meaning | default |", "|---|---|---|", *lines, ""] if lines else []


_ROOT = typer.main.get_command(build_app())


def page() -> str:
    lines = [HEAD]
    for name, command in commands(_ROOT, "avsep"):
        if command is not _ROOT:
            lines += [f"{'##' if name.count(' ') == 1 else '###'} `{name}`\n"]
        lines += ["\n\n".join(" ".join(part.split()) for part in (command.help or "").split("\n\n")), ""]
        lines += table(command)
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    sys.exit(main("commands.md", page()))
