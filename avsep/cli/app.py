"""Puts the commands together."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

# command -> module with a function `command`, or with a typer group `app`
COMMANDS = (
    "demo",
    "list",
    "data",
    "train",
    "learn",
    "memory",
    "evaluate",
    "compare",
    "report",
    "budget",
    "reproduce",
    "leaderboard",
    "sweep",
    "separate",
    "models",
    "export",
    "app",
    "doctor",
    "bench",
)


# click's, of which newer versions of typer have a copy of their own
_UsageError: Any = typer.BadParameter.__bases__[0]


class Interrupted(BaseException):
    """Ctrl-C, with how to go on, if the command knows. Not a KeyboardInterrupt, which typer ends with ``Aborted!``."""


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise Interrupted(*stop.args) from None
        except _UsageError as error:
            from avsep.environment import world_size
            from avsep.errors import ConfigError

            if world_size() == 1:
                raise
            raise ConfigError(error.format_message()) from None


def build_app(arguments: Sequence[str] = ()) -> typer.Typer:
    """The command with its commands; where ``arguments`` begin with the name of one, with that one alone, so that no
    other's module is imported."""
    app = typer.Typer(
        name="avsep",
        cls=_Commands,
        help="Continual audio-visual sound separation: compose, train task after task, evaluate, separate, export.",
        no_args_is_help=True,
        add_completion=not _is_command(arguments),  # where a command is called, its options cost time and do nothing
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",  # in rich's own markup a "[default]" in a help text would vanish
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    arguments = arguments or _being_completed()
    for name in arguments[:1] if _is_command(arguments) else COMMANDS:
        module = importlib.import_module(f"avsep.cli.{name}_command")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name)
        else:
            app.command(name)(module.command)
    return app


def _is_command(arguments: Sequence[str]) -> bool:
    return bool(arguments) and arguments[0] in COMMANDS


def _being_completed() -> list[str]:
    """The words that a shell asks to complete, after the program's name; none where it does not ask."""
    if "_AVSEP_COMPLETE" not in os.environ:
        return []
    return (os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or "").split()[1:]


def _version(value: bool) -> None:
    if value:
        from avsep import __version__

        typer.echo(f"avsep {__version__}")
        raise typer.Exit


def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Continual audio-visual sound separation."""
    from avsep.environment import world_size
    from avsep.errors import ConfigError

    if world_size() > 1 and context.invoked_subcommand != "train":
        raise ConfigError(
            f"{world_size()} processes were started, and only avsep train shares its work between processes: run "
            f"avsep {context.invoked_subcommand} without torchrun"
        )
